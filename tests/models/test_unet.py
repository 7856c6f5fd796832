"""`DDPMUNet` against diffusers' `UNet2DModel`: the same keys, outputs and gradients; each opens the other's files."""

import copy
import inspect
import json
import random
import time

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from safetensors.torch import save_file

from ddpm_hf.models.blocks import ActivatedNorm, FourierEmbedding
from ddpm_hf.models.network_config import CHOICES, DOWN_BLOCKS, OWN_DEFAULTS, UP_BLOCKS, parameters_upper_bound
from ddpm_hf.models.unet import DDPMUNet, time_tensor
from support.unet_configs import ATTENTION, BASE, CIFAR10, LEARNED, NCSNPP, NCSNPP_256, PLAIN, SIX_LEVELS, levels


def random_config(rng):
    n, groups = rng.randint(1, 4), rng.choice((1, 4, 5))
    return {
        "in_channels": rng.randint(1, 4),
        "out_channels": rng.randint(1, 6),
        "center_input_sample": rng.random() < 0.5,
        "time_embedding_type": rng.choice(CHOICES["time_embedding_type"]),
        "time_embedding_dim": rng.choice((None, 23, 64)),
        "freq_shift": rng.choice((0, 1)),
        "flip_sin_to_cos": rng.random() < 0.5,
        "down_block_types": tuple(rng.choice(("", "UNetRes")) + rng.choice(list(DOWN_BLOCKS)[:3]) for _ in range(n)),
        "mid_block_type": rng.choice(("UNetMidBlock2D", "UNetMidBlock2D", None)),
        "up_block_types": tuple(rng.choice(("", "UNetRes")) + rng.choice(list(UP_BLOCKS)[:3]) for _ in range(n)),
        "block_out_channels": tuple(groups * rng.randint(-(-8 // groups), 30 // groups) for _ in range(n)),
        "layers_per_block": rng.randint(1, 3),
        "mid_block_scale_factor": rng.choice((1, 2**0.5)),
        "downsample_padding": rng.choice((0, 1)),
        "downsample_type": rng.choice(CHOICES["downsample_type"]),
        "upsample_type": rng.choice(CHOICES["upsample_type"]),
        "dropout": rng.choice((0.0, 0.3)),
        "act_fn": rng.choice(CHOICES["act_fn"]),
        "attention_head_dim": rng.choice((None, 1, 3, 8)),
        "norm_num_groups": groups,
        "attn_norm_num_groups": rng.choice((None, 1, groups)),
        "norm_eps": rng.choice((1e-6, 1e-5, 0.1)),
        "resnet_time_scale_shift": rng.choice(CHOICES["resnet_time_scale_shift"]),
        "add_attention": rng.random() < 0.7,
        "class_embed_type": (class_embed_type := rng.choice(CHOICES["class_embed_type"])),
        "num_class_embeds": rng.choice((None, 7)) if class_embed_type is None else None,
        "num_train_timesteps": 50,
    }


def random_ncsnpp(rng):
    """Skip blocks, with others within: at the last levels on the way down and the first on the way up."""
    config = random_config(rng)
    n = len(config["block_out_channels"])
    first, last = rng.choice((1, n, n)), rng.choice((0, 0, rng.randint(0, n - 1)))
    kinds = {way: (rng.choices((f"{way}Block2D", f"Attn{way}Block2D"), k=n)) for way in ("Down", "Up")}
    skips = {way: [name.replace(way, f"Skip{way}") for name in names] for way, names in kinds.items()}
    return config | {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": tuple(skips["Down"][:first] + kinds["Down"][first:]),
        "up_block_types": tuple(kinds["Up"][:last] + skips["Up"][last:]),
        "block_out_channels": tuple(32 * rng.randint(1, 2) for _ in range(n)),
        "norm_num_groups": rng.choice((None, 8)) if (first, last) == (n, 0) else 8,
        "attn_norm_num_groups": rng.choice((None, 4)),
        "class_embed_type": None,  # in double precision diffusers takes none of the others
    }


CONFIGS = {
    "cifar10": CIFAR10 | {"block_out_channels": (16, 32, 32, 32), "norm_num_groups": 8},
    "celebahq-church": SIX_LEVELS | {"block_out_channels": (16, 16, 32, 32, 48, 48), "norm_num_groups": 8},
    "adm": {
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "attn_norm_num_groups": 4,
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "num_class_embeds": 7,
    },
    "adm-like": ATTENTION
    | {
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "num_class_embeds": 7,
    },
}
CONFIGS |= {
    "ncsnpp": NCSNPP,
    "ncsnpp-scale-shift": NCSNPP | {"resnet_time_scale_shift": "scale_shift"},
    "ncsnpp-groups": NCSNPP | {"norm_num_groups": 8, "attn_norm_num_groups": 4, "act_fn": "gelu", "dropout": 0.3},
    "ncsnpp-heads": NCSNPP | {"attention_head_dim": 8, "center_input_sample": True, "norm_eps": 0.1},
    "ncsnpp-uneven-groups": NCSNPP
    | {"block_out_channels": (4, 12, 40, 32), "mid_block_type": None, "norm_num_groups": 2}
    | {"down_block_types": ("SkipDownBlock2D",) * 4, "up_block_types": ("SkipUpBlock2D",) * 4},
    "ncsnpp-outside": NCSNPP
    | {"norm_num_groups": 4, "down_block_types": ("SkipDownBlock2D", "SkipDownBlock2D", "AttnDownBlock2D")}
    | {"up_block_types": ("UpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"), "block_out_channels": (32, 32, 32)},
    "ncsnpp-down-rgba-out": NCSNPP | {"norm_num_groups": 4, "out_channels": 4, "up_block_types": ("UpBlock2D",) * 3},
    "ncsnpp-up-rgba-in": NCSNPP | {"norm_num_groups": 4, "in_channels": 4, "down_block_types": ("DownBlock2D",) * 3},
    "base": {},
    "one-level": levels((16,)),
    "three-levels": levels((16, 16, 32)),
    "five-levels": levels((16, 8, 24, 16, 32)),
    "six-levels": levels((8, 8, 16, 16, 24, 24)),
    "narrowing": levels((32, 16, 8)),
    "odd-channels": levels((15, 25), norm_num_groups=5, attention_head_dim=None),
    "prime-channels": levels((13, 17), norm_num_groups=1, freq_shift=1),
    "two-layers": {"layers_per_block": 2},
    "three-layers": {"layers_per_block": 3},
    "rgba-to-mean-and-variance": {"in_channels": 4, "out_channels": 8},
    "attention-everywhere": ATTENTION,
    "attention-down-only": {"up_block_types": ("UpBlock2D",) * 2},
    "attention-up-only": {"down_block_types": ("DownBlock2D",) * 2},
    "2022-names": {
        "down_block_types": ("UNetResDownBlock2D", "UNetResAttnDownBlock2D"),
        "up_block_types": ("UNetResAttnUpBlock2D", "UNetResUpBlock2D"),
    },
    "no-mid-block": {"mid_block_type": None},
    "no-mid-attention": {"add_attention": False},
    "mid-scale": {"mid_block_scale_factor": 2.5},
    "resnet-down": ATTENTION | {"downsample_type": "resnet"},
    "resnet-up": ATTENTION | {"upsample_type": "resnet"},
    "resnet-resampling-plain-blocks": PLAIN | {"downsample_type": "resnet", "upsample_type": "resnet"},
    "resnet-resampling-by-name": {
        "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
        "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
    },
    "asymmetric-padding": {"downsample_padding": 0},
    "dropout": ATTENTION | {"dropout": 0.5, "downsample_type": "resnet", "upsample_type": "resnet"},
    "one-head": {"attention_head_dim": None},
    "head-a-channel": {"attention_head_dim": 1},
    "heads-that-do-not-divide": ATTENTION | {"attention_head_dim": 5},
    "scale-shift": {"resnet_time_scale_shift": "scale_shift"},
    "scale-shift-normed-attention": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 2},
    "mid-attention-groups": {"attn_norm_num_groups": 16},
    "large-eps": {"norm_eps": 0.5},
    "centred": {"center_input_sample": True},
    "cos-first-shifted": {"flip_sin_to_cos": True, "freq_shift": 1},
    "sin-first-unshifted": {"flip_sin_to_cos": False, "freq_shift": 0},
    "wide-time-embedding": {"time_embedding_dim": 100},
    "fourier": {"time_embedding_type": "fourier"},
    "learned": LEARNED,
    "classes": {"num_class_embeds": 7},
    "class-timestep": {"class_embed_type": "timestep"},
    "class-timestep-fourier": {"class_embed_type": "timestep", "time_embedding_type": "fourier"},
    "class-timestep-learned": LEARNED | {"class_embed_type": "timestep"},
    "class-identity": {"class_embed_type": "identity", "time_embedding_dim": 24},
}
CONFIGS |= {f"act-{act}": {"act_fn": act} for act in ("SiLU", "swish", "mish", "gelu", "relu")}
CONFIGS = {name: BASE | config for name, config in CONFIGS.items()}
NAMED = list(CONFIGS)
CONFIGS |= {f"random-{i}": random_config(random.Random(i)) for i in range(20)}


def randomise(net):
    """Every parameter random and of a size that keeps activations near 1; none is left at 0 or 1."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            elif name == "time_proj.weight":  # the frequencies of a fourier embedding
                parameter.copy_(16 * noise)
            else:
                parameter.copy_(0.3 * noise + ("norm" in name and name.endswith("weight")))
    return net


def pair(config, source=UNet2DModel):
    """A network of `source` with random weights, and one of the other class that loaded them."""
    target = {UNet2DModel: DDPMUNet, DDPMUNet: UNet2DModel}[source]
    first, second = randomise(source(**config)), target(**config)
    second.load_state_dict(first.state_dict(), strict=True)
    return first, second


def make_inputs(net, size=None, batch=2):
    """Random arguments of forward; the sample is small and not square unless `size` is given."""
    config, generator = net.config, torch.Generator().manual_seed(2)
    stride = 2 ** (len(config.block_out_channels) - 1)
    k = max(1, 8 // stride)
    size = size or (k * stride, (k + 1) * stride)
    inputs = {"sample": torch.randn(batch, config.in_channels, *size, generator=generator)}

    def labels(table):  # both ends of it
        return torch.linspace(0, table - 1, batch).long()

    def times():
        if config.time_embedding_type == "learned":
            return labels(config.num_train_timesteps)
        if config.time_embedding_type == "fourier":
            return torch.rand(batch, generator=generator) * 5 + 0.2
        return torch.randint(1000, (batch,), generator=generator)

    inputs["timestep"] = times()
    if config.class_embed_type == "timestep":
        inputs["class_labels"] = times().flip(0)
    elif config.class_embed_type == "identity":
        width = net.time_embedding.linear_2.out_features
        inputs["class_labels"] = torch.randn(batch, width, generator=generator)
    elif config.num_class_embeds is not None:
        inputs["class_labels"] = labels(config.num_class_embeds)
    return inputs


def output_and_gradients(net, inputs):
    """The output, and the gradients of a fixed random projection of it; dropout draws from the same seed each time."""
    net.zero_grad()
    sample = inputs["sample"].clone().requires_grad_()
    torch.manual_seed(3)
    output = net(**inputs | {"sample": sample}).sample
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(4)))
    gradients = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    return output.detach(), gradients | {"sample": sample.grad}


@torch.no_grad()
def output(net, inputs):
    return net.eval()(**inputs).sample


def assert_close(actual, expected, tolerance, what="output"):
    """Equal to `tolerance`, relative to the largest entry where that is above 1."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype and expected.isfinite().all(), what
    error, limit = (actual - expected).abs().max().item(), tolerance * max(1, expected.abs().max().item())
    assert error <= limit, f"{what} differs by {error:.1e}; the limit is {limit:.1e}"


def assert_same_results(actual, expected):
    assert_close(actual[0], expected[0], 1e-5)
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert_close(actual[1][name], gradient, 2e-4, name)


def assert_same_weights(net, other):
    ours, theirs = net.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key


# the same network


def test_enough_varied_configs():
    assert len({json.dumps(config, sort_keys=True) for config in CONFIGS.values()}) == len(CONFIGS) >= 40
    configs = [DDPMUNet(**config).config for config in CONFIGS.values()]
    for key in CHOICES.keys() - OWN_DEFAULTS.keys():
        assert {config[key] for config in configs} >= set(CHOICES[key]), key
    for key, blocks in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
        assert {name.removeprefix("UNetRes") for config in configs for name in config[key]} == set(blocks)
    assert {len(config.block_out_channels) for config in configs} == {1, 2, 3, 4, 5, 6}
    assert {config.layers_per_block for config in configs} == {1, 2, 3}
    assert {config.downsample_padding for config in configs} == {0, 1}


@pytest.mark.parametrize("source", [UNet2DModel, DDPMUNet], ids=["theirs-to-ours", "ours-to-theirs"])
@pytest.mark.parametrize("name", CONFIGS)
def test_same_outputs_and_gradients(name, source):
    first, second = pair(CONFIGS[name], source)
    inputs = make_inputs(first)
    for training in (True, False):
        expected = output_and_gradients(first.train(training), inputs)
        assert_same_results(output_and_gradients(second.train(training), inputs), expected)
        for key, gradient in (
            expected[1].items() if name in NAMED else ()
        ):  # no part is idle, which would hide a mistake
            # softmax is blind to a constant added to all keys
            assert key.endswith("to_k.bias") or gradient.abs().max() > 1e-4, f"{key} has no influence"


@pytest.mark.parametrize("act_fn, kept", [("silu", 1), ("gelu", 2)])
def test_what_a_norm_keeps_for_the_way_back(act_fn, kept):
    """The input alone where the activation is SiLU, and the same gradients bit for bit."""
    net = randomise(DDPMUNet(**BASE | {"act_fn": act_fn})).train()
    norm = net.down_blocks[0].resnets[0].norm1
    x = torch.randn(2, norm.num_channels, 16, 16, requires_grad=True)
    large = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: large.append(v.numel() >= x.numel()) or v, lambda v: v):
        y = norm(x)
    assert sum(large) == kept
    gradient = torch.randn_like(x)
    expected = norm.act(F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps))
    assert torch.equal(y, expected)
    inputs = (x, norm.weight, norm.bias)
    for actual, other in zip(torch.autograd.grad(y, inputs, gradient), torch.autograd.grad(expected, inputs, gradient)):
        assert torch.equal(actual, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_under_autocast_and_with_frozen_weights(dtype):
    norm = randomise(DDPMUNet(**BASE)).train().down_blocks[0].resnets[0].norm1
    norm.requires_grad_(False)
    x = torch.randn(2, norm.num_channels, 16, 16).to(dtype).requires_grad_()
    gradients = []
    for forward in (norm, lambda x: F.silu(F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps))):
        with torch.autocast("cpu", torch.bfloat16):
            y = forward(x)
        gradients.append(torch.autograd.grad(y, x, torch.ones_like(y))[0])
    assert gradients[0].dtype == dtype and torch.equal(*gradients)


