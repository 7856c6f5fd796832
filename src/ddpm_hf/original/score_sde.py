"""Checkpoints of score_sde_pytorch (Song et al. 2020, "Score-SDE"): the networks ddpm, DDPM++ and NCSN++.

All modules of a network are one flat list, `all_modules`. Options have the names of the original configurations.
"""

import re
from collections.abc import Collection, Iterator, Mapping

import numpy as np
import torch

from ddpm_hf.original.description import Description, UnsupportedNetwork
from ddpm_hf.original.options import SONG, Options
from ddpm_hf.original.pairs import TRANSPOSED, TRANSPOSED_TO_2D, Pair, module_pairs, parameter_pairs

SQRT_2 = 2**0.5

CODE_BASE_NAMES = SONG  # the key in `options.OPTIONS_OF`

# ours -> theirs; the shortcut is NIN_0 in blocks of ddpm, and Conv_2 in those of BigGAN
RESIDUAL_BLOCK = {
    "norm1": "GroupNorm_0",
    "conv1": "Conv_0",
    "time_emb_proj": "Dense_0",
    "norm2": "GroupNorm_1",
    "conv2": "Conv_1",
}
ATTENTION = {"to_q": "NIN_0", "to_k": "NIN_1", "to_v": "NIN_2", "to_out.0": "NIN_3"}
NIN = {"weight": "W", "bias": "b"}


def is_recognized(names: Collection[str]) -> bool:
    """Whether tensors of these names are of this code base."""
    return "all_modules.0.weight" in names or "all_modules.0.W" in names


class _Module(dict):
    """An entry of `all_modules`: the shapes of its tensors by name."""

    @property
    def is_block(self):
        return "Dense_0.weight" in self

    @property
    def is_attention(self):
        return "NIN_3.W" in self

    @property
    def kernel(self):
        """The shape of the first convolution of a residual block, or of a module that is only a convolution."""
        return self.get("Conv_0.weight") or self.get("Conv2d_0.weight")

    @property
    def keeps_channels(self):
        return self.kernel[0] == self.kernel[1]

    @property
    def resamples(self):
        """Whether it is a residual block of BigGAN that resamples: its shortcut is a convolution though channels stay."""
        return self.is_block and "Conv_2.weight" in self and self.keeps_channels


def describe(tensors: Mapping[str, torch.Tensor], options: Options) -> Description:
    """Infers the network from names, shapes and the table of noise levels; the rest is taken from the options.

    Raises:
        UnsupportedNetwork: an option contradicts the tensors, or the variant is not supported.
    """
    modules = _modules(tensors)
    fourier = "W" in modules[0]
    embedding = [module["weight"] for module in modules[fourier : fourier + 3] if "weight" in module]
    if [len(shape) for shape in embedding] != [2, 2, 4]:
        raise UnsupportedNetwork("conditional=False (a network without a time embedding) is not supported")
    width, image_channels = embedding[2][:2]
    expected = (4 * width, (2 if fourier else 1) * width)
    if embedding[0] != expected:
        raise UnsupportedNetwork(f"its time embedding has the shape {embedding[0]}, not {expected}; not supported")
    body = modules[fourier + 3 :]
    convolutions = [module for module in body if module.kernel and not module.is_block]
    biggan = any("Conv_2.weight" in module for module in body)
    if biggan:
        halvings, pyramid = [module for module in body if module.resamples], convolutions
    else:
        halvings, pyramid = convolutions, []
        if any("Conv2d_0.weight" in module for module in convolutions):
            raise UnsupportedNetwork(
                "fir=True with resblock_type='ddpm' is not supported; the original code cannot run it either"
            )
        if not all(module.keeps_channels for module in convolutions):
            raise UnsupportedNetwork("progressive_input with resblock_type='ddpm' is not supported")
    blocks = [module for module in body if module.is_block and not module.resamples]
    levels = len(halvings) // 2 + 1
    per_level = ((len(blocks) - 2) // levels - 1) // 2
    if per_level < 1 or len(blocks) != (2 * per_level + 1) * levels + 2:
        raise UnsupportedNetwork(
            f"its {len(blocks)} residual blocks are not {levels} resolution levels of equally many blocks"
        )
    first = [blocks[level * per_level] for level in range(levels)]
    channels = [module.kernel[0] for module in first]
    if channels[0] != width:
        raise UnsupportedNetwork("ch_mult whose first number is not 1 is not supported")
    if pyramid and first[1].kernel[1] != width:
        raise UnsupportedNetwork("progressive_combine='cat' is not supported; 'sum' is")
    places = {id(module): place for place, module in enumerate(body)}
    attention = [body[places[id(module)] + 1].is_attention for module in first]
    output_skip = sum(len(module.get("weight", ())) == 4 for module in body) > 1

    config = {
        "sample_size": options.required("image_size"),
        "in_channels": image_channels,
        "out_channels": image_channels,
        "block_out_channels": channels,
        "layers_per_block": per_level,
        "attention_head_dim": None,
        "norm_eps": 1e-6,
        "dropout": options.get("dropout", 0.0),
        **({"time_embedding_type": "fourier"} if fourier else {"flip_sin_to_cos": False, "freq_shift": 1}),
        **_levels(options, attention, biggan, pyramid, output_skip, channels, fourier),
    }
    scheduler, scheduler_config, network_keys = _process(tensors.get("sigmas"), options, fourier)
    return Description("DDPMUNet", config | network_keys, scheduler, scheduler_config)


def _modules(tensors):
    entries: dict[int, _Module] = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"all_modules\.(\d+)\.(.+)", name):
            entries.setdefault(int(match[1]), _Module())[match[2]] = tuple(tensor.shape)
    if sorted(entries) != list(range(len(entries))):
        raise UnsupportedNetwork(
            "all_modules has gaps: resamp_with_conv=False (resampling without convolutions) is not supported"
        )
    return [entries[place] for place in range(len(entries))]


