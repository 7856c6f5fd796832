"""Convolutions by tiles: the sums of direct ones, forward and backward."""

import copy

import pytest
import torch
import torch.nn.functional as F

from ddpm_hf import DDPMUNet, InferenceUNet
from ddpm_hf.fast.winograd import WinogradConv2d, use_winograd
from support.unet_configs import BASE

WIDE = BASE | {"block_out_channels": (16, 128), "norm_num_groups": 8, "sample_size": 64}


def conv(channels, out, dtype=torch.float64, frozen=False):
    """A residual block's convolution, and the same by tiles."""
    plain = torch.nn.Conv2d(channels, out, 3, padding=1, dtype=dtype)
    tiled = copy.deepcopy(plain)
    assert use_winograd(torch.nn.ModuleList([tiled]), 4, frozen) == 1 and type(tiled) is WinogradConv2d
    return plain, tiled


@pytest.mark.parametrize("shape", [(1, 5, 32, 32), (3, 5, 16, 40), (4, 5, 128, 8), (16, 5, 32, 32)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients(shape, layout):
    plain, tiled = conv(5, 7)
    x = torch.randn(shape, dtype=torch.float64).to(memory_format=layout)
    results = []
    for net in (plain, tiled):
        x_in = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = net(x_in)
        y.cos().sum().backward()
        results.append((y.detach(), x_in.grad, net.weight.grad, net.bias.grad))
    for expected, actual in zip(*results):
        assert expected.shape == actual.shape
        torch.testing.assert_close(actual, expected, atol=1e-11, rtol=1e-11)
    assert not torch.equal(results[0][0], results[1][0])  # it did go by tiles


@pytest.mark.parametrize("shape", [(2, 5, 4, 8), (1, 5, 16, 4)])
def test_frozen(shape):
    plain, tiled = conv(5, 7, frozen=True)
    assert tiled.at_points.shape == (36, 5, 7) and not tiled.at_points.requires_grad
    x = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(tiled(x), plain(x), atol=1e-12, rtol=1e-12)
        assert not torch.equal(tiled(x), plain(x))


@pytest.mark.parametrize("shape", [(4, 5, 30, 32), (4, 5, 32, 33), (1, 5, 12, 16), (1, 5, 1024, 20), (2, 5, 1, 1)])
def test_sizes_without_tiles(shape):
    plain, tiled = conv(5, 7)
    x = torch.randn(shape, dtype=torch.float64)
    assert torch.equal(tiled(x), plain(x))


def test_the_rounding_of_float32():
    # direct sums are rounded less by as much as a machine adds them in more parts: two to five times
    plain, tiled = conv(256, 256, torch.float32)
    x = torch.randn(4, 256, 16, 16)
    with torch.no_grad():
        exact = F.conv2d(x.double(), plain.weight.double(), plain.bias.double(), padding=1)
        errors = [(net(x) - exact).square().mean().sqrt().item() for net in (plain, tiled)]
    assert 0 < errors[1] < 8 * errors[0] and errors[1] < 1e-6


def test_a_training_network_keeps_its_names_and_gradients():
    plain = DDPMUNet(**WIDE).double()
    plain.reset_parameters("torch")
    tiled = copy.deepcopy(plain)
    assert use_winograd(tiled, 128) > 5
    assert list(tiled.state_dict()) == list(plain.state_dict())
    x, t = torch.randn(2, 3, 64, 64, dtype=torch.float64), torch.tensor([3, 700])
    for unet in (plain, tiled):
        unet.train()(x, t).sample.square().mean().backward()
    for (name, expected), actual in zip(plain.named_parameters(), tiled.parameters()):
        torch.testing.assert_close(actual.grad, expected.grad, atol=1e-12, rtol=1e-8, msg=name)
    tiled.eval()
    with torch.no_grad():  # tiles are for training
        assert torch.equal(tiled(x, t).sample, plain.eval()(x, t).sample)
    assert not any(isinstance(module, WinogradConv2d) for module in InferenceUNet(tiled, compile=False).modules())


def test_half_precision_goes_without_tiles():
    plain, tiled = conv(8, 8, torch.float32)
    x = torch.randn(4, 8, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tiled(x), plain(x))
        tiled(x.requires_grad_()).float().sum().backward()


def test_only_convolutions_that_it_can_do():
    kinds = [dict(padding=0), dict(padding=1, stride=2), dict(padding=2)]
    unet = torch.nn.Sequential(
        *(torch.nn.Conv2d(8, 8, 3, **kind) for kind in kinds), torch.nn.Conv2d(8, 8, 1, padding=1)
    )
    assert use_winograd(unet, 4) == 0


def test_inference():
    unet = DDPMUNet(**WIDE | {"block_out_channels": (16, 256)}).eval()
    unet.reset_parameters("torch")
    fast = InferenceUNet(unet, compile=False)
    assert "convolutions by Winograd's tiles" in fast.report
    assert not any(isinstance(module, WinogradConv2d) for module in unet.modules())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = unet(x, 5).sample
    actual = fast(x, 5).sample
    assert not torch.equal(actual, expected)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    # in half precision tiles would round more than sums
    assert "Winograd" not in InferenceUNet(unet, torch.bfloat16, compile=False).report