@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if config.get("dropout")])
def test_dropout_acts_in_train_mode_only(name):
    net = randomise(DDPMUNet(**CONFIGS[name]))
    inputs = make_inputs(net)
    trained = net.train()(**inputs).sample
    assert (trained - net.eval()(**inputs).sample).abs().max() > 1e-2
    assert torch.equal(net(**inputs).sample, net(**inputs).sample)


def test_cifar10_at_full_width():
    theirs, ours = pair(CIFAR10)
    assert sum(p.numel() for p in ours.parameters()) == pytest.approx(35.7e6, abs=0.05e6)  # the paper, appendix B
    inputs = make_inputs(ours, size=(32, 32), batch=1)
    assert_same_results(output_and_gradients(ours, inputs), output_and_gradients(theirs, inputs))


def test_six_levels_at_full_width():
    theirs, ours = pair(SIX_LEVELS, DDPMUNet)[::-1]
    assert sum(p.numel() for p in ours.parameters()) == pytest.approx(114e6, abs=0.5e6)  # the paper, appendix B
    inputs = make_inputs(ours, size=(32, 32), batch=1)
    assert_close(output(ours, inputs), output(theirs, inputs), 1e-5)


def test_ncsnpp_at_full_width():
    with torch.device("meta"):
        theirs, ours = (cls(**NCSNPP_256).state_dict() for cls in (UNet2DModel, DDPMUNet))
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}
    assert sum(value.numel() for value in ours.values()) == 65_574_549


