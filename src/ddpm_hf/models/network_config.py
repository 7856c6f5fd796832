"""What the config of a network may hold: block types, choices, ranges, and the checks that involve several keys."""

import dataclasses
from typing import Any

from ddpm_hf.arguments import shown
from ddpm_hf.models.blocks import ACTIVATIONS


@dataclasses.dataclass(frozen=True)
class BlockType:
    """What a name in `down_block_types` or `up_block_types` stands for: one resolution level of the U-Net."""

    attention: bool = False  # the level has self-attention
    resnet_resampling: bool = False  # it resamples within a residual block, as ADM, whatever the config says
    ncsnpp: bool = False  # a level of NCSN++, with the image or the output as a pyramid beside it


DOWN_BLOCKS = {
    "DownBlock2D": BlockType(),
    "AttnDownBlock2D": BlockType(attention=True),
    "ResnetDownsampleBlock2D": BlockType(resnet_resampling=True),
    "SkipDownBlock2D": BlockType(ncsnpp=True),
    "AttnSkipDownBlock2D": BlockType(attention=True, ncsnpp=True),
}


UP_BLOCKS = {
    "UpBlock2D": BlockType(),
    "AttnUpBlock2D": BlockType(attention=True),
    "ResnetUpsampleBlock2D": BlockType(resnet_resampling=True),
    "SkipUpBlock2D": BlockType(ncsnpp=True),
    "AttnSkipUpBlock2D": BlockType(attention=True, ncsnpp=True),
}


CHOICES: dict[str, tuple] = {
    "time_embedding_type": ("positional", "fourier", "learned"),
    "mid_block_type": ("UNetMidBlock2D", None),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None, "timestep", "identity"),
    "act_fn": tuple(ACTIVATIONS),
    "up_attention": ("every", "last"),
    "input_pyramid": (None, "residual"),
}


# The arguments of `DDPMUNet` that `UNet2DModel` does not have, with their defaults. A config keeps other values under
# "_ddpm_hf", and its block types have the prefix: UNet2DModel then refuses it instead of computing something else.
OWN_DEFAULTS: dict[str, Any] = {
    "num_attention_heads": None,
    "up_attention_heads": None,
    "sinusoid_dim": None,
    "up_attention": "every",
    "block_scale_factor": 1,
    "resample_shortcut": False,
    "fir_resampling": False,
    "input_pyramid": None,
    "sigma_table": None,
    "fourier_features": None,
}


OWN_PREFIX = "DDPM"


# What the arguments of `DDPMUNet` and `NoisyClassifier` may be: beyond these ranges a config is a mistake, or hostile.
CHANNELS = "[1, 65536]"


NETWORK_RANGES: dict[str, str | tuple | None] = CHOICES | {
    "act_fn": None,  # in upper or lower case, as in diffusers: see _check_activation
    "sample_size": "[1, 65536]",
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "time_embedding_dim": CHANNELS,
    "freq_shift": "[0, 65536]",
    "block_out_channels": CHANNELS,
    "layers_per_block": "[1, 64]",
    "mid_block_scale_factor": "[0.001, 1000]",
    "downsample_padding": "[0, 1]",
    "dropout": "[0, 1)",
    "attention_head_dim": CHANNELS,
    "norm_num_groups": CHANNELS,
    "attn_norm_num_groups": CHANNELS,
    "norm_eps": "(0, 1]",
    "num_class_embeds": "[1, 100000000]",
    "num_train_timesteps": "[1, 100000]",
    **dict.fromkeys(("num_attention_heads", "up_attention_heads", "sinusoid_dim"), CHANNELS),
    "block_scale_factor": "[0.001, 1000]",
    "sigma_table": "(0, 1000000]",
    "fourier_features": "[0, 16]",
}


MAX_LEVELS = 16


MAX_PARAMETERS = 2 * 10**10  # compared with `parameters_upper_bound`


def plain_names(block_types: tuple[str, ...]) -> list[str]:
    """Names of block types without `OWN_PREFIX`, and without the prefix that they had in configs of 2022."""
    return [name.removeprefix(OWN_PREFIX).removeprefix("UNetRes") for name in block_types]


