"""Sines and cosines of the finest bits beside the image (VDM, Kingma et al. 2021), computed once more in float64."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ddpm_hf import DDPMSuperResolutionPipeline, DDPMUNet, InferenceUNet, NoisyClassifier
from ddpm_hf.models.blocks import append_fourier_features
from ddpm_hf.original.writing import FORMATS
from support.networks import small_unet
from support.unet_configs import BASE, NCSNPP

EXPONENTS = (3, 4)


def by_hand(x, exponents=EXPONENTS):
    """x (B, C, H, W), its sines and its cosines, channel by channel in float64."""
    planes = x.double().numpy()
    channels = range(x.shape[1])
    for function in (np.sin, np.cos):
        waves = [function(np.pi * 2**n * x.double().numpy()[:, c : c + 1]) for n in exponents for c in channels]
        planes = np.concatenate((planes, *waves), axis=1)
    return torch.from_numpy(planes)


def network(config=BASE, dtype=torch.float64, **own):
    torch.manual_seed(0)
    unet = DDPMUNet(**config | {"fourier_features": EXPONENTS} | own)
    unet.reset_parameters("torch")
    return unet.to(dtype).eval()


def images(channels=3, size=8, batch=2):
    return 2 * torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


class Seen:
    """The last input of a module."""

    def __init__(self, module):
        module.register_forward_pre_hook(lambda module, args: setattr(self, "value", args[0]))


@torch.no_grad()
def first_input(net, x, t=7):
    seen = Seen((net.net if isinstance(net, InferenceUNet) else net).conv_in)
    net(x, t)
    return seen.value


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("exponents", [(7, 8), (0,), (16, 2, 5)], ids=str)
def test_outputs_are_those_of_a_plain_network_with_more_channels(exponents, centered):
    net = network(fourier_features=exponents, center_input_sample=centered)
    x, factor = images(), 1 + 2 * len(exponents)
    assert net.conv_in.weight.shape == (16, 3 * factor, 3, 3)
    plain = DDPMUNet(**BASE | {"in_channels": 3 * factor}).double().eval()
    plain.load_state_dict(net.state_dict())
    planes = by_hand(2 * x.double() - 1 if centered else x, exponents)
    for t in (3, torch.tensor([3, 900])):
        with torch.no_grad():
            expected = plain(planes, t).sample
            first = F.conv2d(planes, net.conv_in.weight, net.conv_in.bias, padding=1)
            skips = net.encode(x.double(), net.embed(torch.tensor([3])))[1]
            torch.testing.assert_close(skips[0], first, rtol=1e-9, atol=1e-9)
            for fast in (net, InferenceUNet(net, compile=False)):
                torch.testing.assert_close(fast(x.double(), t).sample, expected, rtol=1e-9, atol=1e-9)


def test_the_pyramid_of_ncsnpp_is_of_the_plain_image():
    net, x, seen = network(NCSNPP, torch.float32), images(size=16), []
    net.down_blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[3]))
    assert first_input(net, x, 7.0).shape[1] == 15
    assert torch.equal(seen[0], x)


def test_grey_levels():
    """17 levels are 1/8 apart: exponent 3 tells even from odd ones, exponent 4 the position within a level."""
    x = torch.linspace(-1, 1, 17).view(1, 1, 1, 17)

    def features(x):
        planes = append_fourier_features(x, EXPONENTS, torch.float64)[0, :, 0]
        return dict(zip(("x", "sin 3", "sin 4", "cos 3", "cos 4"), planes))

    at_levels, between, above = features(x), features(x + 1 / 16), features(x + 1 / 32)
    signs = torch.tensor([1.0, -1.0] * 8 + [1.0], dtype=torch.float64)
    zeros, ones = torch.zeros(17, dtype=torch.float64), torch.ones(17, dtype=torch.float64)
    for of, name, expected in (
        (at_levels, "sin 3", zeros), (at_levels, "cos 3", signs), (at_levels, "sin 4", zeros), (at_levels, "cos 4", ones),
        (between, "sin 3", signs), (between, "cos 3", zeros), (between, "sin 4", zeros), (between, "cos 4", -ones),
        (above, "sin 4", ones), (above, "cos 4", zeros), (features(x - 1 / 32), "sin 4", -ones),
    ):  # fmt: skip
        torch.testing.assert_close(of[name], expected, rtol=0, atol=1e-6)
    assert torch.equal(at_levels["x"], x.flatten().double())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_all_exponents_are_exact_in_every_dtype(dtype):
    """The features are those of the image as it is given, to the rounding of float32."""
    x = images().to(dtype)
    exponents = (0, 1, 7, 8, 12, 15, 16)
    actual = append_fourier_features(x, exponents, torch.float64)
    torch.testing.assert_close(actual, by_hand(x, exponents), rtol=0, atol=1e-6)
    assert torch.equal(actual[:, :3].to(dtype), x) and append_fourier_features(x, exponents, dtype).dtype == dtype


def test_gradients():
    x = images().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: append_fourier_features(x, (0, 3), x.dtype), x)
    (slope,) = torch.autograd.grad(append_fourier_features(x, (4,), x.dtype)[:, 3:6].sum(), x)
    torch.testing.assert_close(slope, 16 * math.pi * torch.cos(16 * math.pi * x.detach()))


# half precision


def naive(x, exponents=(7, 8)):
    """As if the angles were computed in bfloat16."""
    x = x.bfloat16()
    waves = [function(math.pi * 2**n * x) for function in (torch.sin, torch.cos) for n in exponents]
    return torch.cat((x, *waves), 1).double()


@pytest.mark.parametrize("kind", ["autocast", "inference"])
def test_float32_images_in_a_network_of_half_precision(kind):
    net, x = network(dtype=torch.float32, fourier_features=(7, 8)), images()
    expected = by_hand(x, (7, 8))
    if kind == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            planes = first_input(net, x)
    else:
        planes = first_input(InferenceUNet(net, torch.bfloat16, compile=False), x)
        assert planes.dtype == torch.bfloat16
    waves = slice(3, None)
    assert (planes[:, waves].double() - expected[:, waves]).abs().max() < 2**-8
    assert (naive(x)[:, waves] - expected[:, waves]).abs().max() > 0.5


def test_weights_of_half_precision():
    """Images of half precision have lost the finest bits; what they still have is computed in float32."""
    net, x = network(dtype=torch.bfloat16, fourier_features=(3, 8)), images().bfloat16()
    planes = first_input(copy.deepcopy(net), x)
    assert planes.dtype == torch.bfloat16
    assert (planes[:, 3:].double() - by_hand(x, (3, 8))[:, 3:]).abs().max() < 2**-8
    with torch.no_grad():
        assert net(x, 7).sample.dtype == torch.bfloat16
    for fast in (InferenceUNet(net, compile=False), InferenceUNet(network(dtype=torch.float32), torch.float16, False)):
        assert fast(images(), 7).sample.isfinite().all()


# layout, compilation, pipelines


def test_channels_last():
    net, x = network(), images().double()
    with torch.no_grad():
        expected = net(x, 7).sample
        planes = first_input(net.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last))
        assert planes.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(net(x.to(memory_format=torch.channels_last), 7).sample, expected)


@pytest.mark.slow
def test_compiled_for_inference():
    net, x = network(dtype=torch.float32, fourier_features=(7, 8)), images()
    with torch.no_grad():
        expected = net(x, 7).sample
    fast = InferenceUNet(net)
    torch.testing.assert_close(fast(x, 7).sample, expected, rtol=1e-4, atol=1e-4)
    assert all(path is fast.compiled for path in fast.paths.values())


def test_super_resolution(make_upsampler, tmp_path):
    """The planes of the small image and of its noise level get features too."""
    pipeline = make_upsampler(noise=0.5, fourier_features=EXPONENTS)
    assert pipeline.unet.conv_in.in_channels == 3 * 5
    call = dict(num_inference_steps=3, output_type="latent", noise_level=0.2)
    low = torch.rand(2, 1, 8, 8) * 2 - 1
    seen = Seen(pipeline.unet.conv_in)
    drawn = pipeline(low, generator=torch.Generator().manual_seed(0), **call).images
    planes = seen.value
    torch.testing.assert_close(planes.double(), by_hand(planes[:, :3]), rtol=0, atol=1e-6)
    pipeline.save_pretrained(tmp_path)
    opened = DDPMSuperResolutionPipeline.from_pretrained(tmp_path)
    opened.set_progress_bar_config(disable=True)
    for optimized in (False, True):
        if optimized:
            opened.optimize(compile=False)
        again = opened(low, generator=torch.Generator().manual_seed(0), **call).images
        torch.testing.assert_close(again, drawn, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", FORMATS)
def test_other_code_bases_lack_them(format, tmp_path):
    path = tmp_path / f"network{FORMATS[format].suffixes[0]}"
    with pytest.raises(ValueError) as error:
        small_unet(fourier_features=[3, 4]).save_single_file(path, format)
    assert str(error.value) == f"{format} has no network with fourier_features=[3, 4]; there it is None"
    assert not path.exists()


def test_classifiers_do_not_have_them():
    with pytest.raises(TypeError, match="fourier_features"):
        NoisyClassifier(8, 3, fourier_features=(3, 4))