@pytest.mark.parametrize("config", ["ncsnpp", "ncsnpp-scale-shift", "ncsnpp-outside", *range(12)])
def test_ncsnpp_in_double(config):
    """To rounding, dropout too."""
    config = random_ncsnpp(random.Random(config)) if isinstance(config, int) else CONFIGS[config]
    theirs, ours = (net.to(torch.float64).train() for net in pair(config))
    inputs = make_inputs(ours)
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    expected, actual = output_and_gradients(theirs, inputs), output_and_gradients(ours, inputs)
    assert_close(actual[0], expected[0], 1e-12)
    assert actual[1].keys() == expected[1].keys()
    for key, gradient in expected[1].items():
        assert_close(actual[1][key], gradient, 1e-10, key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ncsnpp_under_autocast_and_in_channels_last(dtype):
    net = randomise(DDPMUNet(**NCSNPP))
    inputs = make_inputs(net)
    expected, gradients = output_and_gradients(net, inputs)
    net.to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        result, others = output_and_gradients(net, inputs)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    assert (result - expected).abs().max() < tolerance * expected.abs().max()
    for key in "sample", "down_blocks.0.skip_conv.weight", "up_blocks.0.skip_conv.weight":
        assert (others[key] - gradients[key]).abs().max() < 4 * tolerance * gradients[key].abs().max(), key


@pytest.mark.parametrize(
    "timestep",
    [0, 37, torch.tensor(37), torch.tensor([37]), torch.tensor([0, 999, 5]), torch.tensor([0, 999, 5]).int()]
    + [torch.tensor(0.5), torch.tensor([0.5]), torch.tensor([0.25, 998.75, 5.5])],
    ids=repr,
)
def test_forms_of_timestep(timestep):
    theirs, ours = pair(CONFIGS["cifar10"])
    inputs = make_inputs(ours, batch=3) | {"timestep": timestep}
    assert_close(output(ours, inputs), output(theirs, inputs), 1e-5)
    assert (output(ours, inputs) - output(ours, inputs | {"timestep": 400})).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["base", "odd-channels", "sin-first-unshifted", "cos-first-shifted", "cifar10"])
