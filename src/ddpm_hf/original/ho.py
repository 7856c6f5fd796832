"""Checkpoints of the network of Ho, Jain, Abbeel 2020: pytorch_diffusion, ddim, and the TensorFlow variables themselves.

pesser/pytorch_diffusion converted the authors' TensorFlow variables; ermongroup/ddim names its tensors alike.
"""

import re
from collections.abc import Collection, Iterator, Mapping

import torch

from ddpm_hf.original.description import Description, UnsupportedNetwork
from ddpm_hf.original.options import HO, Options
from ddpm_hf.original.pairs import (
    HWIO,
    POINTWISE_2D,
    SAME,
    TRANSPOSED,
    TRANSPOSED_TO_2D,
    Pair,
    count_numbered,
    module_pairs,
    parameter_pairs,
)

CODE_BASE_NAMES = HO  # the key in `options.OPTIONS_OF`

# ours -> theirs
RESIDUAL_BLOCK = {
    "norm1": "norm1",
    "conv1": "conv1",
    "time_emb_proj": "temb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "conv_shortcut": "nin_shortcut",
}
ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}

# TensorFlow's names of the modules whose weights are matrices (in, out); other weights of several dimensions are HWIO
MATRICES = ("temb_proj", "nin_shortcut", "q", "k", "v", "proj_out", "dense0", "dense1")


def is_recognized(names: Collection[str]) -> bool:
    """Whether tensors of these names are of these code bases."""
    return "temb.dense.0.weight" in names or "model/temb/dense0/W" in names