def _levels(options, attention, biggan, pyramid, output_skip, channels, fourier):
    """Keys of the config that say what the resolution levels are made of."""
    input_skip = bool(pyramid) and pyramid[0].kernel[2] == 1
    if input_skip != output_skip:
        raise UnsupportedNetwork(
            "only one of progressive='output_skip' and progressive_input='input_skip' is not supported; both are"
        )
    skip = "Skip" if output_skip else ""
    down, up = ("ResnetDownsample", "ResnetUpsample") if biggan and not output_skip else (f"{skip}Down", f"{skip}Up")
    keys = {
        "down_block_types": [f"Attn{skip}DownBlock2D" if attends else f"{down}Block2D" for attends in attention],
        "up_block_types": [f"Attn{skip}UpBlock2D" if attends else f"{up}Block2D" for attends in attention[::-1]],
    }
    is_ncsnpp = biggan or fourier or output_skip
    model = options.get("model", "ncsnpp") if is_ncsnpp else options.required("model")
    if is_ncsnpp and model != "ncsnpp":
        raise UnsupportedNetwork(f"model={model!r}, but its blocks or its embedding are those of 'ncsnpp'")
    if model == "ddpm":
        return keys | {"norm_num_groups": 32, "downsample_padding": 0, "up_attention": "last"}
    rescales = options.required("skip_rescale")
    keys |= {"norm_num_groups": None, "mid_block_scale_factor": SQRT_2 if rescales else 1}
    if output_skip:
        if not rescales or options.get("fir") is False:
            raise UnsupportedNetwork("progressive='output_skip' is supported with fir=True and skip_rescale=True only")
        narrow = [c for c, attends in zip(channels, attention) if attends and c < 128]
        if narrow:
            raise UnsupportedNetwork(
                f"attention at {narrow[0]} channels with progressive='output_skip' is not supported; 128 or more are"
            )
        return keys
    keys |= {"up_attention": "last", "block_scale_factor": SQRT_2 if rescales else 1}
    if not biggan:
        if options.get("fir") and len(channels) > 1:
            raise UnsupportedNetwork("fir=True, but its resampling convolutions have no FIR filter")
        return keys | {"downsample_padding": 0}
    keys |= {"downsample_type": "resnet", "upsample_type": "resnet", "resample_shortcut": True}
    if pyramid:
        fir = "Conv2d_0.weight" in pyramid[0]
        if options.get("fir", fir) != fir:
            raise UnsupportedNetwork(
                f"fir={options['fir']}, but its input pyramid has {'a' if fir else 'no'} FIR filter"
            )
        return keys | {"fir_resampling": fir, "input_pyramid": "residual"}
    return keys | {"fir_resampling": options.required("fir")}