def test_time_embedding_at_every_timestep(name):
    """Tighter than the outputs: a difference here can move an activation across the kink of a relu."""
    theirs, ours = pair(CONFIGS[name])
    t = torch.arange(1000)
    # with freq_shift=1 the frequencies have the authors' rounding, and an angle is up to 1,000 times as large
    assert_close(ours.time_proj(t), theirs.time_proj(t), 1e-4 if ours.config.freq_shift == 1 else 1e-6)


def test_tuple_output():
    net = randomise(DDPMUNet(**BASE))
    inputs = make_inputs(net)
    result = net(**inputs, return_dict=False)
    assert isinstance(result, tuple) and len(result) == 1
    assert torch.equal(result[0], net(**inputs).sample)


@pytest.mark.parametrize("name", ["dropout", "adm-like", "no-mid-block", "ncsnpp-groups"])
def test_gradient_checkpointing(name):
    net = randomise(DDPMUNet(**CONFIGS[name])).train()
    inputs = make_inputs(net)
    resnets = [resnet for name, part in net.named_modules() if name.endswith(".resnets") for resnet in part]
    calls = []
    for resnet in resnets:
        resnet.register_forward_pre_hook(lambda *_: calls.append(0))
    expected = output_and_gradients(net, inputs)
    assert len(calls) == len(resnets)
    net.enable_gradient_checkpointing()
    assert_same_results(output_and_gradients(net, inputs), expected)
    assert len(calls) == 3 * len(resnets)  # computed again for the backward pass
    net.disable_gradient_checkpointing()
    output_and_gradients(net, inputs)
    assert len(calls) == 4 * len(resnets)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"num_class_embeds": 7},
        {"class_embed_type": "timestep"},
        {"class_embed_type": "identity"},
        LEARNED,
        {"time_embedding_type": "fourier"},
        {"resnet_time_scale_shift": "scale_shift"},
        NCSNPP,
        NCSNPP | {"time_embedding_type": "positional"},
    ],
    ids=str,
)
def test_bfloat16(overrides):
    net = randomise(DDPMUNet(**BASE | overrides))
    inputs = make_inputs(net)
    expected = output(net, inputs)
    result = output(net.to(torch.bfloat16), inputs | {"sample": inputs["sample"].bfloat16()})
    assert result.dtype == torch.bfloat16 and result.isfinite().all()
    if overrides.get("time_embedding_type") != "fourier":  # whose angles are too large for 8 bits
        assert (result - expected).abs().max() < 0.1 * expected.abs().max()