def block_types_down(config: dict) -> list[BlockType]:
    """The levels of the way down, the finest first; all names must be known."""
    return [DOWN_BLOCKS[name] for name in plain_names(config["down_block_types"])]


def block_types_up(config: dict) -> list[BlockType]:
    """The levels of the way up, the coarsest first; none for a network without a way up."""
    return [UP_BLOCKS[name] for name in plain_names(config.get("up_block_types", ()))]


def has_ncsnpp_levels_only(config: dict) -> bool:
    """Whether all levels are of NCSN++, which have groups of their own whatever `norm_num_groups` says."""
    return all(level.ncsnpp for level in (*block_types_down(config), *block_types_up(config)))


def check_config(config: dict, network: str) -> None:
    """Checks that a network can be built from a config whose values are each within `NETWORK_RANGES`.

    Args:
        config: all keys of `DDPMUNet`; without `up_block_types` where there is no way up.
        network: the name of the class, for messages.

    Raises:
        ValueError: it cannot; one line that names the key, the value and what is supported.
    """
    _check_activation(config)
    _check_number_of_levels(config)
    _check_block_types(config, network)
    _check_number_of_parameters(config)
    _check_time_embedding(config)
    _check_sigma_table(config)
    _check_fourier_features(config)
    _check_ncsnpp_levels(config)
    _check_groups(config)
    _check_heads(config)


def parameters_upper_bound(config: dict) -> int:
    """An upper bound of the number of parameters: a network of this config has a quarter to a half as many."""
    channels, layers = config["block_out_channels"], config["layers_per_block"]
    features = config["sinusoid_dim"] or channels[0]
    widest, embedding = max(channels), config["time_embedding_dim"] or 4 * features
    # a level's blocks on both ways, those that resample, and the middle's; an input beside its skip connection is the widest
    blocks = sum((2 * layers + 3) * c * (20 * widest + 13 * c + 2 * embedding) for c in (*channels, channels[-1]))
    tables = (config["num_class_embeds"] or 0) * embedding + (config["num_train_timesteps"] or 0) * features
    planes = config["in_channels"] * (2 + 2 * len(config["fourier_features"] or ()))  # twice: the input pyramid's
    convolutions = 9 * channels[0] * (planes + config["out_channels"])
    return blocks + tables + convolutions + 6 * embedding * (features + embedding)


def _check_activation(config):
    if config["act_fn"].lower() not in ACTIVATIONS:
        raise ValueError(f"act_fn={shown(config['act_fn'])} is not known; choose one of {', '.join(ACTIVATIONS)}")


def _check_number_of_levels(config):
    count = len(config["block_out_channels"])
    if not 1 <= count <= MAX_LEVELS:
        raise ValueError(f"block_out_channels has {count} entries; give 1 to {MAX_LEVELS}, one for each level")


def _check_block_types(config, network):
    level_count = len(config["block_out_channels"])
    for key, block_types in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
        if key not in config:
            continue
        names = plain_names(config[key])
        if len(names) != level_count:
            raise ValueError(
                f"{key} has {len(names)} entries and block_out_channels {level_count}; give one for each level in both"
            )
        unknown = next((name for name in names if name not in block_types), None)
        if unknown is not None:
            raise ValueError(
                f"{key} names {shown(unknown)}, not supported by {network}; supported: {', '.join(block_types)}"
            )


def _check_number_of_parameters(config):
    parameters = parameters_upper_bound(config)
    if parameters > MAX_PARAMETERS:
        sizes = ("block_out_channels", "layers_per_block", "time_embedding_dim", "sinusoid_dim", "num_class_embeds")
        raise ValueError(
            f"{', '.join(f'{key}={shown(config[key])}' for key in sizes)} make up to {parameters:.1e} parameters; "
            f"{MAX_PARAMETERS:.0e} is the limit; choose smaller sizes"
        )


def _check_time_embedding(config):
    width_key = "block_out_channels[0]" if config["sinusoid_dim"] is None else "sinusoid_dim"
    kind, half = config["time_embedding_type"], (config["sinusoid_dim"] or config["block_out_channels"][0]) // 2
    if kind == "learned" and config["num_train_timesteps"] is None:
        raise ValueError("time_embedding_type='learned' needs num_train_timesteps (the size of its table), got None")
    if kind == "positional" and half <= config["freq_shift"]:
        raise ValueError(
            f"freq_shift={config['freq_shift']} must be below {half}, half of {width_key}, the number of features of a time"
        )


