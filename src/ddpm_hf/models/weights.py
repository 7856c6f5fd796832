"""Networks whose weights and configs are checked when they are opened and saved. No part of a published pipeline.py."""

import os
import re
from pathlib import Path

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import logging

from ddpm_hf.files.diffusers_internals import read_weights, rename_old_keys
from ddpm_hf.files.pipeline_folder import GuardedConfig, check_part, folder_of_part
from ddpm_hf.models.single_file import SingleFileModel

logger = logging.get_logger(__name__)


# what torch.compile and DistributedDataParallel put before or into the names of a network's tensors
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+|(?<=\.)_orig_mod\.")


class CheckedModel(SingleFileModel, GuardedConfig, ModelMixin, ConfigMixin):
    """diffusers' `ModelMixin`, which opens only weights that fit the config, and saves only weights that it can open again."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Opens a network as diffusers' method does, from safetensors unless use_safetensors=False.

        The prefixes "module." and "_orig_mod." of wrapped networks are removed from the names of the weights.

        Raises:
            ValueError: the weights do not fit the config: tensors are missing, superfluous, of another shape, or not of
                floating point; the folder has other weights than those asked for; the config or the index of the weights is
                damaged; a file is a link to outside of the network's folder, or of the pipeline's folder around it.
            OSError: a file is missing or cannot be read.
        """
        folder = os.path.join(pretrained_model_name_or_path, kwargs.get("subfolder") or "").rstrip(os.sep)
        kwargs["use_safetensors"] = kwargs.get("use_safetensors") is not False
        with_info = kwargs.pop("output_loading_info", False)
        if os.path.isdir(folder):
            check_part(Path(folder), folder_of_part(Path(folder)))
            if kwargs["use_safetensors"]:
                _check_variant(folder, kwargs.get("variant"))
        try:
            network, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            if folder in str(error):
                raise
            text = " ".join(f"{'' if isinstance(error, ValueError) else type(error).__name__} {error}".split())
            raise ValueError(f"{os.path.join(folder, 'config.json')}: {text[:500]}") from error
        _check_names(folder, info["missing_keys"], info["unexpected_keys"])
        bad = [
            name for name, weight in network.named_parameters() if not weight.is_meta and not weight.isfinite().all()
        ]
        if bad:
            logger.warning(
                f"{folder}: NaN or infinite values in {_counted(bad)}; the network's outputs will have them too"
            )
        return (network, info) if with_info else network

    @classmethod
    def _load_pretrained_model(cls, model, state_dict, resolved_model_file, path, loaded_keys, **kwargs):
        """diffusers' hook for loading: joins all shards, removes prefixes, and checks the weights before they are used."""
        if state_dict is None:
            state_dict = read_weights(resolved_model_file)
        plain = {_WRAPPERS.sub("", name): weight for name, weight in state_dict.items()}
        if len(plain) < len(state_dict):
            twice = [name for name in state_dict if name != _WRAPPERS.sub("", name) in state_dict]
            raise ValueError(
                f"{path}: its weights hold tensors with and without prefixes, {_counted(twice)}; save it again"
            )
        rename_old_keys(model, plain)
        expected = model.state_dict()
        _check_names(path, expected.keys() - plain.keys(), plain.keys() - expected.keys())
        for name, weight in plain.items():
            if weight.shape != expected[name].shape and not kwargs.get("ignore_mismatched_sizes"):
                raise ValueError(
                    f"{path}: its weights are of another network than its config.json: {name} has the shape "
                    f"{tuple(weight.shape)} and not {tuple(expected[name].shape)}"
                )
            if not weight.is_floating_point():
                raise ValueError(f"{path}: {name} is of {weight.dtype}; the weights must be of floating point")
        return super()._load_pretrained_model(model, plain, resolved_model_file, path, list(plain), **kwargs)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        save_function=None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """Saves the network as diffusers' method does. Pipelines read the names of the arguments from this signature.

        Raises:
            ValueError: the network holds other tensors than its config describes, such as adapters, so that no class could
                open them; a file to be written is a link.
        """
        config = {key: value for key, value in self.config.items() if key != "_use_default_values"}  # as it is written
        with torch.device("meta"):
            expected = type(self).from_config(config).state_dict()
        present = self.state_dict()
        added, missing = present.keys() - expected.keys(), expected.keys() - present.keys()
        if added or missing:
            raise ValueError(
                f"the network and its config differ by {_counted(added or missing)}: merge or remove "
                "adapters (peft: merge_and_unload) and wrappers within it, then save it"
            )
        super().save_pretrained(
            save_directory,
            is_main_process,
            save_function,
            safe_serialization,
            variant,
            max_shard_size,
            push_to_hub,
            **kwargs,
        )


def _check_names(path, missing, unexpected):
    """Whether a file of weights has the tensors of its network and no others."""
    if missing or unexpected:
        lacks = f"lack {_counted(missing)}" if missing else "are complete"
        more = f" and hold {_counted(unexpected)} not of this network" if unexpected else ""
        adapters = any("base_layer" in name or "lora" in name for name in unexpected)
        mend = (
            "merge the adapters into the network (peft: merge_and_unload) and save it again"
            if adapters
            else "save it again"
        )
        raise ValueError(f"{path}: its weights are of another network than its config.json: they {lacks}{more}; {mend}")


def _counted(names):
    """ "7 tensors (a, b, c, ...)" of names, in order; each of 80 characters at most."""
    names = sorted(names)
    first = ", ".join(repr(name[:80])[1:-1] for name in names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} tensor{'s' * (len(names) > 1)} ({first})"


def _check_variant(folder, variant):
    """Whether the folder of a network has safetensors of this variant, where it has weights."""
    names = os.listdir(folder)
    pattern = re.compile(
        r"diffusion_pytorch_model(?:\.(\w+))?(?:-\d+-of-\d+)?(?:\.(\w+))?\.safetensors"
    )  # the second group: file names from before 2024
    variants = sorted({match[1] or match[2] or "" for match in map(pattern.fullmatch, names) if match})
    others = ", ".join(repr(name) for name in variants if name)
    if (variant or "") in variants:
        return
    if variant is None and others:
        raise ValueError(f"{folder} holds weights of the variant {others} only; open it with variant={variants[0]!r}")
    if variants:
        usual = ["the usual weights (leave variant out)"] if "" in variants else []
        raise ValueError(
            f"{folder} has no weights of variant={variant!r}; it holds {', '.join(usual + [others] * (others != ''))}"
        )
    pickled = any(name.endswith(".bin") for name in names)
    mend = (
        "if you trust who made its pickled weights, open it with use_safetensors=False and save it"
        if pickled
        else "save it"
    )
    raise ValueError(f"{folder} has no safetensors; {mend}: save_pretrained writes safetensors")