# checkpoints


def test_same_config_keys_and_defaults():
    ours, theirs = (inspect.signature(cls.__init__).parameters for cls in (DDPMUNet, UNet2DModel))
    assert {k: v.default for k, v in ours.items()} == {k: v.default for k, v in theirs.items()} | OWN_DEFAULTS


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize(
    "name", ["cifar10", "celebahq-church", "fourier", "adm-like", "ncsnpp", "random-3", "random-5"]
)
@pytest.mark.parametrize("saver", [UNet2DModel, DDPMUNet])
def test_each_opens_what_the_other_saved(saver, name, safe, tmp_path):
    net = randomise(saver(**CONFIGS[name]))
    net.save_pretrained(tmp_path, safe_serialization=safe)
    inputs = make_inputs(net)
    for opener in (UNet2DModel, DDPMUNet):
        opened = opener.from_pretrained(tmp_path, use_safetensors=safe)
        assert type(opened) is opener and not opened.training
        assert_same_weights(opened, net)
        assert_close(output(opened, inputs), output(net, inputs), 1e-5)


def test_config_file_is_that_of_diffusers(tmp_path):
    config = CONFIGS["cifar10"]
    for cls in (UNet2DModel, DDPMUNet):
        cls(**config).save_pretrained(tmp_path / cls.__name__)
    theirs, ours = (json.loads((tmp_path / c.__name__ / "config.json").read_text()) for c in (UNet2DModel, DDPMUNet))
    assert ours["_class_name"] == "UNet2DModel"
    assert ours == theirs
    reopened = DDPMUNet.from_pretrained(tmp_path / "DDPMUNet")
    reopened.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == ours


