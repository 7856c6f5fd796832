import copy

import pytest
import torch

from ddpm_hf import (
    VariationalDDPMScheduler,
    VESDEScheduler,
    VPSDEScheduler,
    bits_per_dim,
    decode,
    encode,
    estimate_bits_per_dim,
    ode_bits_per_dim,
    ode_log_likelihood,
    progressive_coding,
    rate_distortion,
)
from ddpm_hf.evaluation.metrics import (
    compare_manifolds,
    frechet_at_infinity,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from ddpm_hf.likelihood.encoding import interpolate_latents
from support.compare import assert_close

T = 30


@pytest.fixture
def x_start():
    return torch.randint(0, 17, (4, 1, 4, 4)) / 8 - 1


@pytest.fixture
def network(unet):
    return unet(sample_size=4, block_out_channels=(8, 8))


class Convolution(torch.nn.Module):
    """A network for the ODE's solver: one convolution, weaker with time, in a thousandth of the time."""

    dtype = torch.float32

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, t, class_labels=None, return_dict=True):
        return (x * 0.7 + torch.tanh(self.conv(x)) * torch.exp(-torch.as_tensor(t).float() / 1000),)


@pytest.fixture
def scheduler():
    return VariationalDDPMScheduler(T, beta_schedule="squaredcos_cap_v2", levels=17)


def summary(result):
    return *result, result.mean, result.standard_error


def on_both(device, network, function, x, *args, **kwargs):
    """The function's results on the device and on the CPU."""
    there = copy.deepcopy(network).to(device)
    kwargs = [{name: value() if callable(value) else value for name, value in kwargs.items()} for _ in range(2)]
    actual, expected = function(there, *args, x.to(device), **kwargs[0]), function(network, *args, x, **kwargs[1])
    return actual, expected


@pytest.mark.parametrize("variance_type", ["fixed_large", "learned_range"])
@pytest.mark.parametrize("batch_size", [None, 3, 16])
def test_bound(device, unet, scheduler, x_start, generator, variance_type, batch_size):
    learned = variance_type == "learned_range"
    network = unet(sample_size=4, num_class_embeds=3, out_channels=2 if learned else 1)
    scheduler = VariationalDDPMScheduler.from_config(scheduler.config, variance_type=variance_type)
    actual, expected = on_both(
        device,
        network,
        lambda net, x, **kwargs: bits_per_dim(net, scheduler, x, **kwargs),
        x_start,
        class_labels=torch.tensor([0, 2, 1, 0]),
        generator=generator,
        batch_size=batch_size,
    )
    assert all(part.device.type == device.type for part in actual)
    assert_close(actual, expected)
    assert abs(actual.mean - expected.mean) < 1e-4 and abs(actual.standard_error - expected.standard_error) < 1e-4
    assert_close(rate_distortion(actual), rate_distortion(expected))


def test_bound_with_noise_or_a_generator_of_the_device(device, network, scheduler, x_start):
    noise = torch.randn(T, *x_start.shape)
    actual, expected = on_both(
        device, network, lambda net, x: bits_per_dim(net, scheduler, x, noise_fn=lambda t, shape: noise[t]), x_start
    )
    assert_close(actual, expected)
    there = copy.deepcopy(network).to(device)
    one, other = (
        bits_per_dim(there, scheduler, x_start.to(device), generator=torch.Generator(device).manual_seed(2))
        for _ in range(2)
    )
    assert_close(one, other, 1e-6)


def test_progressive_coding(device, network, scheduler, x_start, generator):
    actual, expected = on_both(
        device,
        network,
        lambda net, x, **kwargs: progressive_coding(net, scheduler, x, batch_size=3, **kwargs),
        x_start,
        generator=generator,
    )
    assert_close(actual, expected, 1e-3)


@pytest.mark.parametrize("images", [1, 4])
def test_estimate(device, network, scheduler, x_start, generator, images):
    actual, expected = on_both(
        device,
        network,
        lambda net, x, **kwargs: estimate_bits_per_dim(net, scheduler, x, num_evaluations=20, **kwargs),
        x_start[:images],
        generator=generator,
    )
    assert actual.total.device.type == device.type
    assert_close(actual[:4], expected[:4], 1e-3)
    assert abs(actual.sampling_error - expected.sampling_error) < 1e-3 * max(1, expected.sampling_error)
    source = torch.Generator(device).manual_seed(0)
    there, x = copy.deepcopy(network).to(device), x_start[:images].to(device)
    assert estimate_bits_per_dim(there, scheduler, x, num_evaluations=20, generator=source).total.isfinite().all()