def _check_sigma_table(config):
    table = config["sigma_table"]
    if table is None:
        return
    sigma_min, sigma_max, count = table
    if sigma_min >= sigma_max or count not in range(2, 100_001):
        raise ValueError(
            f"sigma_table={shown(table)} must be (sigma_min, sigma_max, count): a lower and a higher noise level, and an "
            "integer in [2, 100000]"
        )
    if config["time_embedding_type"] != "positional":
        raise ValueError(
            f"sigma_table={shown(table)} needs time_embedding_type='positional', got {config['time_embedding_type']!r}"
        )


def _check_fourier_features(config):
    exponents = config["fourier_features"]
    if exponents is not None and not 1 <= len(set(exponents)) == len(exponents) <= 8:
        raise ValueError(
            f"fourier_features={shown(exponents)} must be 1 to 8 different exponents, as (7, 8), or None for no features"
        )


def _check_ncsnpp_levels(config):
    """Levels of NCSN++ resample an image of 3 channels and hand it to the next level, which must be one, too."""
    for key, levels, place, channels_key in (
        ("down_block_types", block_types_down(config)[:-1], "first", "in_channels"),
        ("up_block_types", block_types_up(config), "last", "out_channels"),
    ):
        ncsnpp = [level.ncsnpp for level in levels]
        if ncsnpp != sorted(ncsnpp, reverse=place == "first"):
            raise ValueError(
                f"{key}={shown(config[key])} must have its Skip blocks {place}: other blocks do not resample the image "
                "that Skip blocks hand on"
            )
        if any(ncsnpp[: len(config["block_out_channels"]) - 1]) and config[channels_key] != 3:
            raise ValueError(
                f"{channels_key}={config[channels_key]} must be 3 with the Skip blocks of {key}; "
                "set 3 or use other blocks"
            )
    if config["input_pyramid"] is not None and any(level.ncsnpp for level in block_types_down(config)):
        raise ValueError(
            f"input_pyramid={config['input_pyramid']!r} is for levels without a pyramid of their own, but down_block_types="
            f"{shown(config['down_block_types'])} has Skip blocks; use other blocks"
        )


def _check_groups(config):
    channels, groups = tuple(config["block_out_channels"]), config["norm_num_groups"]
    normed = channels
    if has_ncsnpp_levels_only(config):  # norm_num_groups is for the output and the middle
        normed = channels[:1] if config["mid_block_type"] is None else channels[:1] + channels[-1:]
    if groups is not None and any(c % groups for c in normed):  # None: see `BlockFactory`
        raise ValueError(f"norm_num_groups={groups} must divide each of {normed} of block_out_channels")
    mid_groups = config["attn_norm_num_groups"]
    if mid_groups is not None and channels[-1] % mid_groups:
        raise ValueError(
            f"attn_norm_num_groups={mid_groups} must divide the last of block_out_channels, {channels[-1]}"
        )


def _check_heads(config):
    channels, head_dim = config["block_out_channels"], config["attention_head_dim"]
    down = [c for c, level in zip(channels, block_types_down(config)) if level.attention]
    up = [c for c, level in zip(reversed(channels), block_types_up(config)) if level.attention]
    if config["mid_block_type"] is not None and config["add_attention"]:
        down.append(channels[-1])
    key_up = "num_attention_heads" if config["up_attention_heads"] is None else "up_attention_heads"
    by_dim = []  # channels of the levels whose heads have attention_head_dim channels
    for key, attention in (("num_attention_heads", down), (key_up, up)):
        heads = config[key]
        by_dim += attention if heads is None else []
        if heads is not None and any(c % heads for c in attention):
            raise ValueError(f"{key}={heads} must divide the channels of each level with attention, {attention}")
    if head_dim is not None and any(head_dim > c for c in by_dim):
        raise ValueError(
            f"attention_head_dim={head_dim} must be 1 to {min(by_dim)}, the fewest channels of a level with attention"
        )