def test_opens_2022_attention_keys(tmp_path):
    config = CONFIGS["cifar10"] | {
        "down_block_types": ["UNetRes" + name for name in CIFAR10["down_block_types"]],
        "up_block_types": ["UNetRes" + name for name in CIFAR10["up_block_types"]],
    }
    net = randomise(UNet2DModel(**config))
    renamed = {}
    for key, value in net.state_dict().items():
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            key = key.replace(f".{new}.", f".{old}.")
        renamed[key] = value.contiguous()
    assert sum(".proj_attn." in key for key in renamed) == 2 * 6 and not any(".to_" in key for key in renamed)
    save_file(renamed, tmp_path / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    header = {"_class_name": "UNet2DModel", "_diffusers_version": "0.3.0"}
    (tmp_path / "config.json").write_text(json.dumps(header | config))
    opened = DDPMUNet.from_pretrained(tmp_path)
    assert_same_weights(opened, net)
    inputs = make_inputs(net)
    assert_close(output(opened, inputs), output(net, inputs), 1e-5)


# new weights


@pytest.mark.parametrize("config", ["adm-like", "ncsnpp"])
def test_paper_weights_make_the_zero_function(config):
    net = randomise(DDPMUNet(**CONFIGS[config]))
    inputs = make_inputs(net)
    assert output(net, inputs).abs().max() > 0.1
    net.reset_parameters("paper")
    assert not output(net, inputs).any()
    assert not output(DDPMUNet(**CONFIGS[config]), inputs).any()  # the default
    last = {"conv2", "0", "conv_out"}  # "0" is attention's to_out.0
    for name, module in net.named_modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            assert not module.bias.any(), name
            if name.split(".")[-1] in last or name.startswith("up_blocks") and name.endswith("skip_conv"):
                assert not module.weight.any(), name
            else:  # uniform, with variance 2 / (fan_in + fan_out)
                positions = module.weight[0, 0].numel()
                limit = (6 / ((module.weight.shape[0] + module.weight.shape[1]) * positions)) ** 0.5
                assert 0.8 * limit < module.weight.abs().max() <= limit, name
        elif isinstance(module, torch.nn.GroupNorm):
            assert (module.weight == 1).all() and not module.bias.any(), name


def test_torch_weights_are_those_of_each_layer():
    net = DDPMUNet(**CONFIGS["adm-like"])
    inputs = make_inputs(net)
    randomise(net).reset_parameters("torch")
    assert output(net, inputs).abs().max() > 1e-2
    for name, module in net.named_modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            limit = module.weight[0].numel() ** -0.5
            assert 0.8 * limit < module.weight.abs().max() <= limit, name
            assert 0 < module.bias.abs().max() <= limit, name
        elif isinstance(module, torch.nn.GroupNorm):
            assert (module.weight == 1).all() and not module.bias.any(), name


@pytest.mark.parametrize("scheme", ["paper", "torch"])
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_from_pretrained_keeps_the_saved_weights(scheme, low_cpu_mem_usage, tmp_path):
    net = DDPMUNet(**CONFIGS["fourier"])
    net.reset_parameters(scheme)
    net.save_pretrained(tmp_path / "new")
    randomise(net).save_pretrained(tmp_path / "trained")
    opened = DDPMUNet.from_pretrained(tmp_path / "trained", low_cpu_mem_usage=low_cpu_mem_usage)
    assert_same_weights(opened, net)
    opened.reset_parameters(scheme)  # in memory only
    assert_same_weights(DDPMUNet.from_pretrained(tmp_path / "trained", low_cpu_mem_usage=low_cpu_mem_usage), net)
    opened = DDPMUNet.from_pretrained(tmp_path / "new", low_cpu_mem_usage=low_cpu_mem_usage)
    assert output(opened, make_inputs(net)).any() == (scheme == "torch")


def test_fourier_frequencies_are_those_of_score_sde():
    weight = FourierEmbedding(10_000).weight
    assert 15 < weight.std() < 17 and abs(weight.mean()) < 1  # normal, of deviation 16
    assert not weight.requires_grad


def test_unknown_scheme_of_weights():
    net = randomise(DDPMUNet(**BASE))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(ValueError, match="'zeros'.*'paper'.*'torch'"):
        net.reset_parameters("zeros")
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


# wrong configs

# overrides -> what the message names: the key, the value, what is supported
WRONG_CONFIGS = [({key: "nonsense"}, (f"{key}='nonsense'", *map(str, choices))) for key, choices in CHOICES.items()] + [
    ({"down_block_types": ("DownBlock2D", "KDownBlock2D")}, ("down_block_types", "'KDownBlock2D'", *DOWN_BLOCKS)),
    ({"down_block_types": ("DownBlock2D", "AttnUpBlock2D")}, ("down_block_types", "'AttnUpBlock2D'", *DOWN_BLOCKS)),
    ({"up_block_types": ("KUpBlock2D", "UpBlock2D")}, ("up_block_types", "'KUpBlock2D'", *UP_BLOCKS)),
    ({"down_block_types": ("DownBlock2D",)}, ("down_block_types", "1 entries", "block_out_channels", "2")),
    ({"up_block_types": ("UpBlock2D",) * 3}, ("up_block_types", "3 entries", "block_out_channels", "2")),
    ({"block_out_channels": (16, 32, 32)}, ("down_block_types", "2 entries", "block_out_channels", "3")),
    (
        {"mid_block_type": "UNetMidBlock2DCrossAttn"},
        ("mid_block_type='UNetMidBlock2DCrossAttn'", "UNetMidBlock2D, None"),
    ),
    ({"resnet_time_scale_shift": "spatial"}, ("resnet_time_scale_shift='spatial'", "default, scale_shift")),
    ({"act_fn": None}, ("act_fn=None", "a string")),
    ({"downsample_padding": 2}, ("downsample_padding=2", "0, 1")),
    ({"time_embedding_type": "learned"}, ("num_train_timesteps", "None", "learned")),
    ({"freq_shift": 8}, ("freq_shift=8", "below", "8")),
    ({"norm_num_groups": 5}, ("norm_num_groups=5", "(16, 32)")),
    ({"norm_num_groups": 0}, ("norm_num_groups=0", "an integer in [1, 65536]")),
    ({"attn_norm_num_groups": 5}, ("attn_norm_num_groups=5", "32")),
    ({"attn_norm_num_groups": 0}, ("attn_norm_num_groups=0", "an integer in [1, 65536]")),
    ({"attention_head_dim": 0}, ("attention_head_dim=0", "an integer in [1, 65536]")),
    ({"attention_head_dim": 33}, ("attention_head_dim=33", "1 to 32")),
    (PLAIN | {"attention_head_dim": 33}, ("attention_head_dim=33", "1 to 32")),
    (ATTENTION | {"attention_head_dim": 17}, ("attention_head_dim=17", "1 to 16")),
]
WRONG_CONFIGS += [
    (NCSNPP | overrides, words)
    for overrides, words in (
        ({"in_channels": 1}, ("in_channels=1", "must be 3", "down_block_types")),
        ({"out_channels": 6}, ("out_channels=6", "must be 3", "up_block_types")),
        (
            {"down_block_types": ("DownBlock2D", "SkipDownBlock2D", "DownBlock2D"), "norm_num_groups": 4},
            ("down_block_types=('DownBlock2D',", "Skip blocks first"),
        ),
        (
            {"up_block_types": ("SkipUpBlock2D", "SkipUpBlock2D", "UpBlock2D"), "norm_num_groups": 4},
            ("up_block_types=('SkipUpBlock2D',", "Skip blocks last"),
        ),
        ({"norm_num_groups": 5}, ("norm_num_groups=5", "(16, 32)")),
        ({"block_out_channels": (32, 32, 48)}, ("block_out_channels=(32, 32, 48)", "48 channels", "32 groups")),
        ({"block_out_channels": (16, 3, 32)}, ("block_out_channels=(16, 3, 32)", "3 channels", "multiples of 32")),
        ({"attention_head_dim": 33}, ("attention_head_dim=33", "1 to 32")),
    )
]


@pytest.mark.parametrize(("overrides", "words"), WRONG_CONFIGS, ids=[str(overrides) for overrides, _ in WRONG_CONFIGS])
def test_unsupported_config(overrides, words):
    with pytest.raises(ValueError) as error:
        DDPMUNet.from_config(BASE | overrides)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"block_out_channels": (10**9, 10**9)}, ("1000000000, 1000000000", "[1, 65536]")),
        ({"block_out_channels": (65536, 65536)}, ("65536, 65536", "parameters", "limit")),
        ({"block_out_channels": (32,) * 10**5}, ("block_out_channels has 100000 entries", "16")),
        ({"layers_per_block": 10**6}, ("layers_per_block=1000000", "[1, 64]")),
        ({"num_class_embeds": 10**12}, ("num_class_embeds=1000000000000", "[1, 100000000]")),
        (
            {"num_class_embeds": 10**8, "time_embedding_dim": 1024},
            ("num_class_embeds=100000000", "parameters", "limit"),
        ),
        ({"sample_size": 10**9}, ("sample_size=1000000000", "[1, 65536]")),
        ({"num_train_timesteps": 10**9}, ("num_train_timesteps=1000000000", "[1, 100000]")),
        ({"time_embedding_dim": 10**9}, ("time_embedding_dim=1000000000", "[1, 65536]")),
        ({"in_channels": 10**39}, ("in_channels=1000", "[1, 65536]")),
        ({"down_block_types": ("DownBlock2D",) * 10**5}, ("down_block_types has 100000 entries",)),
        ({"down_block_types": ("x" * 10**5, "DownBlock2D")}, ("down_block_types names 'xxx",)),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_absurd_sizes_are_refused_at_once(overrides, words, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**BASE, **overrides, "_class_name": "UNet2DModel"}))
    for opened in (lambda: DDPMUNet(**BASE | overrides), lambda: DDPMUNet.from_config(DDPMUNet.load_config(tmp_path))):
        start = time.process_time()
        with pytest.raises(ValueError) as error:
            opened()
        assert time.process_time() - start < 5  # building a million layers takes minutes
        assert all(word in str(error.value) for word in words) and len(str(error.value)) < 300


