"""Fails, and says what to mend, if a new version of diffusers changes what this package uses beyond its documentation."""

import inspect
import json
from importlib.util import find_spec

import diffusers
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.utils import DummyObject
from safetensors.torch import save_file

from ddpm_hf.files import diffusers_internals as internals


def changed(name):
    return f"diffusers {diffusers.__version__} has changed {name}; mend what uses it: see files/diffusers_internals.py"


@pytest.mark.parametrize(
    "cls, name", [(cls, name) for cls, names in internals.PRIVATE_NAMES.items() for name in names], ids=str
)
def test_names_exist(cls, name):
    assert hasattr(cls, name), changed(f"{cls.__name__}.{name}")


def test_configs_are_read_by_the_hook(tmp_path):
    class Scheduler(internals.ConfigReader, DDPMScheduler):
        @classmethod
        def read_json_file(cls, path):
            return json.loads(path.read_text()) | {"num_train_timesteps": 7}

    DDPMScheduler().save_pretrained(tmp_path)
    scheduler = Scheduler.from_pretrained(tmp_path)
    assert scheduler.config.num_train_timesteps == 7, changed("ConfigMixin._dict_from_json_file")


def test_weights_are_loaded_by_the_hook():
    """In models/weights.py, which passes on arguments by position."""
    names = list(inspect.signature(diffusers.ModelMixin._load_pretrained_model).parameters)
    expected = ["model", "state_dict", "resolved_model_file", "pretrained_model_name_or_path", "loaded_keys"]
    assert names[: len(expected)] == expected, changed("ModelMixin._load_pretrained_model")


def test_arguments_of_pipelines():
    arguments = internals.constructor_arguments(DDPMPipeline)
    assert arguments == ({"unet", "scheduler"}, set()), changed("DiffusionPipeline._get_signature_keys")


def test_shards_are_read(tmp_path):
    files = [str(tmp_path / f"{i}.safetensors") for i in range(2)]
    for i, file in enumerate(files):
        save_file({f"x{i}": torch.full((2,), float(i))}, file, metadata={"format": "pt"})
    weights = internals.read_weights(files)
    assert {name: weight.tolist() for name, weight in weights.items()} == {"x0": [0, 0], "x1": [1, 1]}, changed(
        "models.modeling_utils.load_state_dict"
    )


def test_old_keys_are_renamed():
    sizes = dict(block_out_channels=(8,), norm_num_groups=4, layers_per_block=1)
    unet = UNet2DModel(8, 1, 1, down_block_types=("AttnDownBlock2D",), up_block_types=("AttnUpBlock2D",), **sizes)
    names = [name for name in unet.state_dict() if ".to_q.weight" in name]
    old = {name.replace("to_q", "query"): torch.ones(8, 8) for name in names}
    internals.rename_old_keys(unet, old)
    assert sorted(old) == sorted(names), changed("ModelMixin._fix_state_dict_keys_on_load")


def test_keys_of_configs():
    """`_use_default_values` and `_name_or_path`, which diffusers adds; `_internal_dict`, where it keeps the config."""
    scheduler = DDPMScheduler(num_train_timesteps=7)
    assert "beta_start" in scheduler.config["_use_default_values"], changed("the config key _use_default_values")
    assert scheduler._internal_dict is scheduler.config, changed("ConfigMixin._internal_dict")


def test_pipelines_of_a_scheduler_read_the_device(make_pipeline):
    assert make_pipeline()._execution_device == torch.device("cpu"), changed("DiffusionPipeline._execution_device")


def test_offloaded_modules_are_seen():
    module = torch.nn.Linear(2, 2)
    assert not internals.is_offloaded(module)
    assert internals.is_offloaded(add_hook_to_module(module, ModelHook())), changed("the attribute _hf_hook")


def test_stand_ins_name_their_packages():
    class Absent(metaclass=DummyObject):
        _backends = ["torch", "torchsde"]

    assert internals.missing_packages(Absent) == ["torch", "torchsde"]
    assert internals.missing_packages(DDPMScheduler) == []
    if find_spec("torchsde") is None:
        assert "torchsde" in internals.missing_packages(diffusers.DPMSolverSDEScheduler), changed("_backends")
