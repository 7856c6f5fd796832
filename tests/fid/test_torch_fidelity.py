"""Features and metrics beside torch-fidelity's own, on Inception v3 with random weights: `make test-fid`."""

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf.evaluation.features.extraction import extract
from ddpm_hf.evaluation.features.extractors import open_extractor
from ddpm_hf.evaluation.image_sets import open_images
from ddpm_hf.evaluation.metrics import frechet_distance, inception_score, kernel_distance, precision_recall

try:
    import torch_fidelity
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.utils import create_feature_extractor, extract_featuresdict_from_input_id_cached
except (ImportError, RuntimeError, OSError) as error:  # a torchvision that does not fit torch
    pytest.skip(f"torch_fidelity cannot be imported ({error}); make test-fid", allow_module_level=True)

COUNT = 40
SETTINGS = dict(cuda=False, verbose=False, cache=False, batch_size=16, save_cpu_ram=True)


@pytest.fixture(scope="module", autouse=True)
def threads():
    """All cores: this network is large."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Seeded random weights that keep the scale of activations, with statistics of batch norms unlike their defaults."""
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = FeatureExtractorInceptionV3("random", ["2048"], str(path))
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.2)
    torch.nn.init.normal_(network.fc.weight, 0, 0.5)
    torch.save(network.state_dict(), path)
    return path


def write_pictures(folder, seed, mode):
    """Smooth pictures of 47x33 pixels, those of seed 0 half as bright."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for i in range(COUNT):
        coarse = rng.integers(0, 128 + 128 * seed, (5 + seed, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((47, 33), Image.Resampling.BICUBIC).convert(mode).save(folder / f"{i:05}.png")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(generated, real) by mode."""
    root = tmp_path_factory.mktemp("pictures")
    names = {mode: (root / f"generated-{mode}", root / f"real-{mode}") for mode in ("RGB", "L")}
    for mode, pair in names.items():
        for seed, folder in enumerate(pair):
            write_pictures(folder, seed, mode)
    return names


@pytest.fixture(scope="module")
def extractor(weights):
    return open_extractor(f"inception:{weights}")


@pytest.fixture(scope="module")
def ours(extractor, folders):
    """What `extract` gives for both RGB folders."""
    return [extract(open_images(folder), extractor, 16, progress=False) for folder in folders["RGB"]]


def their_features(folder, weights):
    """By the function through which `torch_fidelity.calculate_metrics` and the command `fidelity` get features of an input."""
    settings = dict(SETTINGS, input1=str(folder), feature_extractor_weights_path=str(weights))
    network = create_feature_extractor("inception-v3-compat", ["2048", "logits_unbiased"], **settings)
    return extract_featuresdict_from_input_id_cached(1, network, **settings)


def greatest_difference(values, expected):
    """Relative to the largest value."""
    return ((values - expected).abs().max() / expected.abs().max()).item()


def test_features_of_a_folder_are_torch_fidelitys(ours, folders, weights):
    theirs = their_features(folders["RGB"][0], weights)
    assert theirs["2048"].std(0).max() > 1e-3  # they depend on the image
    for name, their_name in (("features", "2048"), ("logits", "logits_unbiased")):
        assert greatest_difference(ours[0][name], theirs[their_name]) < 1e-5


def test_features_of_grey_pictures_are_torch_fidelitys(extractor, folders, weights):
    images = open_images(folders["L"][0])
    assert images.channels == 1
    features = extract(images, extractor, 16, progress=False)["features"]
    assert greatest_difference(features, their_features(folders["L"][0], weights)["2048"]) < 1e-5


def test_spatial_features_are_seven_channels_of_mixed_6(ours, folders, weights):
    """In the order (H, W, C) of TensorFlow and of ADM's statistics."""
    network = create_feature_extractor(
        "inception-v3-compat", ["2048"], **SETTINGS, feature_extractor_weights_path=str(weights)
    )
    outputs = []
    network.Mixed_6d.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    network(open_images(folders["RGB"][0]).read(range(3)))
    assert outputs[0].shape == (3, 768, 17, 17)
    expected = torch.stack([outputs[0][:, channel] for channel in range(7)], -1).reshape(3, 17 * 17 * 7)
    assert greatest_difference(ours[0]["spatial"][:3], expected) < 1e-5


def test_metrics_of_two_folders_are_torch_fidelitys(ours, folders, weights):
    generated, real = folders["RGB"]
    theirs = torch_fidelity.calculate_metrics(
        **SETTINGS,
        input1=str(generated),
        input2=str(real),
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
        fid=True,
        kid=True,
        isc=True,
        prc=True,
        feature_layer_prc="2048",
        kid_subset_size=COUNT,
        kid_subsets=2,
        samples_shuffle=False,
    )
    features, real_features = ours[0]["features"], ours[1]["features"]
    distance = frechet_distance(real_features, features)
    assert distance == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    kernel = kernel_distance(real_features, features, subset_size=COUNT).estimate.value
    assert kernel == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)
    assert inception_score(ours[0]["logits"]).value == pytest.approx(theirs["inception_score_mean"], rel=1e-5)
    assert precision_recall(real_features, features) == pytest.approx((theirs["precision"], theirs["recall"]))


def test_weights_of_another_network_are_named(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="x.pth does not fit Inception v3"):
        open_extractor(f"inception:{tmp_path / 'x.pth'}")


def test_damaged_weights_are_known_by_their_name(tmp_path, monkeypatch, weights):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    path = tmp_path / "checkpoints/pt_inception-2015-12-05-6726825d.pth"
    path.parent.mkdir()
    path.write_bytes(weights.read_bytes())
    with pytest.raises(ValueError, match="6726825d.pth is damaged: its SHA-256 begins with"):
        open_extractor("inception")


def test_weights_that_cannot_be_downloaded(tmp_path, monkeypatch):
    """One line says which file goes where."""

    def no_network(*args):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    message = f"no network.*; put weights-inception-2015-12-05-6726825d.pth of https.* into {tmp_path}/checkpoints"
    with pytest.raises(ValueError, match=message):
        open_extractor("inception")


def test_weights_are_not_unpickled_as_code(tmp_path):
    class Code:
        def __reduce__(self):
            return print, ("run",)

    torch.save({"weight": Code()}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="x.pth cannot be read as weights"):
        open_extractor(f"inception:{tmp_path / 'x.pth'}")
