"""All that this package uses of diffusers beyond its documented interface, checked on diffusers 0.42.1.

tests/files/test_diffusers_internals.py fails, and names it, if a new version of diffusers changes one of these.
"""

from pathlib import Path

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin, load_state_dict
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

# What classes of this package read, call or override in their parents. A published pipeline.py does so too, and cannot import
# this module, so the names stand where they are used.
PRIVATE_NAMES = {
    ConfigMixin: ("_dict_from_json_file",),
    ModelMixin: (
        "_fix_state_dict_keys_on_load",
        "_load_pretrained_model",
        "_no_split_modules",
        "_repeated_blocks",
        "_skip_layerwise_casting_patterns",
        "_supports_gradient_checkpointing",
    ),
    DiffusionPipeline: (
        "_exclude_from_cpu_offload",
        "_execution_device",
        "_get_signature_keys",
        "_optional_components",
    ),
    DDPMScheduler: ("_compatibles", "_get_variance", "_threshold_sample"),
}


class ConfigReader:
    """Base class of classes that read configs by `read_json_file`; listed before diffusers' `ConfigMixin`."""

    @classmethod
    def read_json_file(cls, path: Path) -> dict:
        """Reads a config or an index."""
        raise NotImplementedError

    @classmethod
    def _dict_from_json_file(cls, json_file, dduf_entries=None):  # older versions of diffusers pass dduf_entries
        return cls.read_json_file(Path(json_file))


def constructor_arguments(pipeline_class: type[DiffusionPipeline]) -> tuple[set[str], set[str]]:
    """Returns the arguments of a pipeline's constructor: names of components, and names of settings."""
    components, settings = pipeline_class._get_signature_keys(pipeline_class)
    return set(components), set(settings)


def read_weights(files: list[str]) -> dict:
    """Reads all shards of a checkpoint: tensor name -> tensor."""
    return {name: weight for file in files for name, weight in load_state_dict(file).items()}


def rename_old_keys(network: ModelMixin, state_dict: dict) -> None:
    """Renames the tensors of checkpoints from older versions of diffusers to their present names, in place."""
    network._fix_state_dict_keys_on_load(state_dict)


def is_offloaded(module: torch.nn.Module) -> bool:
    """Whether a hook of accelerate moves the module's weights, as offloading and device maps do."""
    return hasattr(module, "_hf_hook")


def missing_packages(cls) -> list[str]:
    """Returns the packages without which diffusers has only a stand-in for a class; [] for a class that is there."""
    return list(getattr(cls, "_backends", []))