@pytest.mark.parametrize(
    ("process", "trace"),
    [("chain", "rademacher"), ("chain", "gaussian"), ("chain", "exact"), ("vp", "rademacher"), ("ve", "rademacher")],
)
def test_likelihood_by_the_ode(device, scheduler, x_start, generator, process, trace):
    mild = VESDEScheduler(sigma_min=0.1, sigma_max=2.0, clip_sample=True)  # of a steep flow rounding changes the end
    sde = {"chain": scheduler, "vp": VPSDEScheduler(clip_sample=True), "ve": mild}[process]
    actual, expected = on_both(
        device,
        Convolution(),
        lambda net, x, **kwargs: ode_log_likelihood(
            net, sde, x, eps=0.5, trace=trace, probes=2, rtol=1e-2, atol=1e-2, batch_size=3, **kwargs
        ),
        x_start,
        generator=generator,
    )
    assert actual.log_likelihood.dtype == torch.float64
    assert actual.latents.device.type == device.type
    # not the calls: rounding decides whether the solver repeats a step
    assert_close(actual[:3], expected[:3], 2e-3)


@pytest.mark.parametrize("dequantization", ["uniform", "decoder"])
def test_bits_of_the_ode(device, scheduler, x_start, generator, dequantization):
    network, arguments = Convolution(), dict(dequantization=dequantization, rtol=1e-2, atol=1e-2)
    if dequantization == "uniform":
        arguments["eps"] = 0.1
    there, x = copy.deepcopy(network).to(device), x_start.to(device)
    actual = ode_bits_per_dim(there, scheduler, x, generator=generator(), **arguments)
    expected = ode_bits_per_dim(network, scheduler, x_start, generator=generator(), **arguments)
    assert actual.total.dtype == torch.float64
    assert_close(actual, expected, 2e-3)
    assert abs(actual.standard_error - expected.standard_error) < 1e-2
    actual = ode_bits_per_dim(there, scheduler, x, generator=torch.Generator(device).manual_seed(1), **arguments)
    assert actual.total.isfinite().all()


def test_probes_of_a_generator_of_the_device(device, scheduler, x_start):
    there = Convolution().to(device)
    for trace in ("rademacher", "gaussian"):
        source = torch.Generator(device).manual_seed(0)
        actual = ode_log_likelihood(
            there, scheduler, x_start.to(device), eps=0.1, trace=trace, generator=source, rtol=1e-2, atol=1e-2
        )
        assert actual.log_likelihood.isfinite().all()


@pytest.mark.parametrize("steps", [None, 10])
def test_encoding_and_decoding(device, unet, scheduler, x_start, steps):
    network = unet(sample_size=4) if steps else Convolution()
    arguments = dict(num_inference_steps=steps, eps=None if steps else 0.1, rtol=1e-2, atol=1e-2)
    for actual, expected in (
        on_both(device, network, lambda net, x: encode(net, scheduler, x, **arguments), x_start),
        on_both(device, network, lambda net, x: decode(net, scheduler, x, **arguments), x_start),
    ):
        assert actual.sample.device.type == device.type
        assert_close(actual, expected, 2e-3)
    a, b = torch.randn(2, 3, 1, 4, 4)
    assert_close(interpolate_latents(a.to(device), b.to(device), [0.2, 1.0]), interpolate_latents(a, b, [0.2, 1.0]))


def test_ode_of_a_network_of_its_own_classes(device, unet, scheduler, x_start, generator):
    """A `DDPMUNet`, and gradients through it."""
    actual, expected = on_both(
        device,
        unet(sample_size=4, block_out_channels=(8, 8), num_class_embeds=3),
        lambda net, x, **kwargs: ode_log_likelihood(
            net, scheduler, x, class_labels=[0, 2], eps=0.9, rtol=1e-2, atol=1e-2, **kwargs
        ),
        x_start[:2],
        generator=generator,
    )
    assert_close(actual, expected, 2e-3)


def test_ode_of_a_function(device, scheduler, x_start):
    """In float64 where the device has it."""

    def network(x, t, class_labels=None, return_dict=True):
        assert x.device.type == device.type
        assert x.dtype == (torch.float32 if device.type == "mps" else torch.float64)
        return (0.9 * x,)

    actual = encode(network, scheduler, x_start.to(device), rtol=1e-2, atol=1e-2)
    assert actual.sample.device.type == device.type


def test_metrics(device):
    real, generated = torch.randn(2, 40, 6)
    there = real.to(device), generated.to(device)
    assert abs(frechet_distance(*there) - frechet_distance(real, generated)) < 1e-3
    assert precision_recall(*there) == pytest.approx(precision_recall(real, generated), abs=1e-12)
    for metric in (kernel_distance, frechet_at_infinity):
        actual, expected = (
            metric(*pair, generator=torch.Generator().manual_seed(0)) for pair in (there, (real, generated))
        )
        if metric is kernel_distance:
            actual, expected = actual.estimate, expected.estimate
        assert actual == pytest.approx(expected, rel=1e-6)
    assert inception_score(there[0]) == pytest.approx(inception_score(real), rel=1e-9)
    actual, expected = compare_manifolds(*there), compare_manifolds(real, generated)
    assert actual.density == pytest.approx(expected.density, rel=1e-9)
    assert torch.equal(actual.nearest_real, expected.nearest_real)
    assert_close(actual.distance_ratio, expected.distance_ratio, 1e-9)