def test_a_number_of_hundreds_of_digits_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"in_channels=1000.* must be an integer in \[1, 65536\]$"):
        DDPMUNet(**BASE | {"in_channels": 10**400})
    (tmp_path / "config.json").write_text(json.dumps({**BASE, "in_channels": 10**400, "_class_name": "UNet2DModel"}))
    with pytest.raises(ValueError, match="config.json is not JSON .a number has 401 digits"):
        DDPMUNet.load_config(tmp_path)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_bound_of_the_number_of_parameters(name):
    with torch.device("meta"):
        network = DDPMUNet(**BASE | CONFIGS[name])
    assert 1 < parameters_upper_bound(network.arguments) / network.num_parameters() < 4


@pytest.mark.parametrize("mid", [{"mid_block_type": None}, {"add_attention": False}], ids=str)
def test_head_dim_does_not_matter_without_attention(mid):
    theirs, ours = pair(BASE | PLAIN | mid | {"attention_head_dim": 64})
    inputs = make_inputs(ours)
    assert_close(output(ours, inputs), output(theirs, inputs), 1e-5)


# wrong inputs

CLASSES, IDENTITY, TIMES = {"num_class_embeds": 7}, {"class_embed_type": "identity"}, {"class_embed_type": "timestep"}
# overrides of the config, changes of the right inputs, what the message says
WRONG_INPUTS = [
    ({}, {"sample": torch.zeros(2, 4, 8, 8)}, ("sample", "(2, 4, 8, 8)", "(batch, 3, height, width)")),
    ({}, {"sample": torch.zeros(3, 8, 8)}, ("sample", "(3, 8, 8)", "(batch, 3, height, width)")),
    ({}, {"sample": torch.zeros(2, 3, 9, 8)}, ("9x8", "multiples of 2")),
    ({}, {"sample": torch.zeros(2, 3, 8, 7)}, ("8x7", "multiples of 2")),
    (levels((8, 8, 8, 8)), {"sample": torch.zeros(2, 3, 12, 16)}, ("12x16", "multiples of 8")),
    ({}, {"timestep": torch.tensor([1, 2, 3])}, ("timestep", "(3,)", "2 images")),
    ({}, {"timestep": torch.ones(2, 1)}, ("timestep", "(2, 1)", "2 images")),
    ({}, {"class_labels": torch.tensor([0, 1])}, ("class_labels", "no class embedding")),
    (CLASSES, {"class_labels": None}, ("class_labels", "missing")),
    (TIMES, {"class_labels": None}, ("class_labels", "missing")),
    (IDENTITY, {"class_labels": None}, ("class_labels", "missing")),
    (CLASSES, {"class_labels": torch.tensor([0, 7])}, ("class_labels", "value 7", "0 to 6")),
    (CLASSES, {"class_labels": torch.tensor([-1, 6])}, ("class_labels", "value -1", "0 to 6")),
    (CLASSES, {"class_labels": torch.tensor([0.0, 1.0])}, ("class_labels", "float32", "integer")),
    (CLASSES, {"class_labels": torch.tensor([0, 1, 2])}, ("class_labels", "(3,)", "2 images")),
    (CLASSES, {"class_labels": torch.tensor(0)}, ("class_labels", "()", "2 images")),
    (CLASSES, {"class_labels": torch.tensor([[0], [1]])}, ("class_labels", "(2, 1)")),
    (TIMES, {"class_labels": torch.tensor([[0], [1]])}, ("class_labels", "(2, 1)")),
    (IDENTITY, {"class_labels": torch.zeros(2, 63)}, ("class_labels", "(2, 63)", "64")),
    (IDENTITY, {"class_labels": torch.zeros(2)}, ("class_labels", "(2,)", "64")),
    (LEARNED, {"timestep": 50}, ("timestep", "value 50", "0 to 49")),
    (LEARNED, {"timestep": torch.tensor([3, -1])}, ("timestep", "value -1", "0 to 49")),
    (LEARNED, {"timestep": torch.tensor([3.0, 1.0])}, ("timestep", "float32", "integer")),
    (LEARNED | TIMES, {"class_labels": torch.tensor([0, 50])}, ("class_labels", "value 50", "0 to 49")),
]


