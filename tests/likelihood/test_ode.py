import math
import re
from functools import partial

import numpy as np
import pytest
import torch

from ddpm_hf import InferenceUNet, VariationalDDPMScheduler, VESDEScheduler, VPSDEScheduler, bits_per_dim
from ddpm_hf.likelihood.encoding import decode, encode, interpolate_latents
from ddpm_hf.likelihood.ode import OdeStopped, ode_bits_per_dim, ode_log_likelihood
from ddpm_hf.likelihood.solver import process_of
from ddpm_hf.schedulers.sde import VESDE, VPSDE, SubVPSDE
from support.analytic import Mixture
from support.golden_data import PROBED, golden_cases
from support.networks import small_unet

BITS = math.log(2)


@pytest.mark.parametrize("case", golden_cases("sde", "pf_ode_bpd"), ids=lambda case: f"s0={case['s0']}")
def test_golden_likelihoods(case):
    sde = VPSDE()
    x = case["mu"] + case["s0"] * torch.from_numpy(np.random.RandomState(7).randn(4, 3, 8, 8))
    net = Mixture(sde, (case["mu"],), (case["s0"],), (1.0,))
    closed = torch.tensor(case["closed_form_bpd_of_the_flow_with_the_sde_prior"], dtype=torch.float64)
    for tolerance, error in ((case["rtol_atol"], 1e-4), (1e-9, 1e-6)):
        actual = ode_log_likelihood(net, sde, x, eps=case["eps"], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(-actual.log_likelihood / 192 / BITS + 7, closed, rtol=0, atol=error)
    probe = torch.tensor(case["latent_z"]["probe"], dtype=torch.float64)  # of the reference in float32
    torch.testing.assert_close(actual.latents.flatten(1)[:, PROBED], probe, rtol=0, atol=1e-3)


@pytest.mark.parametrize("prediction_type", ["epsilon", "score", "sample", "v_prediction"])
@pytest.mark.parametrize("kind", [VPSDE, SubVPSDE, VESDE])
def test_likelihoods_of_a_mixture_in_closed_form(kind, prediction_type):
    # at t = 1 the prior stands for what is a little off it: with VE by the data's spread in sigma_max
    sde = kind(prediction_type=prediction_type, **({"sigma_max": 500.0} if kind is VESDE else {}))
    net = Mixture(sde)
    x = net.sample(6, 1, 4, 4)
    actual = ode_log_likelihood(net, sde, x, eps=1e-4, trace="exact", rtol=1e-6, atol=1e-6)
    error = (actual.log_likelihood - net.log_prob(x, torch.tensor(1e-4, dtype=torch.float64))) / 16 / BITS
    assert error.abs().max() < 1e-3
    assert (actual.probe_error == 0).all()
    signs = ode_log_likelihood(net, sde, x, eps=1e-4, rtol=1e-6, atol=1e-6, probes=2)  # a diagonal Jacobian: the same
    torch.testing.assert_close(signs.log_likelihood, actual.log_likelihood, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
def test_the_process_through_a_chain(schedule):
    scheduler = VariationalDDPMScheduler(beta_schedule=schedule)
    sde = process_of(scheduler)
    t = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    torch.testing.assert_close(sde.conditioning_times(t), torch.arange(1000, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(sde.scale(t) ** 2, scheduler.alphas_cumprod, rtol=1e-10, atol=0)
    between = sde.log_scale(torch.linspace(0.0005, 0.9995, 5000))
    assert (between.diff() < 0).all()
    t, h = torch.linspace(0.01, 0.99, 37, dtype=torch.float64), 1e-7
    slope = (sde.log_scale(t + h) - sde.log_scale(t - h)) / (2 * h)
    torch.testing.assert_close(slope, sde.drift_coefficient(t), rtol=1e-5, atol=1e-6)
    net = Mixture(sde)
    x = net.sample(4, 1, 3, 3)
    actual = ode_log_likelihood(net, scheduler, x, rtol=1e-6, atol=1e-6)
    error = (actual.log_likelihood - net.log_prob(x, torch.tensor(1e-3, dtype=torch.float64))) / 9 / BITS
    assert error.abs().max() < 1e-3


def mixed(x, c_noise, class_labels=None, return_dict=False):
    """A network whose pixels depend on each other."""
    y = torch.tanh(x.flatten(1) @ torch.linspace(-1, 1, 81, dtype=x.dtype).view(9, 9)).view(x.shape)
    return (0.3 * y + 0.5 * x,)


def test_probes_are_unbiased_and_tell_their_error():
    sde, x = VPSDE(), torch.randn(3, 1, 3, 3, dtype=torch.float64)
    exact = ode_log_likelihood(mixed, sde, x, eps=0.1, trace="exact").log_likelihood
    t = torch.tensor(0.5, dtype=torch.float64)
    for trace in ("rademacher", "gaussian"):
        generator = torch.Generator().manual_seed(0)
        actual = ode_log_likelihood(mixed, sde, x, eps=0.1, trace=trace, probes=100, generator=generator)
        assert ((actual.log_likelihood - exact).abs() < 4 * actual.probe_error).all()
        assert (actual.probe_error > 0).all()
    assert ode_log_likelihood(mixed, sde, x, eps=0.1).probe_error.isnan().all()
    # the exact trace is that of the whole Jacobian
    from ddpm_hf.likelihood.ode import _exact_trace

    x_in = x.clone().requires_grad_()
    jacobian = torch.autograd.functional.jacobian(lambda v: mixed(v[None], t)[0][0], x[1]).reshape(9, 9)
    torch.testing.assert_close(_exact_trace(mixed(x_in, t)[0], x_in)[1], jacobian.trace())


def test_each_image_of_a_batch_has_its_own_error_controlled():
    """One image far from all others, in a batch of many: no worse than alone."""
    sde = VPSDE()
    net = Mixture(sde, (0.0, 0.9), (0.3, 0.003), (0.999, 0.001))
    x = torch.zeros(65, 1, 2, 2, dtype=torch.float64)
    x[64] = 0.9
    exact = ode_log_likelihood(net, sde, x[64:], rtol=1e-10, atol=1e-10, trace="exact").log_likelihood
    alone = ode_log_likelihood(net, sde, x[64:], trace="exact").log_likelihood
    actual = ode_log_likelihood(net, sde, x, trace="exact")
    assert (actual.log_likelihood[64:] - exact).abs() < 2 * (alone - exact).abs() + 1e-3
    batched = ode_log_likelihood(net, sde, x, trace="exact", batch_size=40)
    assert batched.evaluations.shape == (65,) and batched.evaluations[0] < batched.evaluations[64]
    torch.testing.assert_close(batched.log_likelihood, actual.log_likelihood, rtol=1e-3, atol=1e-3)


class Levels:
    """The exact network of a chain for pixels that are each of these levels alike, each alone."""

    def __init__(self, scheduler):
        self.sde, self.dtype = process_of(scheduler), torch.float64
        self.values = 2 * torch.arange(scheduler.levels, dtype=torch.float64) / (scheduler.levels - 1) - 1

    def __call__(self, x, c_noise, class_labels=None, return_dict=False):
        t = self.sde.times(c_noise)
        scale, noise = (v.reshape(-1, 1, 1, 1) for v in (self.sde.scale(t), self.sde.std(t)))
        logs = -0.5 * ((x[..., None] - scale[..., None] * self.values) / noise[..., None]) ** 2
        x_start = (logs.softmax(-1) * self.values).sum(-1)
        return ((x - scale * x_start) / noise,)


def test_the_bits_of_grey_levels_and_the_bound():
    """Pixels of four levels alike hold 2 bits; the ODE pays no more than the bound, on the same chain."""
    scheduler = VariationalDDPMScheduler(levels=4, clip_sample=True)
    net = Levels(scheduler)
    x = net.values[torch.randint(4, (16, 1, 8, 8), generator=torch.Generator().manual_seed(0))]
    generator = torch.Generator().manual_seed(1)
    ode = ode_bits_per_dim(net, scheduler, x, generator=generator, trace="exact")
    scheduler.set_timesteps(timesteps=range(999, -1, -1))
    bound = bits_per_dim(net, scheduler, x, generator=generator)
    assert ode.mean == pytest.approx(2, abs=4 * ode.standard_error + 1e-3)
    assert ode.mean <= bound.mean + 3 * math.hypot(ode.standard_error, bound.standard_error)
    assert bound.mean > 2


def test_uniform_dequantization():
    """Over all levels of a pixel 2^-bits adds to 1 at the most: it is a code; and nearly to 1, for what it loses is little."""
    sde, levels = VPSDE(), 8
    net = Mixture(sde, (0.1,), (0.6,), (1.0,))
    values = 2 * torch.arange(levels, dtype=torch.float64) / (levels - 1) - 1
    x = values.repeat(500)[:, None, None, None]
    actual = ode_bits_per_dim(net, sde, x, levels=levels, generator=torch.Generator().manual_seed(0), trace="exact")
    bits = actual.total.view(500, levels).mean(0)
    inside = 0.5 * (torch.special.erf((torch.tensor([8 / 7, -8 / 7]) - 0.1) / (0.6 * 2**0.5))).diff().abs().item()
    assert 0.97 * inside < (2**-bits).sum().item() < 1.003 * inside
    drawn = torch.rand(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    density = net.log_prob(x + (2 * drawn - 1) / 7, torch.tensor(1e-5, dtype=torch.float64))
    torch.testing.assert_close(actual.total, (-density - math.log(2 / 7)) / BITS, rtol=0, atol=4e-3)


@pytest.mark.parametrize("kind", [VPSDE, SubVPSDE, VESDE])
def test_encodings_of_normal_data_in_closed_form(kind):
    sde = kind()
    net = Mixture(sde, (0.3,), (0.5,), (1.0,))
    x, ends = net.sample(5, 1, 4, 4), torch.tensor([1e-5, 1.0], dtype=torch.float64)
    scale, total = sde.scale(ends), (sde.scale(ends) ** 2 * 0.25 + sde.std(ends) ** 2).sqrt()
    expected = scale[1] * 0.3 + total[1] / total[0] * (x - scale[0] * 0.3)
    actual = encode(net, sde, x, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(actual.sample, expected, rtol=1e-5, atol=1e-5)
    back = decode(net, sde, actual.sample, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(back.sample, x, rtol=0, atol=1e-4)
    assert (actual.evaluations > 6).all() and actual.evaluations.shape == (5,)


def test_encodings_by_ddim_of_a_network_that_errs():
    """Where a cosine chain ends its error is multiplied by thousands, but for clipping."""
    scheduler = VariationalDDPMScheduler(beta_schedule="cosine", timestep_spacing="iddpm")
    exact = Mixture(process_of(scheduler))

    def net(x, t, class_labels=None, return_dict=False):
        return (exact(x, t)[0] + 0.01 * torch.sin(3 * x),)

    x = exact.sample(4, 1, 4, 4).clamp(-1, 1)
    latents = encode(net, scheduler, x, num_inference_steps=250).sample
    back = decode(net, scheduler, latents, num_inference_steps=250).sample
    assert (back - x).abs().max() < 0.1


def outside(sde):
    """A network whose predicted x_0 is beyond 1 for some pixels."""
    return Mixture(sde, (0.9, -0.6), (0.4, 0.3), (0.6, 0.4))


@pytest.mark.parametrize("trace", ["exact", "rademacher"])
def test_the_likelihood_of_a_clipped_flow_of_pixels_that_depend_on_each_other(trace):
    """The prior at the latent, times the determinant of the latents' Jacobian."""
    scheduler, eps = VPSDEScheduler(clip_sample=True), 0.1
    x, h = 0.9 * torch.randn(1, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), 1e-4
    sides = torch.cat((x, x + h * torch.eye(9).view(9, 1, 3, 3), x - h * torch.eye(9).view(9, 1, 3, 3)))
    z = encode(mixed, scheduler, sides, eps=eps, rtol=1e-8, atol=1e-8, max_evaluations=10**5).sample.flatten(1)
    jacobian = (z[1:10] - z[10:]) / (2 * h)
    expected = scheduler.sde.prior_log_prob(z[:1]) + torch.linalg.slogdet(jacobian).logabsdet
    kwargs = dict(eps=eps, rtol=1e-6, atol=1e-6, trace=trace, max_evaluations=10**5)
    actual = ode_log_likelihood(mixed, scheduler, x, probes=30, **kwargs)
    assert (actual.log_likelihood - expected).abs() < 9 * 3e-3 + 5 * actual.probe_error
    free = ode_log_likelihood(mixed, scheduler, x, clip_sample=False, **kwargs)
    assert (free.log_likelihood - expected).abs() > 0.5 + 5 * actual.probe_error
    torch.testing.assert_close(free[2], ode_log_likelihood(mixed, scheduler.sde, x, **kwargs)[2])


@pytest.mark.parametrize("trace", ["rademacher", "gaussian"])
@pytest.mark.parametrize(
    "kind", [VPSDE, partial(VPSDE, prediction_type="v_prediction"), SubVPSDE, partial(VESDE, sigma_max=5.0)]
)
def test_the_likelihood_of_a_clipped_flow_is_that_of_where_it_goes(kind, trace):
    """Pixels of a grid, each alone: the density is the prior's at the latent, times the slope of the latents."""
    sde = kind()
    net, kwargs = outside(sde), dict(eps=0.05, clip_sample=True)
    grid = torch.linspace(-1.2, 1.2, 2001, dtype=torch.float64)
    z = encode(net, sde, grid.view(1, 1, 1, -1), rtol=1e-8, atol=1e-8, **kwargs).sample.flatten()
    slope, middle = z.diff() / grid.diff(), (z[1:] + z[:-1]) / 2
    expected = sde.prior_log_prob(middle[None]) + slope.log().sum()
    x = ((grid[1:] + grid[:-1]) / 2).view(1, 1, 40, 50)
    generator = torch.Generator().manual_seed(0)
    kwargs |= dict(rtol=1e-6, atol=1e-6)
    actual = ode_log_likelihood(net, sde, x, trace=trace, probes=16, generator=generator, **kwargs)
    assert not actual.log_likelihood.requires_grad and not actual.latents.requires_grad
    assert (actual.latents.flatten() - middle).abs().mean() < 1e-3
    error = (actual.log_likelihood - expected).abs().item()
    assert error < 2000 * 1e-3 + (5 * actual.probe_error.item() if trace == "gaussian" else 0)
    plain = ode_log_likelihood(net, sde, x, eps=0.05, trace="rademacher")
    assert (plain.log_likelihood - expected).abs() > 50


def test_a_chain_that_clips_is_clipped_as_an_ode_too():
    """At the noisy end of a cosine chain half of the noise missed makes images a hundred times too large."""
    scheduler = VariationalDDPMScheduler(beta_schedule="cosine", timestep_spacing="iddpm", levels=4)
    plain = VariationalDDPMScheduler.from_config(scheduler.config, clip_sample=False)

    def net(x, t, class_labels=None, return_dict=False):
        return (0.5 * x,)

    noise = torch.randn(8, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert decode(net, scheduler, noise).sample.abs().max() < 1.05
    assert decode(net, plain, noise).sample.abs().max() > 100
    for kind in (scheduler, plain):  # the argument goes before the config, in both ways there are
        for kwargs in ({}, {"num_inference_steps": 50}):
            actual = decode(net, plain, noise, clip_sample=kind.config.clip_sample, **kwargs).sample
            torch.testing.assert_close(actual, decode(net, kind, noise, **kwargs).sample)
    assert not plain.config.clip_sample
    half = VariationalDDPMScheduler.from_config(scheduler.config, clip_sample_range=0.5)
    ode = VPSDEScheduler.from_config(half.config, predictor="ddim")
    for process in (half, ode):
        assert 0.4 < decode(net, process, noise, eps=1e-3).sample.abs().max() < 0.55
    ode.set_timesteps(50)
    assert ode.step(net(noise, 999)[0], ode.timesteps[0], noise).pred_original_sample.abs().max() == 0.5
    # thresholding is of the steps alone
    quantile = VariationalDDPMScheduler.from_config(scheduler.config, clip_sample=False, thresholding=True)
    for kwargs in ({}, {"num_inference_steps": 50}):
        assert decode(net, quantile, noise, clip_sample=False, **kwargs).sample.abs().max() > 100


def test_images_from_0_to_1_are_clipped_to_that():
    process = VESDEScheduler(centered=False, clip_sample=True, prediction_type="epsilon")
    noise = 50 * torch.randn(8, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    actual = decode(lambda x, c_noise, **kwargs: (-x / c_noise,), process, noise, rtol=1e-3, atol=1e-3).sample / 2 + 0.5
    assert abs(actual.min()) < 0.1 and abs(actual.max() - 1) < 0.1  # noise of 0.01 is left in them


def test_clipping_and_uniform_dequantization_do_not_go_together():
    """It takes the outermost levels beyond [-1, 1], where a flow of clipped images has no density."""
    x = torch.full((2, 1, 4, 4), -1.0)
    process = VPSDEScheduler(clip_sample=True)
    net = Mixture(process.sde, (-1.0, 0.5), (0.01, 0.3))
    totals = [
        ode_bits_per_dim(net, scheduler, x, generator=torch.Generator().manual_seed(0)).total
        for scheduler in (process, VPSDEScheduler())
    ]
    torch.testing.assert_close(*totals)
    with pytest.raises(ValueError, match="^clip_sample=True cuts off what dequantization='uniform' adds"):
        ode_bits_per_dim(net, process, x, clip_sample=True)


def test_encodings_by_ddim():
    scheduler = VariationalDDPMScheduler(beta_schedule="cosine", clip_sample=True, timestep_spacing="iddpm")
    net = Mixture(process_of(scheduler))
    x = net.sample(4, 1, 4, 4)
    exact = encode(net, scheduler, x, rtol=1e-8, atol=1e-8).sample
    errors = []
    for steps in (50, 500):
        actual = encode(net, scheduler, x, num_inference_steps=steps)
        assert (actual.evaluations == steps).all()
        back = decode(net, scheduler, actual.sample, num_inference_steps=steps).sample
        errors.append([(actual.sample - exact).abs().mean().item(), (back - x).abs().mean().item()])
    assert errors[1][0] < 0.2 * errors[0][0] and errors[1][1] < 0.2 * errors[0][1] and errors[1][1] < 0.02
    assert scheduler.config.clip_sample and len(scheduler.chain) == 1000


def test_interpolated_latents_stay_on_the_sphere():
    a, b = torch.randn(2, 3, 1, 4, 4)
    b = b * (a.flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
    mixed = interpolate_latents(a, b, [0.0, 0.25, 0.5, 1.0]).view(3, 4, 1, 4, 4)
    torch.testing.assert_close(mixed[:, 0], a)
    torch.testing.assert_close(mixed[:, 3], b)
    norms = mixed.flatten(2).norm(dim=2)
    torch.testing.assert_close(norms, norms[:, :1].expand(-1, 4))
    same = interpolate_latents(a, a, [0.5])
    torch.testing.assert_close(same, a)


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return small_unet(num_class_embeds=3, dropout=0.3).train()


def test_a_network_with_classes(unet):
    scheduler = VariationalDDPMScheduler(levels=17)
    x = torch.randint(17, (3, 1, 4, 4), generator=torch.Generator().manual_seed(2)) / 8 - 1.0
    labels = torch.tensor([0, 1, 2])
    kwargs = dict(class_labels=labels, rtol=1e-2, atol=1e-2)
    actual = ode_bits_per_dim(unet, scheduler, x, generator=torch.Generator().manual_seed(0), **kwargs)
    assert actual.total.isfinite().all() and actual.standard_error > 0
    assert unet.training and all(module.training for module in unet.modules())
    batched = ode_bits_per_dim(unet, scheduler, x, generator=torch.Generator().manual_seed(0), batch_size=2, **kwargs)
    torch.testing.assert_close(batched.total, actual.total, rtol=0.1, atol=0.1)
    exact = ode_bits_per_dim(unet, scheduler, x, trace="exact", generator=torch.Generator().manual_seed(0), **kwargs)
    assert (exact.probe_error == 0).all()
    fast = InferenceUNet(unet, compile=False)
    with pytest.raises(ValueError, match="^the network gives no gradients"):
        ode_log_likelihood(fast, scheduler, x, class_labels=labels)
    # in float64: a network that knows nothing multiplies rounding errors; not clipped: kinks stop the solver
    unet, x = unet.double(), x.double()
    kwargs |= dict(clip_sample=False)
    z = encode(InferenceUNet(unet, compile=False), scheduler, x, **kwargs)
    expected = encode(unet, scheduler, x, **kwargs)
    assert z.sample.dtype == x.dtype
    torch.testing.assert_close(z.sample, expected.sample, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"rtol": 0.0}, "rtol=0.0 must be above 0"),
        ({"atol": -1.0}, "atol=-1.0 must be above 0"),
        ({"atol": math.nan}, "atol=nan must be above 0"),
        ({"eps": 1.0}, "eps=1.0 must be above 0 and below 1"),
        ({"eps": 0.0}, "eps=0.0 must be above 0 and below 1"),
        ({"trace": "hutchinson"}, "trace='hutchinson' is not known; choose one of rademacher,"),
        ({"probes": 0}, "probes=0 must be an integer"),
        ({"batch_size": 0}, "batch_size=0 must be an integer"),
        ({"class_labels": [1]}, "class_labels has 1 entries for 2 images"),
    ],
)
def test_bad_arguments(arguments, message):
    sde, x = VPSDE(), torch.zeros(2, 1, 2, 2)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        ode_log_likelihood(Mixture(sde), sde, x, **arguments)


def test_a_process_that_does_not_fit_the_network(unet):
    x = torch.zeros(1, 1, 8, 8)
    with pytest.raises(ValueError, match="^VESDE needs a network with time_embedding_type='fourier', this one has"):
        ode_log_likelihood(unet, VESDE(), x)
    with pytest.raises(ValueError, match="^the network has in_channels=1; the images have 3"):
        encode(unet, VPSDE(), torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="^process is of <class 'int'>; give VPSDE"):
        encode(unet, 7, x)
    with pytest.raises(ValueError, match="^prediction_type='previous'"):
        encode(unet, VariationalDDPMScheduler(prediction_type="previous"), x)
    with pytest.raises(ValueError, match="^alphas_cumprod must fall and stay above 0"):
        encode(unet, VariationalDDPMScheduler(rescale_betas_zero_snr=True), x)
    with pytest.raises(ValueError, match="^dequantization='decoder' needs the L_0"):
        ode_bits_per_dim(unet, VPSDE(), x, levels=2, dequantization="decoder")
    with pytest.raises(
        ValueError, match="^eps=1e-05 must be above 0 and below 1, and in a chain at least 1 / T = 0.001"
    ):
        encode(unet, VariationalDDPMScheduler(), x, eps=1e-5)
    with pytest.raises(ValueError, match="^eps=0.1 is for the adaptive solver"):
        encode(unet, VariationalDDPMScheduler(), x, eps=0.1, num_inference_steps=10)
    with pytest.raises(ValueError, match="grey level off the grid of levels=3"):
        ode_bits_per_dim(unet, VPSDEScheduler(), x + 0.3, levels=3)


def test_a_process_of_images_from_0_to_1():
    """NCSN's: the same bits and images as of the process of twice the sigmas, in [-1, 1]."""
    kwargs = dict(prediction_type="score", num_train_timesteps=100)
    ours = VESDEScheduler(sigma_min=0.02, sigma_max=100.0, **kwargs)
    theirs = VESDEScheduler(sigma_min=0.01, sigma_max=50.0, centered=False, **kwargs)
    nets = Mixture(ours.sde), Mixture(theirs.sde, (0.25, 0.7), (0.05, 0.1))
    x = torch.randint(0, 8, (3, 1, 4, 4), generator=torch.Generator().manual_seed(0)) / 3.5 - 1.0
    actual = [
        ode_bits_per_dim(net, process, x.double(), levels=8, generator=torch.Generator().manual_seed(0))
        for net, process in zip(nets, (ours, theirs))
    ]
    # half a level of grey lies between their priors: 0.5 / 50 nats for a latent of one standard deviation
    torch.testing.assert_close(actual[0].total, actual[1].total, rtol=0, atol=0.02)
    for net, process in zip(nets, (ours, theirs)):
        latents = encode(net, process, x.double()).sample
        assert latents.std() > 10
        torch.testing.assert_close(decode(net, process, latents).sample, x.double(), rtol=0, atol=2e-2)


def test_a_solver_that_is_stopped_says_how_far_it_came():
    sde = VPSDE()
    net, x = Mixture(sde), torch.zeros(2, 1, 2, 2)
    with pytest.raises(OdeStopped, match=r"^the ODE from t=1e-05 to 1 has reached t=0\.\d+ after max_evaluations=20;"):
        ode_log_likelihood(net, sde, x, max_evaluations=20)

    def broken(x, c_noise, class_labels=None, return_dict=False):
        output = net(x, c_noise)[0]
        return (torch.where(sde.times(c_noise) > 0.5, output[:1] * math.nan, output),)

    for clip in (False, True):
        with pytest.raises(OdeStopped, match=r"^the ODE has a state that is not finite at t="):
            encode(broken, sde, x, clip_sample=clip)
        with pytest.raises(OdeStopped, match=r"^the ODE has a state that is not finite at t="):
            ode_log_likelihood(lambda x, c_noise, **kwargs: (x * 1e300 * 1e300,), sde, x + 0.1, clip_sample=clip)