def _process(sigmas, options, fourier):
    """The scheduler's class and config, and keys of the network that follow from the process."""
    sde = options.get("sde", "vesde") if fourier else options.required("sde")
    continuous = options.get("continuous", True) if fourier or sde == "subvpsde" else options.required("continuous")
    centered = options.get("centered", sde != "vesde")
    if (sde != "vesde" or not continuous) and fourier:
        raise UnsupportedNetwork(
            f"Fourier features with sde={sde!r}, continuous={continuous} are not supported; vesde, True is"
        )
    if sde == "vesde" and continuous and not fourier:
        raise UnsupportedNetwork(
            "sde='vesde', continuous=True without Fourier features is not supported; continuous=False is"
        )
    if sde != "vesde" and not centered:
        raise UnsupportedNetwork(
            f"centered=False (images in [0, 1]) with sde={sde!r} is not supported; with vesde it is"
        )
    if options.get("scale_by_sigma", sde == "vesde") != (sde == "vesde"):
        raise UnsupportedNetwork(f"scale_by_sigma={options['scale_by_sigma']} with sde={sde!r} is not supported")
    table = _table_of(sigmas, options)
    N = table[2]
    network_keys = {} if centered else {"center_input_sample": True}
    if sde == "vesde":
        config = {
            "num_train_timesteps": N,
            "sigma_min": table[0],
            "sigma_max": table[1],
            "centered": centered,
            "snr": options.get("snr", 0.16),
        }
        if not continuous:
            if sigmas is not None and not sigmas.is_meta and not torch.allclose(sigmas.double(), noise_levels(options)):
                raise UnsupportedNetwork("its noise levels are not in geometric steps, which is not supported")
            config["conditioning"], network_keys["sigma_table"] = "level_index", table
        return "VESDEScheduler", config, network_keys
    beta_min, beta_max = options.get("beta_min", 0.1), options.get("beta_max", 20.0)
    if continuous:
        if N != 1000:
            raise UnsupportedNetwork(
                f"num_scales={N} in continuous time is not supported: the network is given 999 t; num_scales=1000 is"
            )
        config = {"num_train_timesteps": N, "beta_min": beta_min, "beta_max": beta_max, "predictor": "euler_maruyama"}
        return {"vpsde": "VPSDEScheduler", "subvpsde": "SubVPSDEScheduler"}[sde], config, network_keys
    config = {
        "num_train_timesteps": N,
        "beta_start": beta_min / N,
        "beta_end": beta_max / N,
        "variance_type": "fixed_large",
        "timestep_spacing": "iddpm",
        "clip_sample": False,
    }
    return "VariationalDDPMScheduler", config, network_keys


def _table_of(sigmas, options):
    """(sigma_min, sigma_max, number) of the table of noise levels, which a checkpoint of any process holds."""
    if sigmas is None or sigmas.is_meta:
        return [options.get("sigma_min", 0.01), options.get("sigma_max", 50.0), options.get("num_scales", 1000)]
    if sigmas.dim() != 1 or not sigmas.is_floating_point() or not sigmas.isfinite().all():
        raise UnsupportedNetwork(
            f"its table of noise levels is {sigmas.dtype} of the shape {tuple(sigmas.shape)}, or not finite"
        )
    first, last = (float(f"{sigmas[i].item():.10g}") for i in (0, -1))
    table = [last, first, len(sigmas)]
    for name, value in zip(("sigma_min", "sigma_max", "num_scales"), table):
        if options.setdefault(name, value) != value:
            raise UnsupportedNetwork(f"{name}={options[name]}, but its table of noise levels has {value}")
    return table


def noise_levels(options: Mapping) -> torch.Tensor:
    """The table of noise levels, (num_scales,) float64, falling from sigma_max to sigma_min."""
    sigma_min, sigma_max, count = _table_of(None, options)
    return torch.from_numpy(np.exp(np.linspace(np.log(sigma_max), np.log(sigma_min), count)))