@pytest.mark.parametrize(("overrides", "changes", "words"), WRONG_INPUTS, ids=[" ".join(x[2]) for x in WRONG_INPUTS])
def test_wrong_input(overrides, changes, words):
    net = DDPMUNet(**BASE | overrides)
    inputs = make_inputs(net, size=(8, 8))
    net(**inputs)  # right without the changes
    for module in list(net.modules())[1:]:
        module.register_forward_pre_hook(lambda *_: pytest.fail("computed something before the error"))
    with pytest.raises(ValueError) as error:
        net(**inputs | changes)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_gradients_of_gradients_and_of_each_image():
    """What torch's own normalization allows in training mode: a penalty on gradients, and torch.func's transforms."""
    norm, x = ActivatedNorm(2, 6, 1e-5, F.silu).double().train(), torch.randn(3, 6, 4, 4, dtype=torch.float64)
    torch.nn.init.normal_(norm.weight)

    def plain(x, weight, bias):
        return F.silu(F.group_norm(x, 2, weight, bias, 1e-5))

    def penalty(function, x):
        actual = torch.autograd.grad(function(x).square().sum(), (x, norm.weight), create_graph=True)
        return torch.autograd.grad(sum(part.square().sum() for part in actual), (x, norm.weight, norm.bias))

    x.requires_grad_()
    for a, b in zip(penalty(norm, x), penalty(lambda x: plain(x, norm.weight, norm.bias), x)):
        torch.testing.assert_close(a, b)
    norm.weight.requires_grad_(False)
    (once,) = torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)
    (twice,) = torch.autograd.grad(once.square().sum(), x)
    (once,) = torch.autograd.grad(plain(x, norm.weight, norm.bias).square().sum(), x, create_graph=True)
    torch.testing.assert_close(twice, torch.autograd.grad(once.square().sum(), x)[0])

    def loss(weights, x):
        return torch.func.functional_call(norm, weights, x[None]).square().sum()

    weights = {name: p.detach() for name, p in norm.named_parameters()}
    per_image = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x.detach())
    for i in range(3):
        mine = [weights[name].clone().requires_grad_() for name in ("weight", "bias")]
        expected = torch.autograd.grad(plain(x[i : i + 1].detach(), *mine).square().sum(), mine)
        torch.testing.assert_close((per_image["weight"][i], per_image["bias"][i]), expected)


def test_the_null_class_is_kept(tmp_path):
    """Through both classes, files and copies; and it is the last."""
    unet = DDPMUNet(**BASE, num_class_embeds=5, _ddpm_hf={"null_class": 4})
    assert (unet.null_class, unet.num_classes) == (4, 4)
    UNet2DModel.from_config(unet.config).save_pretrained(tmp_path)
    for other in DDPMUNet.from_config(unet.config), copy.deepcopy(unet), DDPMUNet.from_pretrained(tmp_path):
        assert (other.null_class, other.num_classes) == (4, 4)
    assert DDPMUNet(**BASE, num_class_embeds=5).null_class is None and DDPMUNet(**BASE).num_classes is None
    for wrong in {"num_class_embeds": 6}, {}, {"class_embed_type": "identity"}:
        with pytest.raises(ValueError, match="null_class=4 must be the last"):
            DDPMUNet(**BASE, **wrong, _ddpm_hf={"null_class": 4}).null_class  # noqa: B018


def test_a_time_on_the_cpu_breaks_no_compiled_graph():
    explanation = torch._dynamo.explain(lambda t: time_tensor(t, torch.device("meta")) + 1)(torch.tensor(3))
    assert explanation.graph_break_count == 0
