"""Checkpoints of OpenAI's improved-diffusion and guided-diffusion: networks, upsamplers and classifiers.

IDDPM (Nichol & Dhariwal 2021) and ADM (Dhariwal & Nichol 2021). Both code bases name their tensors alike. Options have the
names of their command-line flags.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping

import torch

from ddpm_hf.original.description import Description, UnsupportedNetwork
from ddpm_hf.original.options import OPENAI, Options
from ddpm_hf.original.pairs import (
    POINTWISE_1D,
    POINTWISE_2D,
    TRANSPOSED,
    Pair,
    count_numbered,
    fused_qkv_pairs,
    module_pairs,
    parameter_pairs,
)

CODE_BASE_NAMES = OPENAI  # the key in `options.OPTIONS_OF`

# ours -> theirs
RESIDUAL_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def is_recognized(names: Collection[str]) -> bool:
    """Whether tensors of these names are of these code bases."""
    return "input_blocks.0.0.weight" in names and "middle_block.0.in_layers.0.weight" in names


def describe(tensors: Mapping[str, torch.Tensor], options: Options) -> Description:
    """Infers the network from names and shapes; the rest is taken from the options.

    Raises:
        UnsupportedNetwork: an option contradicts the tensors, or the variant is not supported.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    classifies = not any(name.startswith("output_blocks.") for name in shapes)
    levels, blocks, resamples_by_resnet = _structure(shapes, options)
    channels = [_width(shapes, 1 + level * (blocks + 1)) for level in range(levels)]
    attention = [f"input_blocks.{1 + level * (blocks + 1)}.1.qkv.weight" in shapes for level in range(levels)]
    emb_dim, sinusoid = shapes["time_embed.0.weight"]
    widths = [c for c, attends in zip(channels, attention) if attends] + [channels[-1]]
    config = {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "block_out_channels": channels,
        "layers_per_block": blocks,
        "down_block_types": _block_types(attention, "Down", resamples_by_resnet),
        "downsample_type": "resnet" if resamples_by_resnet else "conv",
        "resnet_time_scale_shift": "scale_shift" if _has_scale_shift(shapes) else "default",
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "dropout": options.get("dropout", 0.0),
        **_heads(options, widths, classifies),
    }
    if sinusoid != channels[0]:
        config["sinusoid_dim"] = sinusoid
    if emb_dim != 4 * sinusoid:
        raise UnsupportedNetwork(f"time_embed.0 has {emb_dim} outputs; 4 times its {sinusoid} inputs are supported")
    if classifies:
        return _classifier(shapes, options, config)
    config |= {
        "up_block_types": _block_types(attention[::-1], "Up", resamples_by_resnet),
        "upsample_type": config["downsample_type"],
        "attn_norm_num_groups": 32,
        "out_channels": shapes["out.2.weight"][0],
        "num_class_embeds": shapes["label_emb.weight"][0] if "label_emb.weight" in shapes else None,
    }
    both, out_channels = config["in_channels"], config["out_channels"]
    # an upsampler takes the low-resolution image beside its own
    upsamples = "small_size" in options or (both in (2, 6) and out_channels in (both // 2, both))
    image_channels = both // 2 if upsamples else both
    if out_channels not in (image_channels, 2 * image_channels) or (upsamples and both % 2):
        raise UnsupportedNetwork(
            f"its network takes {both} channels and gives {out_channels}; those of an image, or twice as many, are "
            f"supported{'; leave out small_size' if 'small_size' in options else ''}"
        )
    config["sample_size"] = options.required("image_size")
    _require_order(options, config)
    return Description(
        network="DDPMUNet",
        config=config,
        scheduler="VariationalDDPMScheduler",
        scheduler_config=_scheduler(options, learns_variance=out_channels == 2 * image_channels),
        low_resolution=options.required("small_size") if upsamples else None,
    )


def pairs(config: Mapping, options: Mapping, names: Collection[str]) -> Iterator[Pair]:
    """Pairs of all tensors, in the original order. Leave out those for modules that this network lacks.

    Args:
        config: of `DDPMUNet` or `NoisyClassifier`.
        options: as of `describe`.
        names: the names of our tensors.
    """
    levels, blocks = len(config["block_out_channels"]), config["layers_per_block"]
    channels = config["block_out_channels"]
    yield from parameter_pairs("time_embedding.linear_1", "time_embed.0")
    yield from parameter_pairs("time_embedding.linear_2", "time_embed.2")
    yield Pair("label_emb.weight", ("class_embedding.weight",))
    yield from parameter_pairs("conv_in", "input_blocks.0.0")
    place = 0
    for level in range(levels):
        ours = f"down_blocks.{level}"
        for j in range(blocks):
            place += 1
            yield from module_pairs(f"{ours}.resnets.{j}", f"input_blocks.{place}.0", RESIDUAL_BLOCK)
            yield from _attention(f"{ours}.attentions.{j}", f"input_blocks.{place}.1", config, options, channels[level])
        if level + 1 < levels:
            place += 1
            yield from module_pairs(f"{ours}.downsamplers.0", f"input_blocks.{place}.0", RESIDUAL_BLOCK)
            yield from parameter_pairs(f"{ours}.downsamplers.0.conv", f"input_blocks.{place}.0.op")
    yield from module_pairs("mid_block.resnets.0", "middle_block.0", RESIDUAL_BLOCK)
    yield from _attention("mid_block.attentions.0", "middle_block.1", config, options, channels[-1])
    yield from module_pairs("mid_block.resnets.1", "middle_block.2", RESIDUAL_BLOCK)
    if "pool" in config:
        yield from _classifier_head(config["pool"])
        return
    for level in range(levels):
        ours, c = f"up_blocks.{level}", channels[levels - 1 - level]
        for j in range(blocks + 1):
            theirs = f"output_blocks.{level * (blocks + 1) + j}"
            yield from module_pairs(f"{ours}.resnets.{j}", f"{theirs}.0", RESIDUAL_BLOCK)
            yield from _attention(f"{ours}.attentions.{j}", f"{theirs}.1", config, options, c, going_up=True)
        if level + 1 < levels:
            theirs = f"{theirs}.{2 if f'{ours}.attentions.{blocks}.to_q.weight' in names else 1}"
            yield from module_pairs(f"{ours}.upsamplers.0", theirs, RESIDUAL_BLOCK)
            yield from parameter_pairs(f"{ours}.upsamplers.0.conv", f"{theirs}.conv")
    yield from parameter_pairs("conv_norm_out", "out.0")
    yield from parameter_pairs("conv_out", "out.2")


def _attention(ours, theirs, config, options, channels, going_up=False):
    heads = config.get("num_attention_heads") or channels // (config["attention_head_dim"] or channels)
    if going_up:
        heads = config.get("up_attention_heads") or heads
    heads = 1 if options.get("use_new_attention_order") else heads
    yield from parameter_pairs(f"{ours}.group_norm", f"{theirs}.norm")
    yield from fused_qkv_pairs(ours, f"{theirs}.qkv", heads)
    yield from parameter_pairs(f"{ours}.to_out.0", f"{theirs}.proj_out", POINTWISE_1D)


def _classifier_head(pool):
    yield from parameter_pairs("conv_norm_out", "out.0")
    if pool == "average":
        yield from parameter_pairs("head.to_out", "out.3", POINTWISE_2D)
        return
    yield Pair("out.2.positional_embedding", ("head.positional_embedding",), TRANSPOSED)
    yield from fused_qkv_pairs("head", "out.2.qkv_proj", heads=1)  # always in the new order
    yield from parameter_pairs("head.to_out", "out.2.c_proj", POINTWISE_1D)


def _structure(shapes, options):
    """The number of resolution levels, of residual blocks in each, and whether residual blocks resample."""
    count = count_numbered(r"input_blocks\.(\d+)\.", shapes)
    absent = [i for i in range(1, count) if f"input_blocks.{i}.0.in_layers.2.weight" not in shapes]
    halvings = [i for i in absent if f"input_blocks.{i}.0.op.weight" in shapes]
    if len(halvings) < len(absent):
        raise UnsupportedNetwork("conv_resample=False (resampling without convolutions) is not supported")
    doublings = {
        name.split(".")[1]
        for name in shapes
        if re.match(r"output_blocks\.\d+\.[12]\.(conv|in_layers\.2)\.weight", name)
    }
    up_count = len({name.split(".")[1] for name in shapes if name.startswith("output_blocks.")})
    if halvings or doublings or up_count:
        levels = len(halvings or doublings) + 1
        if up_count and len(doublings) != levels - 1:
            raise UnsupportedNetwork("conv_resample=False (resampling without convolutions) is not supported")
        if count % levels:
            raise UnsupportedNetwork(
                f"its {count} input blocks are not {levels} resolution levels of equally many blocks"
            )
        return levels, count // levels - 1, bool(doublings) and not halvings
    # a classifier whose residual blocks resample: the levels are where widths and attention may change
    fitting = [n for n in range(1, count) if count % (n + 1) == 0 and _levels_fit(shapes, count // (n + 1), n)]
    if len(fitting) > 1 and "out.2.positional_embedding" in shapes and "image_size" in options:
        fitting = [n for n in fitting if _pool_size(shapes, count // (n + 1)) == options["image_size"]]
    if len(fitting) > 1:
        if "num_res_blocks" not in options:
            options.report_missing("num_res_blocks")
        fitting = [n for n in fitting if n == options.get("num_res_blocks", fitting[-1])]
    if not fitting:
        blocks, size = options.get("num_res_blocks", "as many"), options.get("image_size", "some")
        raise UnsupportedNetwork(
            f"its {count} input blocks are not levels of {blocks} residual blocks for {size} pixels"
        )
    return count // (fitting[0] + 1), fitting[0], True


def _pool_size(shapes, levels):
    """Side of the images of a classifier with an attention pool."""
    return math.isqrt(shapes["out.2.positional_embedding"][1] - 1) * 2 ** (levels - 1)


def _levels_fit(shapes, levels, blocks):
    attends = [f"input_blocks.{i}.1.qkv.weight" in shapes for i in range(levels * (blocks + 1))]
    for level in range(levels):
        first = 1 + level * (blocks + 1)
        places = range(first, first + blocks)
        halving = first + blocks
        if len({(_width(shapes, i), attends[i]) for i in places}) > 1:
            return False
        if level + 1 < levels and (attends[halving] or _width(shapes, halving) != _width(shapes, first)):
            return False
    return True


def _width(shapes, place):
    return shapes[f"input_blocks.{place}.0.in_layers.2.weight"][0]


def _has_scale_shift(shapes):
    return shapes["input_blocks.1.0.emb_layers.1.weight"][0] == 2 * _width(shapes, 1)


def _block_types(attention, way, resamples_by_resnet):
    resampling = {"Down": "ResnetDownsampleBlock2D", "Up": "ResnetUpsampleBlock2D"}[way]
    plain = resampling if resamples_by_resnet else f"{way}Block2D"
    return [f"Attn{way}Block2D" if attends else plain for attends in attention]


def _heads(options, attention, classifies):
    """Keys of the config: attention_head_dim if that suffices, because UNet2DModel has it; else num_attention_heads.

    attention: channels of each level with attention, and of the middle.
    """
    head_dim = options.get("num_head_channels", -1)
    if "num_heads" not in options and head_dim == -1:
        options.report_missing("num_heads or num_head_channels")
        options.required("use_new_attention_order")
    if head_dim != -1:
        _check_divides("num_head_channels", head_dim, attention)
        return {"attention_head_dim": head_dim}
    heads, up_heads = options.get("num_heads", 1), options.get("num_heads_upsample", -1)
    _check_divides("num_heads", heads, attention)
    up = {}
    if up_heads not in (-1, heads) and not classifies:
        _check_divides("num_heads_upsample", up_heads, attention[:-1])
        up = {"up_attention_heads": up_heads}
    if up or (heads > 1 and len(set(attention)) > 1):
        return {"num_attention_heads": heads, "attention_head_dim": None, **up}
    return {"attention_head_dim": None if heads == 1 else attention[0] // heads}


def _check_divides(option, number, attention):
    wrong = next((c for c in attention if number < 1 or c % number), None)
    if wrong:
        raise UnsupportedNetwork(f"{option}={number} does not divide the {wrong} channels of an attention")


def _require_order(options, config):
    has_one_head = config["attention_head_dim"] is None and config.get("num_attention_heads") is None
    if not has_one_head:  # with one head, both orders are the same
        options.required("use_new_attention_order")


def _scheduler(options, learns_variance):
    T, schedule = options.required("diffusion_steps"), options.required("noise_schedule")
    scaled = "linear_scaled_by_T" if schedule == "linear" and T != 1000 else schedule
    config = {
        "num_train_timesteps": T,
        "beta_schedule": scaled,
        "variance_type": "learned_range" if learns_variance else "fixed_large",
        "timestep_spacing": "iddpm",
        "clip_sample": True,
    }
    return config | ({"rescale_timesteps": True} if options.required("rescale_timesteps") and T != 1000 else {})


def _classifier(shapes, options, config):
    if "out.0.weight" in shapes and len(shapes["out.0.weight"]) == 2:
        raise UnsupportedNetwork(
            "classifier_pool='spatial' and 'spatial_v2' are not supported; 'attention' and 'adaptive' are"
        )
    if "out.2.positional_embedding" in shapes:
        config["sample_size"], pool = _pool_size(shapes, len(config["block_out_channels"])), "attention"
        if options.get("image_size", config["sample_size"]) != config["sample_size"]:
            raise UnsupportedNetwork(
                f"image_size={options['image_size']}, but its pool is for {config['sample_size']} pixels"
            )
        if options.get("num_head_channels", -1) == -1 and "num_heads" in options:
            options.report_missing("num_head_channels")  # the pool of the original code has no other number of heads
    else:
        config["sample_size"], pool = options.required("image_size"), "average"
    config |= {"pool": pool, "num_classes": shapes["out.2.c_proj.weight" if pool == "attention" else "out.3.weight"][0]}
    _require_order(options, config)
    scheduler = _scheduler(options, learns_variance=False)
    del scheduler["variance_type"]
    return Description("NoisyClassifier", config | {"scheduler": scheduler}, "VariationalDDPMScheduler", scheduler)
