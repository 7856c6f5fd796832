"""The arguments of `DDPMUNet` that UNet2DModel does not have: outputs, configs, and that stock diffusers refuses them."""

import copy
import json
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from diffusers import UNet2DModel

from ddpm_hf import DDPMUNet, InferenceUNet, NoisyClassifier
from ddpm_hf.models.network_config import OWN_DEFAULTS, parameters_upper_bound
from ddpm_hf.training.config import TrainConfig
from support.unet_configs import ATTENTION, BASE, CIFAR10, LEARNED, NCSNPP, NCSNPP_256

SQRT2 = 2**0.5
RESNET = {
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}
PAPER = {"freq_shift": 1, "flip_sin_to_cos": False, "norm_eps": 1e-6, "downsample_padding": 0}
# networks of the authors, on a small scale
DDPMPP = (
    RESNET
    | PAPER
    | {"layers_per_block": 2, "attention_head_dim": None, "mid_block_scale_factor": SQRT2, "norm_num_groups": None}
    | {"up_attention": "last", "block_scale_factor": SQRT2, "resample_shortcut": True}
)
NCSNPP_CIFAR10 = DDPMPP | {"fir_resampling": True, "input_pyramid": "residual", "time_embedding_type": "fourier"}
SIGMAS = {"sigma_table": (0.01, 50.0, 1000)}
SETTINGS = {
    "heads": ATTENTION | {"num_attention_heads": 4},
    "heads-up": ATTENTION | {"num_attention_heads": 4, "up_attention_heads": 2},
    "heads-up-only": ATTENTION | {"up_attention_heads": 2},
    "sinusoid": {"sinusoid_dim": 30},
    "sinusoid-and-embedding": {"sinusoid_dim": 30, "time_embedding_dim": 20},
    "sinusoid-fourier": {"sinusoid_dim": 30, "time_embedding_type": "fourier"},
    "sinusoid-learned": LEARNED | {"sinusoid_dim": 30},
    "last-attention": ATTENTION | {"up_attention": "last", "layers_per_block": 2},
    "scale": ATTENTION | {"block_scale_factor": 1.7},
    "shortcut": RESNET | {"resample_shortcut": True},
    "fir": RESNET | {"fir_resampling": True},
    "pyramid": {"input_pyramid": "residual", "in_channels": 5},
    "pyramid-scaled": RESNET | {"input_pyramid": "residual", "block_scale_factor": 1.7},
    "sigmas": SIGMAS | PAPER,
    "features": {"fourier_features": (4, 0, 3), "in_channels": 2},
    "features-centered-pyramid": {"fourier_features": (1,), "center_input_sample": True, "input_pyramid": "residual"},
    "groups": {"norm_num_groups": None, "block_out_channels": (32, 160)},
    "ddpmpp": DDPMPP,
    "ncsnpp": NCSNPP_CIFAR10,
    "ncsnpp-positional": NCSNPP_CIFAR10 | SIGMAS | {"time_embedding_type": "positional"},
}
SETTINGS = {name: BASE | config for name, config in SETTINGS.items()}


def network(config, dtype=torch.float64):
    """A network whose every tensor has an effect."""
    torch.manual_seed(0)
    net = DDPMUNet(**config)
    net.reset_parameters("torch")
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return net.to(dtype).eval()


def inputs(net, batch=2):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, net.config.in_channels, 8, 12, generator=generator, dtype=torch.float64)
    if net.config.time_embedding_type == "fourier":
        return x, torch.tensor([0.3, 47.0][:batch], dtype=torch.float64)
    return x, torch.tensor([7, 49][:batch])


@torch.no_grad()
def output(net, x, t):
    return net(x, t).sample


# the network written once more


def along_both(function, x):
    """A function of the last axis, along both axes of images."""
    return function(function(x).transpose(2, 3)).transpose(2, 3)


def fir_half(x):
    """Taps (1, 3, 3, 1) / 8 at every second place; zeros outside."""
    x = F.pad(x, (1, 1))
    return (x[..., :-3:2] + 3 * x[..., 1:-2:2] + 3 * x[..., 2:-1:2] + x[..., 3::2]) / 8