def averages(state: Mapping[str, torch.Tensor], shadow_params: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state with the averages of its parameters, which are stored as a list in the state's order.

    Raises:
        ValueError: there are more or fewer averages than parameters.
    """
    names = averaged_names(state)
    if not all(isinstance(average, torch.Tensor) for average in shadow_params):
        raise ValueError("its averages are no tensors; weights='raw' ignores them")
    if len(names) != len(shadow_params):
        raise ValueError(f"it has {len(shadow_params)} averages of {len(names)} parameters; weights='raw' ignores them")
    if any(state[name].shape != average.shape for name, average in zip(names, shadow_params)):
        raise ValueError("its averages do not have the shapes of its parameters; weights='raw' ignores them")
    return {**state, **dict(zip(names, shadow_params))}


def averaged_names(names: Collection[str]) -> list[str]:
    """The names of the parameters that are averaged: all but the table of noise levels and fixed frequencies."""
    fixed = ("sigmas", "all_modules.0.W")
    return [name for name in names if name not in fixed]


def pairs(config: Mapping, options: Mapping, names: Collection[str]) -> Iterator[Pair]:
    """Pairs of all tensors, in the original order. Leave out those for modules that this network lacks.

    Args:
        config: of `DDPMUNet`.
        options: as of `describe`; not used.
        names: the names of our tensors.
    """
    fourier = config.get("time_embedding_type") == "fourier"
    if fourier:
        yield Pair("all_modules.0.W", ("time_proj.weight",))
    for place, (ours, kind) in enumerate(_order(config), start=int(fourier)):
        theirs = f"all_modules.{place}"
        if kind == "block":
            yield from module_pairs(ours, theirs, RESIDUAL_BLOCK)
            if is_biggan(config):
                yield from parameter_pairs(f"{ours}.conv_shortcut", f"{theirs}.Conv_2")
            else:
                yield from parameter_pairs(f"{ours}.conv_shortcut", f"{theirs}.NIN_0", TRANSPOSED_TO_2D, NIN)
        elif kind == "attention":
            yield from parameter_pairs(f"{ours}.group_norm", f"{theirs}.GroupNorm_0")
            yield from module_pairs(ours, theirs, ATTENTION, TRANSPOSED, NIN)
        else:
            yield from parameter_pairs(ours, f"{theirs}.{kind}" if kind else theirs)


def _order(config):
    """Our modules in the order of `all_modules`: (name, kind); the kind of a plain layer is its name within theirs."""
    levels, blocks = len(config["block_out_channels"]), config["layers_per_block"]
    attends = ["Attn" in name for name in config["down_block_types"]]
    skip_levels, biggan = "Skip" in config["down_block_types"][0], is_biggan(config)
    pyramid_kernel = "Conv2d_0" if config.get("fir_resampling") else "Conv_0"
    yield from (("time_embedding.linear_1", ""), ("time_embedding.linear_2", ""), ("conv_in", ""))
    for level in range(levels):
        ours = f"down_blocks.{level}"
        for j in range(blocks):
            yield f"{ours}.resnets.{j}", "block"
            if attends[level]:
                yield f"{ours}.attentions.{j}", "attention"
        if level + 1 < levels:
            yield _resampling(ours, "down", skip_levels, biggan)
            if skip_levels:
                yield f"{ours}.skip_conv", "Conv_0"
            elif config.get("input_pyramid"):
                yield f"{ours}.pyramid_conv.conv", pyramid_kernel
    yield from (
        ("mid_block.resnets.0", "block"),
        ("mid_block.attentions.0", "attention"),
        ("mid_block.resnets.1", "block"),
    )
    for level in range(levels):
        ours = f"up_blocks.{level}"
        for j in range(blocks + 1):
            yield f"{ours}.resnets.{j}", "block"
        if attends[levels - 1 - level]:
            yield f"{ours}.attentions.0", "attention"
        if level + 1 < levels:
            if skip_levels:
                yield from ((f"{ours}.skip_norm", ""), (f"{ours}.skip_conv", ""))
            yield _resampling(ours, "up", skip_levels, biggan)
    yield from (("conv_norm_out", ""), ("conv_out", ""))


def is_biggan(config: Mapping) -> bool:
    """Whether the residual blocks are those of BigGAN, which resample and whose shortcuts are convolutions."""
    return bool(config.get("resample_shortcut")) or "Skip" in config["down_block_types"][0]


def _resampling(ours, way, skip_levels, biggan):
    if skip_levels:
        return f"{ours}.resnet_{way}", "block"
    module = f"{ours}.{way}samplers.0"
    return (module, "block") if biggan else (f"{module}.conv", "Conv_0")