def describe(tensors: Mapping[str, torch.Tensor], options: Options) -> Description:
    """Infers the network from names and shapes; the rest is taken from the options.

    Raises:
        UnsupportedNetwork: the variant is not supported.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    tensorflow = "model/temb/dense0/W" in shapes
    if tensorflow:
        shapes = {pytorch_name(name): _pytorch_shape(shape) for name, shape in shapes.items()}
    levels = count_numbered(r"down\.(\d+)\.", shapes)
    blocks = len([name for name in shapes if re.fullmatch(r"down\.0\.block\.\d+\.conv1\.weight", name)])
    if levels > 1 and "down.0.downsample.conv.weight" not in shapes:
        raise UnsupportedNetwork("resamp_with_conv=False (resampling without convolutions) is not supported")
    attention = [f"down.{level}.attn.0.q.weight" in shapes for level in range(levels)]
    out_channels, in_channels = shapes["conv_out.weight"][0], shapes["conv_in.weight"][1]
    config = {
        "sample_size": options.required("image_size"),
        "in_channels": in_channels,
        "out_channels": out_channels,
        "block_out_channels": [shapes[f"down.{level}.block.0.conv1.weight"][0] for level in range(levels)],
        "layers_per_block": blocks,
        "down_block_types": [f"{'Attn' * attends}DownBlock2D" for attends in attention],
        "up_block_types": [f"{'Attn' * attends}UpBlock2D" for attends in attention[::-1]],
        "attention_head_dim": None,
        "norm_num_groups": 32,
        "norm_eps": 1e-6,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "dropout": options.get("dropout", 0.0),
    }
    if shapes["temb.dense.0.weight"][1] != config["block_out_channels"][0]:
        raise UnsupportedNetwork("ch_mult whose first number is not 1 is not supported")
    scheduler_config = {
        "num_train_timesteps": options.get("diffusion_steps", 1000),
        "beta_schedule": "linear",
        "variance_type": {"fixedlarge": "fixed_large", "fixedsmall": "fixed_small"}[options.required("var_type")],
        "timestep_spacing": "iddpm",
        "clip_sample": True,
    }
    return Description("DDPMUNet", config, "VariationalDDPMScheduler", scheduler_config)


def pairs(config: Mapping, options: Mapping, names: Collection[str]) -> Iterator[Pair]:
    """Pairs of all tensors, in pytorch_diffusion's order. Leave out those for modules that this network lacks.

    Args:
        config: of `DDPMUNet`.
        options: as of `describe`; not used.
        names: the names of our tensors; not used.
    """
    levels, blocks = len(config["block_out_channels"]), config["layers_per_block"]
    yield from parameter_pairs("time_embedding.linear_1", "temb.dense.0")
    yield from parameter_pairs("time_embedding.linear_2", "temb.dense.1")
    yield from parameter_pairs("conv_in", "conv_in")
    for level in range(levels):
        yield from _level(f"down_blocks.{level}", f"down.{level}", blocks)
        yield from parameter_pairs(f"down_blocks.{level}.downsamplers.0.conv", f"down.{level}.downsample.conv")
    yield from module_pairs("mid_block.resnets.0", "mid.block_1", RESIDUAL_BLOCK)
    yield from _attention("mid_block.attentions.0", "mid.attn_1")
    yield from module_pairs("mid_block.resnets.1", "mid.block_2", RESIDUAL_BLOCK)
    for level in range(levels):  # theirs count as on the way down, and are stored in this order
        ours = f"up_blocks.{levels - 1 - level}"
        yield from _level(ours, f"up.{level}", blocks + 1)
        yield from parameter_pairs(f"{ours}.upsamplers.0.conv", f"up.{level}.upsample.conv")
    yield from parameter_pairs("conv_norm_out", "norm_out")
    yield from parameter_pairs("conv_out", "conv_out")


def _level(ours, theirs, blocks):
    for j in range(blocks):
        yield from module_pairs(f"{ours}.resnets.{j}", f"{theirs}.block.{j}", RESIDUAL_BLOCK)
    for j in range(blocks):
        yield from _attention(f"{ours}.attentions.{j}", f"{theirs}.attn.{j}")


def _attention(ours, theirs):
    yield from parameter_pairs(f"{ours}.group_norm", f"{theirs}.norm")
    yield from module_pairs(ours, theirs, ATTENTION, POINTWISE_2D)


def tensorflow_pairs(config: Mapping, options: Mapping, names: Collection[str]) -> Iterator[Pair]:
    """`pairs` with the variables of TensorFlow."""
    for pair in pairs(config, options, names):
        name = tensorflow_name(pair.theirs)
        module, _, kind = name.rpartition("/")
        layout = SAME
        if kind == "W":
            is_matrix = module.rpartition("/")[2] in MATRICES
            layout = TRANSPOSED if is_matrix else HWIO
            layout = TRANSPOSED_TO_2D if module.endswith("nin_shortcut") else layout
        yield Pair(name, pair.ours, layout)


def tensorflow_name(name: str) -> str:
    """ "down.0.block.1.norm1.weight" -> "model/down_0/block_1/norm1/gamma"."""
    module, _, kind = name.rpartition(".")
    is_norm = module.rpartition(".")[2].startswith("norm")
    kind = {"weight": "gamma" if is_norm else "W", "bias": "beta" if is_norm else "b"}[kind]
    module = re.sub(r"^temb\.dense\.", "temb/dense", module)
    module = re.sub(r"(down|up|block|attn)\.(\d+)", r"\1_\2", module)
    return f"model/{module.replace('.', '/')}/{kind}"


def pytorch_name(name: str) -> str:
    """The reverse of `tensorflow_name`."""
    *modules, kind = name.removeprefix("model/").split("/")
    kind = {"gamma": "weight", "W": "weight", "beta": "bias", "b": "bias"}.get(kind, kind)
    path = re.sub(r"\btemb\.dense", "temb.dense.", ".".join(modules))
    if not path.startswith("mid"):
        path = re.sub(r"\b(down|up|block|attn)_(\d+)", r"\1.\2", path)
    return f"{path}.{kind}"


def _pytorch_shape(shape):
    return (*shape[::-1][:2], *shape[:-2]) if len(shape) > 1 else shape
