"""The published configurations at full size: every tensor of their files is used once, and every shape fits."""

import pytest
import torch

from ddpm_hf import DDPMUNet, NoisyClassifier
from ddpm_hf.original.checkpoint import CODE_BASES, open_original, published_name
from ddpm_hf.original.options import OPTIONS
from ddpm_hf.original.published import PUBLISHED
from support import original_checkpoints as golden

CASES = {file: case for case in golden.cases("published_shapes").values() for file in case["files"]}


@pytest.fixture
def tensors_of_shapes(monkeypatch):
    """Replaces the reading of files by tensors without values."""

    def replace(case):
        tensors = {key: torch.empty(shape, device="meta") for key, shape in case["keys"]}
        monkeypatch.setattr("ddpm_hf.original.checkpoint.read_tensors", lambda path, weights: tensors)
        monkeypatch.setattr("ddpm_hf.original.checkpoint.local_file", lambda path: __import__("pathlib").Path(path))

    return replace


@pytest.mark.parametrize("file", CASES)
def test_published_shapes(file, tensors_of_shapes):
    case = CASES[file]
    tensors_of_shapes(case)
    original = open_original(file if file.endswith(".pt") else f"{file}/checkpoint_8.pth")
    cls = NoisyClassifier if original.description.network == "NoisyClassifier" else DDPMUNet
    network = cls.from_original(original)  # each tensor is used once, and fits, else it raises
    assert sum(parameter.numel() for parameter in network.parameters()) == case["parameters"]


@pytest.mark.parametrize("file", CASES)
def test_a_known_configuration_is_that_of_the_files(file):
    """The options of a known checkpoint are the flags that the golden file has."""
    known, configuration = PUBLISHED[published_name(file)].options, CASES[file]["configuration"]
    flags = configuration.get("model") or configuration
    size = flags.get("image_size") or flags.get("large_size") or configuration["data"]["image_size"]
    assert known["image_size"] == size
    if "model" in configuration:
        assert known["sde"] == configuration["training"]["sde"] or "subvp" in file
        assert known["dropout"] == flags["dropout"] if "dropout" in known else flags["dropout"] == 0
        for name in ("fir", "skip_rescale"):
            assert known.get(name) == flags.get(name), name
    else:
        heads = flags.get("num_head_channels", 64 if "classifier_pool" in flags else -1)
        assert known.get("num_head_channels", -1) == heads
        assert heads != -1 or known["num_heads"] == flags["num_heads"]
        assert known.get("use_new_attention_order", False) == flags.get("use_new_attention_order", False)
        assert known.get("dropout", 0.0) == flags.get("dropout", 0.0)


def test_names():
    assert len({name.rpartition("/")[2] for name in PUBLISHED}) == len(PUBLISHED) - 3  # three are of VP and of sub-VP
    assert published_name("256x256_diffusion_uncond.pt") == "256x256_diffusion_uncond"
    assert published_name("cifar10_ncsnpp") == "ve/cifar10_ncsnpp"
    assert published_name("cifar10_ddpmpp_continuous") is None  # of VP, or of sub-VP
    assert published_name("ema_diffusion_cifar10_model") == "diffusion_cifar10_model"
    modules = {code.__name__.rpartition(".")[2] for code in CODE_BASES}
    for published in PUBLISHED.values():
        assert published.code in modules and published.options.keys() <= OPTIONS.keys()
