"""Checkpoints of other code bases: opened as a description and tensors of this package, and written again."""

import hashlib
import os
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ddpm_hf.arguments import shown
from ddpm_hf.command_help import did_you_mean
from ddpm_hf.original import ho, openai, score_sde
from ddpm_hf.original.description import Description, UnsupportedNetwork
from ddpm_hf.original.files import WEIGHTS, local_file, read_tensors
from ddpm_hf.original.options import ALL, OPTIONS_OF, Options
from ddpm_hf.original.pairs import first_five, to_ours
from ddpm_hf.original.published import MD5, PUBLISHED

CODE_BASES: tuple[types.ModuleType, ...] = (openai, ho, score_sde)

# tensors that a checkpoint holds and its network does not use: the table of noise levels of score_sde_pytorch, and a parameter
# of ddim's "bayesian" networks
UNUSED = ("sigmas", "logvar")


@dataclass
class Original:
    """An opened checkpoint.

    Attributes:
        path: its file.
        description: the network and its process.
        tensors: its weights, by their original names.
        options: what its file does not say. With the network's config they suffice to write the file again.
        code: the module for its code base.
    """

    path: Path
    description: Description
    tensors: dict[str, torch.Tensor]
    options: dict
    code: types.ModuleType

    def state_dict(self, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
        """The tensors for a network whose tensors have these shapes. Only fused q, k and v and transposed tensors are copied.

        Raises:
            ValueError: the network has other tensors.
        """
        is_tensorflow = self.code is ho and next(iter(self.tensors)).startswith("model/")
        pairs = ho.tensorflow_pairs if is_tensorflow else self.code.pairs
        try:
            return to_ours(pairs(self.description.config, self.options, shapes), self.tensors, shapes)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None


def open_original(
    path: str | os.PathLike, like: str | None = None, weights: str = "ema", **options: object
) -> Original:
    """Opens a checkpoint of OpenAI's, Ho et al.'s or Song et al.'s code.

    Args:
        path: a file, its address on the Hub, or a folder of TensorFlow's variables as .npy.
        like: a name in `PUBLISHED`: the checkpoint has the configuration of this one. None: the names of the file and its
            folders decide, and the MD5 sum of a .ckpt; other checkpoints need options.
        weights: "ema" for averaged weights if the file has them, "raw" for the others.
        options: those of `original.options.OPTIONS` for this code base. They override those of `like`.

    Raises:
        ValueError: the file is of another kind, damaged, or would run code; the network is not supported, or not that of
            `like`; an option is missing, unknown, or contradicts the tensors. One line.
        OSError: the file is missing or cannot be read.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights={shown(weights)} is not known; choose one of {', '.join(WEIGHTS)}")
    if like is not None and published_name(like) is None:
        hint = did_you_mean(like, list(PUBLISHED)) or f"; choose one of {', '.join(PUBLISHED)}"
        raise ValueError(f"like={shown(like)} is no published checkpoint{hint}")
    Options(options)  # before the file is read
    path = local_file(path)
    tensors = read_tensors(path, weights)
    code = next((code for code in CODE_BASES if code.is_recognized(tensors)), None)
    if code is None:
        raise ValueError(f"{path} {_other_model(tensors)}")
    if foreign := [name for name in options if name not in OPTIONS_OF[ALL] | OPTIONS_OF[code.CODE_BASE_NAMES]]:
        raise ValueError(f"{path}: {code.CODE_BASE_NAMES} have no {', '.join(foreign)}; leave these options out")
    of_this_code = {name: known for name, known in PUBLISHED.items() if known.code == code.__name__.rpartition(".")[2]}
    name = published_name(like) if like is not None else _name_of_file(path)
    difference = (
        f"that is of another code base; known of this one: {', '.join(of_this_code)}"
        if name and name not in of_this_code
        else None
    )
    if difference is None:
        try:
            description, checked = _describe(path, code, tensors, of_this_code[name] if name else None, options)
            difference = name and _difference(description.config, of_this_code[name].network)
        except ValueError as error:
            if name is None or like is not None:
                raise
            difference = str(error)
    if difference and like is not None:
        raise ValueError(f"{path} is not like {name}: {difference}")
    subject = str(path)
    if difference:  # another network in a file of this name
        description, checked = _describe(path, code, tensors, None, options)
        subject += f" is not the published {name} ({difference}) and"
    checked.check_complete(subject, of_this_code)
    used = {name: tensor for name, tensor in tensors.items() if name not in UNUSED}
    original = Original(path, description, used, dict(checked), code)
    sigmas = tensors.get("sigmas")
    if sigmas is not None and not sigmas.is_meta and not torch.equal(sigmas, score_sde.noise_levels(checked)):
        original.options["sigmas"] = sigmas.tolist()  # exp of another machine, kept to the last bit
    return original


def _describe(path, code, tensors, published, options):
    checked = Options((published.options if published else {}) | options)
    try:
        description = code.describe(tensors, checked)
        stride = 2 ** (len(description.config["block_out_channels"]) - 1)
        if checked.get("image_size", stride) % stride:
            raise UnsupportedNetwork(f"image_size={checked['image_size']} must be a multiple of {stride}")
        return description, checked
    except UnsupportedNetwork as error:
        raise ValueError(f"{path}: {error}") from None
    except (ArithmeticError, LookupError, TypeError, ValueError):
        raise ValueError(f"{path} lacks tensors of the network that it seems to hold; download it again") from None


def published_name(name: str) -> str | None:
    """The full name in `PUBLISHED`, which may be given with ".pt" or "ema_", or without "vp/" and so on; None if unknown."""
    name = name.removesuffix(".pt").removeprefix("ema_").rstrip("/")
    ends = [known for known in PUBLISHED if known == name or known.rpartition("/")[2] == name]
    return name if name in PUBLISHED else ends[0] if len(ends) == 1 else None


def _name_of_file(path):
    """The published checkpoint that the name of the file, of its folders, or its MD5 sum stands for; None if unknown."""
    folders = path.absolute().parent.parts[-2:]
    for name in (path.stem, path.name, "/".join(folders), folders[-1], path.stem.rpartition("-")[0]):
        if (known := published_name(name)) is not None:
            return known
    if path.is_file() and path.suffix == ".ckpt":
        with path.open("rb") as file:
            return MD5.get(hashlib.file_digest(file, "md5").hexdigest())
    return None


def _difference(config, network):
    """The first difference between a network's config and a published checkpoint's `Published.network`; None if they agree."""
    values = {
        "attention": ["Attn" in name for name in config["down_block_types"]],
        "classes": config.get("num_class_embeds", config.get("num_classes")),
    }
    for key, value in network.items():
        found = values.get(key, config.get(key))
        if found != value:
            return f"its {key} is {shown(found)}, not {shown(value)}"
    return None


def _other_model(tensors):
    """The rest of a message about a file of no known code base: what it seems to hold."""
    names = list(tensors)
    if any(name.startswith(("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")) for name in names):
        return "holds a latent diffusion model; diffusers' StableDiffusionPipeline.from_single_file opens these"
    if any("lora" in name.lower() for name in names):
        return "holds a LoRA, which is no network; load it into one with diffusers"
    if "conv_in.weight" in tensors and any(name.startswith("down_blocks.") for name in names):
        return "holds a network of diffusers; open its folder with from_pretrained"
    return (
        "holds none of the networks of guided-diffusion, improved-diffusion, pytorch_diffusion, ddim, diffusion (TensorFlow) "
        f"or score_sde_pytorch, but {first_five(names)}"
    )