def fir_smooth(x):
    """The same at every place between two zeros on both sides: one entry more."""
    x = F.pad(x, (2, 2))
    return (x[..., :-3] + 3 * x[..., 1:-2] + 3 * x[..., 2:-1] + x[..., 3:]) / 8


def fir_double(x):
    """out[2m] = (3 in[m] + in[m-1]) / 4, out[2m+1] = (3 in[m] + in[m+1]) / 4."""
    padded = F.pad(x, (1, 1))
    even, odd = 3 * x + padded[..., :-2], 3 * x + padded[..., 2:]
    return torch.stack((even, odd), dim=-1).flatten(-2) / 4


class Reference:
    """The U-Net by the state dict of a `DDPMUNet`, with loops in the order of the authors' code."""

    def __init__(self, net, config):
        self.w = net.state_dict()
        self.s = {**net.arguments, **config}
        self.channels = tuple(self.s["block_out_channels"])

    def conv(self, name, x, **kwargs):
        return F.conv2d(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"], **kwargs)

    def linear(self, name, x):
        return F.linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def norm(self, name, x):
        groups = self.s["norm_num_groups"] or min(x.shape[1] // 4, 32)
        return F.group_norm(x, groups, self.w[f"{name}.weight"], self.w[f"{name}.bias"], self.s["norm_eps"])

    def block(self, name, x, emb, scale, resample=None):
        h = F.silu(self.norm(f"{name}.norm1", x))
        if resample is not None:
            x, h = resample(x), resample(h)
        h = self.conv(f"{name}.conv1", h, padding=1) + self.linear(f"{name}.time_emb_proj", emb)[:, :, None, None]
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)), padding=1)
        has_shortcut = x.shape[1] != h.shape[1] or (resample is not None and self.s["resample_shortcut"])
        assert has_shortcut == (f"{name}.conv_shortcut.weight" in self.w)
        return ((self.conv(f"{name}.conv_shortcut", x) if has_shortcut else x) + h) / scale

    def attention(self, name, x, scale, heads):
        b, c, height, width = x.shape
        heads = heads or (1 if self.s["attention_head_dim"] is None else c // self.s["attention_head_dim"])
        h = self.norm(f"{name}.group_norm", x).reshape(b, c, -1).transpose(1, 2)
        q, k, v = (self.linear(f"{name}.{to}", h).reshape(b, -1, heads, c // heads) for to in ("to_q", "to_k", "to_v"))
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(c // heads)
        h = torch.einsum("bhqk,bkhd->bqhd", weights.softmax(-1), v).reshape(b, -1, c)
        return (x + self.linear(f"{name}.to_out.0", h).transpose(1, 2).reshape(x.shape)) / scale

    def embedding(self, t):
        dim = self.s["sinusoid_dim"] or self.channels[0]
        if self.s["time_embedding_type"] == "fourier":
            assert self.w["time_proj.weight"].shape == (dim,)
            angles = 2 * math.pi * t.log()[:, None] * self.w["time_proj.weight"]
            features = torch.cat((angles.sin(), angles.cos()), 1)
        elif self.s["time_embedding_type"] == "learned":
            features = self.w["time_proj.weight"][t]
        else:
            half, j = dim // 2, torch.arange(dim // 2, dtype=torch.float32)
            if self.s["freq_shift"] == 1:
                frequencies = torch.exp(j * -(math.log(10000) / (half - 1)))
            else:
                frequencies = torch.exp(-math.log(10000) * j / half)
            angles = t.float()[:, None] * frequencies
            order = (angles.cos(), angles.sin()) if self.s["flip_sin_to_cos"] else (angles.sin(), angles.cos())
            features = torch.cat(order, 1).double()
        h = F.silu(self.linear("time_embedding.linear_1", features))
        assert h.shape[1] == (self.s["time_embedding_dim"] or 4 * dim)
        return F.silu(self.linear("time_embedding.linear_2", h))

    def down(self, x):
        return along_both(fir_half, x) if self.s["fir_resampling"] else F.avg_pool2d(x, 2)

    def up(self, x):
        return (
            along_both(fir_double, x) if self.s["fir_resampling"] else x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        )

    def is_resnet(self, name, key):
        return name.startswith("Resnet") or (name.startswith("Attn") and self.s[key] == "resnet")

    def halved_pyramid(self, name, pyramid):
        if self.s["fir_resampling"]:
            return self.conv(name, along_both(fir_smooth, pyramid), stride=2)
        return self.conv(name, F.pad(pyramid, (0, 1, 0, 1)), stride=2)

    def __call__(self, x, t):
        s, n, scale, emb = self.s, len(self.channels), self.s["block_scale_factor"], self.embedding(t)
        x = 2 * x - 1 if s["center_input_sample"] else x
        exponents = s["fourier_features"] or ()
        waves = [wave(math.pi * 2**n * x) for wave in (torch.sin, torch.cos) for n in exponents]
        pyramid, h = x, self.conv("conv_in", torch.cat((x, *waves), 1), padding=1)
        skips = [h]
        for i, name in enumerate(s["down_block_types"]):
            level = f"down_blocks.{i}"
            for j in range(s["layers_per_block"]):
                h = self.block(f"{level}.resnets.{j}", h, emb, scale)
                if name.startswith("Attn"):
                    h = self.attention(f"{level}.attentions.{j}", h, scale, s["num_attention_heads"])
                skips.append(h)
            if i == n - 1:
                break
            if self.is_resnet(name, "downsample_type"):
                h = self.block(f"{level}.downsamplers.0", h, emb, scale, self.down)
            elif s["downsample_padding"] == 0:
                h = self.conv(f"{level}.downsamplers.0.conv", F.pad(h, (0, 1, 0, 1)), stride=2)
            else:
                h = self.conv(f"{level}.downsamplers.0.conv", h, stride=2, padding=1)
            if s["input_pyramid"] is not None:
                h = pyramid = (self.halved_pyramid(f"{level}.pyramid_conv.conv", pyramid) + h) / scale
            skips.append(h)
        mid = s["mid_block_scale_factor"]
        h = self.block("mid_block.resnets.0", h, emb, mid)
        h = self.attention("mid_block.attentions.0", h, mid, s["num_attention_heads"])
        h = self.block("mid_block.resnets.1", h, emb, mid)
        for i, name in enumerate(s["up_block_types"]):
            level, last = f"up_blocks.{i}", s["layers_per_block"]
            for j in range(last + 1):
                h = self.block(f"{level}.resnets.{j}", torch.cat((h, skips.pop()), 1), emb, scale)
                heads = s["up_attention_heads"] or s["num_attention_heads"]
                if name.startswith("Attn") and s["up_attention"] == "every":
                    h = self.attention(f"{level}.attentions.{j}", h, scale, heads)
                elif name.startswith("Attn") and j == last:
                    h = self.attention(f"{level}.attentions.0", h, scale, heads)
            if i == n - 1:
                break
            if self.is_resnet(name, "upsample_type"):
                h = self.block(f"{level}.upsamplers.0", h, emb, scale, self.up)
            else:
                h = self.conv(f"{level}.upsamplers.0.conv", F.interpolate(h, scale_factor=2.0), padding=1)
        h = self.conv("conv_out", F.silu(self.norm("conv_norm_out", h)), padding=1)
        if s["time_embedding_type"] == "fourier":
            h = h / t[:, None, None, None]
        if s["sigma_table"] is not None:
            sigma_min, sigma_max, count = s["sigma_table"]
            sigmas = np.exp(np.linspace(np.log(sigma_max), np.log(sigma_min), count))
            h = h / torch.from_numpy(sigmas)[t][:, None, None, None]
        return h


def assert_equal(actual, expected, tolerance=1e-11):
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("name", SETTINGS)
def test_outputs(name):
    net = network(SETTINGS[name])
    x, t = inputs(net)
    expected = Reference(net, SETTINGS[name])(x, t)
    assert_equal(output(net, x, t), expected)
    assert_equal(output(InferenceUNet(net, compile=False), x, t), expected)
    if not t.is_floating_point():  # for a whole batch a noise level is float32
        assert_equal(output(InferenceUNet(net, compile=False), x, t[1].item())[1], expected[1])


@pytest.mark.parametrize("name", ["heads", "heads-up", "heads-up-only", "scale", "fir", "sigmas", "groups"])
def test_settings_that_the_weights_do_not_show(name):
    """Another network has the same tensors."""
    net, groups = network(SETTINGS[name]), {"norm_num_groups": 4}
    plain = DDPMUNet(**{key: value for key, value in SETTINGS[name].items() if key not in OWN_DEFAULTS} | groups)
    x, t = inputs(net)
    plain.load_state_dict(net.state_dict())
    assert (output(plain.double().eval(), x, t) - output(net, x, t)).abs().max() > 1e-4


def test_the_same_number_of_heads_by_either_argument():
    """Where all levels are of one width the number of heads says what their dimension says; also for the classifier."""
    config = BASE | ATTENTION | {"block_out_channels": (16, 16)}
    by_dim, by_number = network(config | {"attention_head_dim": 4}), network(config | {"num_attention_heads": 4})
    x, t = inputs(by_dim)
    assert torch.equal(output(by_number, x, t), output(by_dim, x, t))
    config = {key: value for key, value in config.items() if key != "up_block_types"}
    torch.manual_seed(0)
    by_dim = NoisyClassifier(8, 3, **config | {"attention_head_dim": 4})
    by_number = NoisyClassifier(8, 3, **config, num_attention_heads=4, sinusoid_dim=16)
    by_number.load_state_dict(by_dim.state_dict())
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(by_number(x, 5), by_dim(x, 5))
    assert (by_number.config.num_attention_heads, by_number.head.heads) == (4, 4)
    assert NoisyClassifier(8, 3, **config, sinusoid_dim=30).time_embedding.linear_1.weight.shape == (120, 30)


# configs


@pytest.mark.parametrize("name", SETTINGS)
def test_configs_are_kept(name, tmp_path):
    net = network(SETTINGS[name], torch.float32)
    x, t = inputs(net)
    x, t = x.float(), t.float() if t.is_floating_point() else t
    net.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["_class_name"] == "DDPMUNet" and saved.keys() & OWN_DEFAULTS.keys() == set()
    with torch.device("meta"):
        on_meta = DDPMUNet.from_config(DDPMUNet.load_config(tmp_path))
    assert output(on_meta, x.to("meta"), t.to("meta")).shape == (2, 3, 8, 12)
    on_meta.load_state_dict(net.state_dict(), assign=True)
    again = DDPMUNet.from_config(net.config)
    again.load_state_dict(net.state_dict())
    others = [on_meta, again, copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
    others += [DDPMUNet.from_pretrained(tmp_path, low_cpu_mem_usage=low) for low in (True, False)]
    for other in others:
        assert other.has_own_settings and as_json(other.arguments) == as_json(net.arguments)
        assert as_json(other.config["_ddpm_hf"] if "_ddpm_hf" in saved else None) == as_json(saved.get("_ddpm_hf"))
        assert torch.equal(output(other.eval(), x, t), output(net, x, t))
    given = SETTINGS[name]
    assert as_json({key: net.arguments[key] for key in given}) == as_json(given)
    own = {key: value for key, value in given.items() if key in OWN_DEFAULTS}
    assert as_json(saved.get("_ddpm_hf", {})) == as_json(own)
    DDPMUNet.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/config.json").read_bytes() == (tmp_path / "config.json").read_bytes()


def as_json(value):
    """With lists in place of tuples."""
    return json.loads(json.dumps(value))


@pytest.mark.parametrize("name", SETTINGS)
def test_stock_refuses(name, tmp_path):
    net = DDPMUNet(**SETTINGS[name])
    net.save_pretrained(tmp_path)
    first = f"DDPM{SETTINGS[name]['down_block_types'][0]}"
    assert net.config.down_block_types[0] == first
    with pytest.raises(ValueError, match=f"{first} does not exist"):
        UNet2DModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{first} does not exist"):
        UNet2DModel.from_config(net.config)


@pytest.mark.parametrize(
    "config", [CIFAR10 | {"block_out_channels": (32,) * 4}, NCSNPP, BASE], ids=["paper", "skip", "base"]
)
def test_nothing_changes_without_own_settings(config, tmp_path):
    """The file is the one of diffusers, byte by byte, also if the defaults are given."""
    UNet2DModel(**config).save_pretrained(tmp_path / "stock")
    for i, net in enumerate((DDPMUNet(**config), DDPMUNet(**config, **OWN_DEFAULTS), DDPMUNet.from_config(config))):
        net.save_pretrained(tmp_path / str(i))
        assert (tmp_path / str(i) / "config.json").read_bytes() == (tmp_path / "stock/config.json").read_bytes()
        assert not net.has_own_settings and "_ddpm_hf" not in net.config
        assert not OWN_DEFAULTS.keys() & {*net.config, *net.config.get("_use_default_values", ())}
        assert {key: net.arguments[key] for key in OWN_DEFAULTS} == OWN_DEFAULTS


def test_beside_other_settings(tmp_path):
    """Names of classes and settings of later versions stay; an argument overrides the config."""
    others = {"null_class": 4, "future": [1]}
    net = DDPMUNet(**BASE, num_class_embeds=5, num_attention_heads=4, _ddpm_hf=others)
    net.class_names = ["a", "b", "c", "d"]
    net.save_pretrained(tmp_path)
    others["class_names"] = ["a", "b", "c", "d"]
    opened = DDPMUNet.from_pretrained(tmp_path)
    assert opened.config["_ddpm_hf"] == net.config["_ddpm_hf"] == others | {"num_attention_heads": 4}
    assert (opened.null_class, opened.class_names, opened.has_own_settings) == (4, ["a", "b", "c", "d"], True)
    two = DDPMUNet.from_config(opened.config, num_attention_heads=2)
    assert two.config["_ddpm_hf"] == others | {"num_attention_heads": 2} and two.mid_block.attentions[0].heads == 2
    plain = DDPMUNet.from_config(opened.config, num_attention_heads=None)
    assert plain.config["_ddpm_hf"] == others and not plain.has_own_settings
    assert list(plain.config.down_block_types) == list(BASE["down_block_types"])
    UNet2DModel.from_config(plain.config)
    with pytest.raises(
        ValueError, match="^_ddpm_hf holds num_attention_heads; give them as arguments, or use DDPMUNet"
    ):
        DDPMUNet(**net.config)


def test_names_of_2022_with_own_settings():
    names = {key: tuple(f"UNetRes{name}" for name in BASE[key]) for key in ("down_block_types", "up_block_types")}
    net, other = network(BASE | names | {"num_attention_heads": 2}), network(BASE | {"num_attention_heads": 2})
    assert torch.equal(output(net, *inputs(net)), output(other, *inputs(net)))
    assert DDPMUNet.from_config(net.config).arguments == net.arguments


WRONG = [
    ({"num_attention_heads": 3}, ("num_attention_heads=3", "must divide", "[32, 32]")),
    (ATTENTION | {"num_attention_heads": 32}, ("num_attention_heads=32", "[16, 32, 32]")),
    ({"num_attention_heads": 0}, ("num_attention_heads=0", "[1, 65536]")),
    ({"num_attention_heads": 2, "up_attention_heads": 5}, ("up_attention_heads=5", "must divide", "[32]")),
    ({"up_attention_heads": 2, "attention_head_dim": 64}, ("attention_head_dim=64", "1 to 32")),
    ({"sinusoid_dim": 10**6}, ("sinusoid_dim=1000000", "[1, 65536]")),
    ({"sinusoid_dim": 2, "freq_shift": 1}, ("freq_shift=1", "below 1")),
    ({"sinusoid_dim": 65536}, ("sinusoid_dim=65536", "parameters", "limit")),
    ({"up_attention": "first"}, ("up_attention='first'", "every, last")),
    ({"block_scale_factor": 0}, ("block_scale_factor=0", "[0.001, 1000]")),
    ({"resample_shortcut": 1}, ("resample_shortcut=1", "True or False")),
    ({"fir_resampling": "yes"}, ("fir_resampling='yes'", "True or False")),
    ({"input_pyramid": "skip"}, ("input_pyramid='skip'", "None, residual")),
    (NCSNPP | {"input_pyramid": "residual"}, ("input_pyramid='residual'", "Skip blocks")),
    ({"sigma_table": (0.01, 50)}, ("sigma_table=(0.01, 50)", "3 numbers")),
    ({"sigma_table": (50, 0.01, 1000)}, ("sigma_table=(50, 0.01, 1000)", "(sigma_min, sigma_max, count)")),
    ({"sigma_table": (0.01, 50, 10.5)}, ("sigma_table=(0.01, 50, 10.5)", "integer in [2, 100000]")),
    ({"sigma_table": (0.01, 50, 1)}, ("sigma_table=(0.01, 50, 1)", "integer in [2, 100000]")),
    ({"sigma_table": (0, 50, 10)}, ("sigma_table=(0, 50, 10)", "(0, 1000000]")),
    (SIGMAS | {"time_embedding_type": "fourier"}, ("sigma_table=(0.01, 50.0, 1000)", "'positional'", "'fourier'")),
    ({"fourier_features": ()}, ("fourier_features=()", "1 to 8 different exponents")),
    ({"fourier_features": (7, 8, 7)}, ("fourier_features=(7, 8, 7)", "1 to 8 different exponents")),
    ({"fourier_features": tuple(range(9))}, ("fourier_features=(0, 1,", "1 to 8 different exponents")),
    ({"fourier_features": (7, 17)}, ("fourier_features=(7, 17)", "[0, 16]")),
    ({"fourier_features": (-1,)}, ("fourier_features=(-1,)", "[0, 16]")),
    ({"fourier_features": (0.5,)}, ("fourier_features=(0.5,)", "integers")),
    ({"fourier_features": 7}, ("fourier_features=7", "integers")),
    (
        {"norm_num_groups": None, "block_out_channels": (6, 32)},
        ("block_out_channels=(6, 32)", "38 channels", "9 groups"),
    ),
]


@pytest.mark.parametrize(("config", "words"), WRONG, ids=[" ".join(words) for _, words in WRONG])
def test_wrong_values(config, words):
    with pytest.raises(ValueError) as error:
        DDPMUNet(**BASE | config)
    message = str(error.value)
    assert "\n" not in message and len(message) < 300
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("t", [1000, -1, torch.tensor([3, 1000]), 1000.0], ids=str)
def test_timesteps_beyond_the_table(t):
    net = network(SETTINGS["sigmas"])
    with pytest.raises(ValueError, match="timestep has the value (1000|-1); the range is 0 to 999"):
        net(inputs(net)[0], t)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_bound_of_the_number_of_parameters(name):
    with torch.device("meta"):
        for in_channels in (3, 60000):
            net = DDPMUNet(**SETTINGS[name] | {"in_channels": in_channels})
            assert parameters_upper_bound(net.arguments) > net.num_parameters()


# training


@pytest.mark.parametrize("name", ["heads-up", "ddpmpp", "ncsnpp", "ncsnpp-positional", "features"])
def test_gradients_with_checkpointing_and_compiled(name):
    net = network(SETTINGS[name]).train()
    x, t = inputs(net)
    x.requires_grad_()

    def gradients(call):
        results = torch.autograd.grad(
            call(x, t).sample.square().sum(), (x, *(p for p in net.parameters() if p.requires_grad))
        )
        return dict(zip(("x", *(name for name, p in net.named_parameters() if p.requires_grad)), results))

    expected = gradients(net)
    for key, gradient in expected.items():
        assert key.endswith("to_k.bias") or gradient.abs().max() > 1e-9, key
    compiled = gradients(torch.compile(net, backend="eager", fullgraph=True))
    net.enable_gradient_checkpointing()
    for others in (gradients(net), compiled):
        for key, gradient in expected.items():
            torch.testing.assert_close(others[key], gradient, rtol=1e-9, atol=1e-9 * gradient.abs().max().item())


@pytest.mark.parametrize("name", ["ddpmpp", "ncsnpp"])
def test_paper_weights(name):
    """The new convolutions are Glorot-uniform with zero bias, and the network is the zero function."""
    net = DDPMUNet(**SETTINGS[name]).double()
    assert not output(net, *inputs(net)).any()
    modules = {key: part for key, part in net.named_modules() if key.endswith(("pyramid_conv.conv", "0.conv_shortcut"))}
    assert len(modules) >= 4
    for module in modules.values():
        outputs, channels, *kernel = module.weight.shape
        limit = (6 / ((outputs + channels) * math.prod(kernel))) ** 0.5
        assert 0.8 * limit < module.weight.abs().max() <= limit and not module.bias.any()


def test_other_heads_are_another_network_for_inference():
    """Their tensors have the same names and shapes."""
    four, two = (network(SETTINGS["heads"] | {"num_attention_heads": heads}) for heads in (4, 2))
    x, t = inputs(four)
    fast = InferenceUNet(four, compile=False)
    updated = fast.updated(two)
    assert updated is not fast
    assert_equal(output(updated, x, t), output(two, x, t))
    assert (output(fast, x, t) - output(updated, x, t)).abs().max() > 1e-5


# the authors' networks, whose numbers of parameters are those that their code makes


@pytest.mark.parametrize(
    ("preset", "channels", "parameters"),
    [
        ("adm-imagenet64", (3, 6), 295_904_454),
        ("adm-imagenet256", (3, 6), 553_838_086),
        ("adm-imagenet64-256", (6, 6), 311_795_910),
        ("iddpm-cifar10", (3, 6), 52_546_438),
        ("iddpm-imagenet64", (3, 6), 121_063_942),
        ("ddpmpp-cifar10-vp", (3, 3), 61_804_419),
        ("ddpmpp-cifar10-subvp", (3, 3), 61_804_419),
        ("ncsnpp-cifar10", (3, 3), 62_758_915),
    ],
)
def test_presets(preset, channels, parameters):
    keys = yaml.safe_load((TrainConfig.PRESETS / f"{preset}.yaml").read_text())["unet"]
    with torch.device("meta"):
        net = DDPMUNet(in_channels=channels[0], out_channels=channels[1], **keys)
    assert net.num_parameters() == parameters


def test_published_networks_that_no_preset_has():
    """ADM for 512 pixels, its classifier for 256 pixels, and NCSN++ of UNet2DModel."""
    with torch.device("meta"):
        adm = DDPMUNet(
            out_channels=6,
            block_out_channels=(128, 256, 256, 512, 512, 1024, 1024),
            down_block_types=("ResnetDownsampleBlock2D",) * 4 + ("AttnDownBlock2D",) * 3,
            up_block_types=("AttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",) * 4,
            downsample_type="resnet",
            upsample_type="resnet",
            attention_head_dim=64,
            attn_norm_num_groups=32,
            resnet_time_scale_shift="scale_shift",
            num_class_embeds=1000,
            sinusoid_dim=256,
        )
        classifier = NoisyClassifier(
            256,
            1000,
            block_out_channels=(128, 128, 256, 256, 512, 512),
            down_block_types=("ResnetDownsampleBlock2D",) * 3 + ("AttnDownBlock2D",) * 3,
            layers_per_block=2,
        )
        assert (adm.num_parameters(), classifier.num_parameters()) == (558_997_638, 54_096_360)
        assert DDPMUNet(**NCSNPP_256).num_parameters() == 65_574_549
