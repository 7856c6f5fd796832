"""`VariationalDDPMScheduler` against closed forms: schedules, q, p, the bound, the decoder, the samplers."""

import gc
import itertools
import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from torch.distributions import Normal, kl_divergence

from ddpm_hf.schedulers.betas import BETA_SCHEDULES
from ddpm_hf.schedulers.ddpm import PREDICTION_TYPES, TIMESTEP_SPACINGS, VARIANCE_TYPES, VariationalDDPMScheduler
from ddpm_hf.schedulers.gaussian import discretized_gaussian_log_likelihood, gaussian_kl
from ddpm_hf.schedulers.tables import _Tables
from support.golden_data import SEED_Q, SEED_STEP, SEED_X, images, network, randn

F64 = torch.float64
# Chains of every kind: (config, arguments of set_timesteps or None for all T)
CHAINS = {
    "all": ({}, None),
    "leading": ({"timestep_spacing": "leading"}, {"num_inference_steps": 10}),
    "offset": ({"timestep_spacing": "leading", "steps_offset": 1}, {"num_inference_steps": 10}),
    "trailing": ({"timestep_spacing": "trailing"}, {"num_inference_steps": 7}),
    "linspace": ({"timestep_spacing": "linspace"}, {"num_inference_steps": 10}),
    "iddpm": ({"timestep_spacing": "iddpm"}, {"num_inference_steps": 6}),
    "custom": ({}, {"timesteps": [999, 640, 3, 2]}),
    "one": ({}, {"timesteps": [700]}),
    "cosine": ({"beta_schedule": "cosine"}, {"num_inference_steps": 10}),
    "short": ({"num_train_timesteps": 30, "beta_schedule": "linear_scaled_by_T"}, None),
}
each_chain = pytest.mark.parametrize("chain", CHAINS)


X_START_MSE = 0.3  # of the variance "analytic", at all timesteps


def make(chain="all", **config):
    base, arguments = CHAINS[chain]
    if config.get("variance_type") == "analytic":
        config["x_start_mse"] = [X_START_MSE] * (base | config).get("num_train_timesteps", 1000)
    scheduler = VariationalDDPMScheduler(**base | config)
    if arguments:
        scheduler.set_timesteps(**arguments)
    return scheduler


def alpha_bars(scheduler, t):
    """abar at t and at the chain's step before, in plain Python."""
    alpha_bar = np.cumprod(1 - scheduler.betas.numpy())
    i = scheduler.chain.index(t)
    return float(alpha_bar[t]), float(alpha_bar[scheduler.chain[i - 1]]) if i else 1.0


def close(actual, expected, rtol=0.0, atol=0.0):
    expected = torch.as_tensor(expected, dtype=actual.dtype).expand_as(actual)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


# Schedules


def closed_form(name, T, start, end):
    i, u = np.arange(T), np.arange(T + 1) / T
    ramp = i / (T - 1)
    if name in ("linear", "linear_scaled_by_T"):
        return (start + (end - start) * ramp) * (1000 / T if "scaled" in name else 1)
    if name in ("quad", "scaled_linear"):
        return (start**0.5 * (1 - ramp) + end**0.5 * ramp) ** 2
    if name in ("warmup10", "warmup50"):
        n = T // (10 if name == "warmup10" else 2)
        return np.where(i < n, start + (end - start) * i / max(n - 1, 1), end)
    if name in ("const", "jsd"):
        return np.full(T, end) if name == "const" else 1 / (T - i)
    if name == "sigmoid":
        return start + (end - start) / (1 + np.exp(6 - 12 * ramp))
    if name == "laplace":
        snr = (1 - np.abs(1 - 2 * u) + 1e-6) ** np.where(u <= 0.5, -0.5, 0.5)
        alpha_bar = (snr / (1 + snr)) ** 0.5
    else:
        alpha_bar = np.sin((1 - u) / 1.008 * math.pi / 2) ** 2  # cos(x) = sin(pi / 2 - x)
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


def test_closed_forms_are_of_all_schedules():
    of_diffusers = {"linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"}
    of_the_papers = {"linear", "quad", "warmup10", "warmup50", "const", "jsd", "cosine", "linear_scaled_by_T"}
    assert set(BETA_SCHEDULES) == of_diffusers | of_the_papers


@pytest.mark.parametrize("name", BETA_SCHEDULES)
@pytest.mark.parametrize("start, end", [(1e-4, 0.02), (0.001, 0.012)])
@pytest.mark.parametrize("T", [2, 10, 100, 1000])
def test_schedule(name, T, start, end):
    if name == "linear_scaled_by_T" and T < 100:
        T = {2: 25, 10: 60}[T]  # 1000 / T times 0.02 would be above 1
    scheduler = VariationalDDPMScheduler(T, start, end, name)
    expected = closed_form(name, T, start, end)
    assert expected.shape == (T,) and scheduler.betas.dtype == F64
    np.testing.assert_allclose(scheduler.betas, expected, rtol=1e-12, atol=2e-15)
    np.testing.assert_allclose(scheduler.alphas_cumprod, np.cumprod(1 - expected), rtol=1e-9, atol=1e-15)
    assert scheduler.timesteps.tolist() == list(range(T))[::-1] and scheduler.chain == list(range(T))


def test_trained_betas_come_before_the_schedule():
    betas = [0.5, 0.1, 0.3]
    scheduler = VariationalDDPMScheduler(3, beta_schedule="quad", trained_betas=np.array(betas))
    assert scheduler.betas.tolist() == betas
    close(scheduler.alphas_cumprod, [0.5, 0.45, 0.315], rtol=1e-15)


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "quad", "cosine"])
def test_zero_terminal_snr(name):
    plain = np.cumprod(1 - closed_form(name, 1000, 1e-4, 0.02)) ** 0.5
    expected = ((plain - plain[-1]) * plain[0] / (plain[0] - plain[-1])) ** 2
    config = {"beta_schedule": name, "rescale_betas_zero_snr": True, "clip_sample": False}
    scheduler = VariationalDDPMScheduler(prediction_type="v_prediction", **config)
    np.testing.assert_allclose(scheduler.alphas_cumprod, expected, rtol=1e-9, atol=1e-18)
    assert scheduler.alphas_cumprod[-1] == 0
    x_start, x_t = images(), randn(SEED_X)
    close(scheduler.prior_bits_per_dim(x_start), 0.0)
    p = scheduler.p_mean_variance(-x_start, x_t, 999)
    close(p.pred_original_sample, x_start, atol=1e-12)
    close(scheduler.vlb_term(-x_start, x_start, x_t, 999), 0.0, atol=1e-12)
    epsilon = VariationalDDPMScheduler(**config | {"clip_sample": True})
    for dtype in F64, torch.float32, torch.float16:
        for eta in None, 0:
            step = epsilon.step(x_t.to(dtype), 999, x_t.to(dtype), eta=eta)
            assert step.prev_sample.isfinite().all() and step.pred_original_sample.abs().max() <= 1


@pytest.mark.parametrize(
    "config, named",
    [
        ({"beta_schedule": "linaer"}, "linaer"),
        ({"prediction_type": "noise"}, "noise"),
        ({"timestep_spacing": "even"}, "even"),
        ({"levels": 1}, "levels=1"),
        ({"levels": 2.5}, "levels=2.5"),
        ({"num_train_timesteps": 0}, "num_train_timesteps=0"),
        ({"num_train_timesteps": 2, "trained_betas": [0.1, 0.0]}, "0.0 at t=1"),
        ({"num_train_timesteps": 2, "trained_betas": [0.1, -0.5]}, "-0.5 at t=1"),
        (
            {"num_train_timesteps": 2, "trained_betas": [math.nan, 0.5]},
            "trained_betas=.nan, 0.5. must be a list of numbers",
        ),
    ],
)
def test_refused_config(config, named):
    with pytest.raises(ValueError, match=named):
        VariationalDDPMScheduler(**config)


# q and p


@each_chain
def test_q_and_its_inverse(chain):
    scheduler, x_start, noise = make(chain), images(), randn(SEED_Q)
    for t in scheduler.chain[:2] + scheduler.chain[-1:]:
        alpha_bar, _ = alpha_bars(scheduler, t)
        x_t = scheduler.q_sample(x_start, t, noise)
        close(x_t, alpha_bar**0.5 * x_start + (1 - alpha_bar) ** 0.5 * noise, atol=1e-12)
        assert torch.equal(x_t, scheduler.add_noise(x_start, noise, torch.tensor([t])))
        q = scheduler.q_mean_variance(x_start, t)
        close(q.mean, alpha_bar**0.5 * x_start, atol=1e-13)
        close(q.variance, 1 - alpha_bar, rtol=1e-11)
        close(q.log_variance, math.log(1 - alpha_bar), atol=1e-11)
        close(scheduler.epsilon_from_x_start(x_start, x_t, t), noise, atol=1e-9)


@each_chain
def test_the_four_predictions_are_one(chain):
    """Told the truth in any of the four ways, p's mean is q's posterior mean."""
    x_start, noise = images(), randn(SEED_Q)
    for prediction_type in PREDICTION_TYPES:
        scheduler = make(chain, prediction_type=prediction_type, clip_sample=False)
        for t in scheduler.chain[:3] + scheduler.chain[-2:]:
            alpha_bar, _ = alpha_bars(scheduler, t)
            x_t = scheduler.q_sample(x_start, t, noise)
            posterior = scheduler.q_posterior(x_start, x_t, t)
            output = {
                "epsilon": noise,
                "sample": x_start,
                "v_prediction": alpha_bar**0.5 * noise - (1 - alpha_bar) ** 0.5 * x_start,
                "previous": posterior.mean,
            }[prediction_type]
            p = scheduler.p_mean_variance(output, x_t, t)
            close(p.pred_original_sample, x_start, atol=1e-8)
            close(p.mean, posterior.mean, atol=1e-9)
            if t != scheduler.chain[0] and scheduler.variance_type == "fixed_small":
                close(scheduler.vlb_term(output, x_start, x_t, t), 0.0, atol=1e-9)


def test_clipping_leaves_the_mean_of_previous_prediction():
    x_t, output = randn(SEED_X), 3 * randn(SEED_Q)
    for clip in True, False:
        p = make(prediction_type="previous").p_mean_variance(output, x_t, 500, clip_sample=clip)
        assert torch.equal(p.mean, output)
        assert (p.pred_original_sample.abs().max() <= 1) == clip


@each_chain
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_variances(chain, variance_type):
    scheduler, x_t = make(chain, variance_type=variance_type), randn(SEED_X)
    values = torch.tanh(2 * randn(SEED_STEP))
    steps = scheduler.chain
    for i in {0, 1, len(steps) - 1} & set(range(len(steps))):
        alpha_bar, alpha_bar_prev = alpha_bars(scheduler, steps[i])
        beta = 1 - alpha_bar / alpha_bar_prev
        # the second step's posterior variance stands in for the first's 0; beta where there is no second
        first, after = alpha_bars(scheduler, steps[max(i, 1) if len(steps) > 1 else 0])[::-1]
        small = (1 - after / first) * (1 - first) / (1 - after) if len(steps) > 1 else beta
        large = beta if i else small
        of_x_start = beta * math.sqrt(alpha_bar_prev) / (1 - alpha_bar)
        posterior = beta * (1 - alpha_bar_prev) / (1 - alpha_bar)
        output = torch.cat((x_t, values), dim=1) if "learned" in variance_type else x_t
        p = scheduler.p_mean_variance(output, x_t, steps[i])
        expected = {
            "fixed_small": math.log(small),
            "fixed_small_log": math.log(small),
            "fixed_large": math.log(large),
            "fixed_large_log": math.log(large),
            "analytic": math.log(posterior + of_x_start**2 * X_START_MSE),
            "learned": values,
            "learned_range": math.log(small) * (1 - values) / 2 + math.log(beta) * (1 + values) / 2,
        }[variance_type]
        close(p.log_variance, expected, atol=1e-10)
        if variance_type == "fixed_small" and i == 0:
            close(p.variance, 0.0)
        else:
            close(p.variance, p.log_variance.exp(), rtol=1e-12)
        variance = scheduler._get_variance(steps[i], values)
        close(variance.double().expand_as(p.variance), p.variance, rtol=1e-12)


def test_wrong_channels():
    x_t = randn(SEED_X)
    for variance_type, channels in ("fixed_small", 6), ("learned", 3), ("learned_range", 9):
        scheduler, output = make(variance_type=variance_type), torch.zeros(4, channels, 8, 8)
        for call, arguments in (
            (scheduler.p_mean_variance, (output, x_t, 5)),
            (scheduler.step, (output, 5, x_t)),
            (scheduler.reverse_step, (output, 5, x_t)),
            (scheduler.vlb_term, (output, x_t, x_t, 5)),
        ):
            with pytest.raises(ValueError, match=f"{channels} channels"):
                call(*arguments)


# The bound: KL


def test_kl_against_torch():
    mean1, lv1, mean2, lv2 = (3 * randn(seed) for seed in range(4))
    expected = kl_divergence(Normal(mean1, (0.5 * lv1).exp()), Normal(mean2, (0.5 * lv2).exp()))
    close(gaussian_kl(mean1, lv1, mean2, lv2), expected, rtol=1e-12, atol=1e-13)
    # nearly equal Gaussians do not cancel, in float32 either: (r^2 / 4 + ...) of r = 1e-3
    zero = torch.zeros(1)
    close(gaussian_kl(zero, zero, zero, zero + 1e-3), 2.49917e-7, rtol=1e-3)


@each_chain
def test_terms_against_torch(chain):
    scheduler = make(chain, variance_type="learned", prediction_type="previous", clip_sample=False)
    x_start, values = images(), 0.3 * randn(SEED_STEP) - 3
    for t in scheduler.chain[1:3] + scheduler.chain[-1:]:
        if t == scheduler.chain[0]:
            continue
        x_t = scheduler.q_sample(x_start, t, randn(SEED_Q))
        q = scheduler.q_posterior(x_start, x_t, t)
        output = torch.cat((q.mean + 0.1, values), dim=1)
        expected = kl_divergence(Normal(q.mean, q.variance.sqrt()), Normal(q.mean + 0.1, (0.5 * values).exp()))
        close(scheduler.vlb_term(output, x_start, x_t, t), expected.mean((1, 2, 3)) / math.log(2), rtol=1e-10)
    alpha_bar, _ = alpha_bars(scheduler, scheduler.chain[-1])
    expected = kl_divergence(Normal(alpha_bar**0.5 * x_start, (1 - alpha_bar) ** 0.5), Normal(0.0, 1.0))
    close(scheduler.prior_bits_per_dim(x_start), expected.mean((1, 2, 3)) / math.log(2), rtol=1e-8, atol=1e-13)


# The bound: the decoder


def exact_log_likelihood(x, mean, log_scale, levels):
    """Of one pixel, with its derivatives by mean and log_scale, in 60 digits."""
    with mpmath.workdps(60):
        x, mean, scale = mpmath.mpf(x), mpmath.mpf(mean), mpmath.exp(mpmath.mpf(log_scale))
        half = mpmath.mpf(1) / (levels - 1)
        lower = None if x < -1 + half else (x - half - mean) / scale
        upper = None if x > 1 - half else (x + half - mean) / scale

        def below(z):  # the normal CDF
            return mpmath.erfc(-z / mpmath.sqrt(2)) / 2

        def weight(z, factor):  # factor times the density, 0 at an open end
            return 0 if z is None else factor(z) * mpmath.npdf(z)

        if lower is None:
            probability = below(upper)
        elif upper is None:
            probability = below(-lower)
        elif lower > 0:
            probability = below(-lower) - below(-upper)
        else:
            probability = below(upper) - below(lower)
        by_mean = (weight(lower, lambda z: 1) - weight(upper, lambda z: 1)) / scale / probability
        by_log_scale = (weight(lower, lambda z: z) - weight(upper, lambda z: z)) / probability
        return float(mpmath.log(probability)), float(by_mean), float(by_log_scale)


def decoder_points(levels, dtype):
    """x, mean, log_scale: black, white and grey pixels, means near and far, every scale from e^-10."""
    rng = np.random.RandomState(levels)
    level = [0, levels - 1, 0, levels - 1, *rng.randint(0, levels, 32)]
    x = torch.tensor([2 * v / (levels - 1) - 1 for v in level], dtype=dtype)
    mean = torch.tensor([1, -1, -1, 1, *rng.uniform(-1.5, 1.5, 28), 5, -5, 50, -50], dtype=dtype)
    mean[4:16] = x[4:16] + torch.from_numpy(rng.randn(12)).to(dtype) / levels
    log_scale = torch.tensor([-10, -10, -10, -10, *np.resize(np.linspace(-10, 2, 13), 32)], dtype=dtype)
    return x, mean, log_scale


@pytest.mark.parametrize("levels", [2, 17, 256, 65536])
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=["float64", "float32"])
def test_decoder_against_60_digits(levels, dtype):
    x, mean, log_scale = decoder_points(levels, dtype)
    mean, log_scale = mean.requires_grad_(), log_scale.requires_grad_()
    actual = discretized_gaussian_log_likelihood(x, mean, log_scale, levels)
    gradients = torch.autograd.grad(actual.sum(), (mean, log_scale))
    values = [tensor.tolist() for tensor in (x, mean, log_scale)]
    exact = torch.tensor([exact_log_likelihood(*point, levels) for point in zip(*values)], dtype=F64).T
    assert actual.dtype == dtype and exact[0].min() < -1e8
    # float32 holds 1e-6 nats below 8 nats only; beyond, its last digit
    close(actual.double(), exact[0], rtol={F64: 2e-15, torch.float32: 1.2e-7}[dtype], atol=1e-6)
    for gradient, expected in zip(gradients, exact[1:]):
        close(gradient.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_bin_probabilities_sum_to_one(levels):
    x = torch.arange(levels, dtype=F64)[:, None, None] * 2 / (levels - 1) - 1
    mean = torch.tensor([-3.0, -1.0, -0.3, 0.0, 0.7, 1.2], dtype=F64)[None, :, None]
    log_scale = torch.linspace(-10, 5, 16, dtype=F64)[None, None]
    nats = discretized_gaussian_log_likelihood(x, mean, log_scale, levels)
    assert (nats <= 0).all()
    close(nats.exp().sum(0), 1.0, atol=1e-11)


def test_outermost_bins_are_open_for_rounded_pixels_too():
    x = torch.tensor([-1 + 1e-4, 1 - 1e-4], dtype=F64)
    close(discretized_gaussian_log_likelihood(x, 3 * x, torch.full_like(x, -3.0)), 0.0)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mean", [-2.0, 0.0, 0.3, 1.0, 30.0])
def test_decoder_is_finite_at_every_pixel(dtype, mean):
    x = (torch.arange(256) * 2 / 255 - 1).to(torch.promote_types(dtype, torch.float32))[:, None]
    log_scale = torch.arange(-10.0, 3).to(dtype).expand(256, 13).clone().requires_grad_()
    mean = torch.full_like(log_scale, mean).requires_grad_()
    nats = discretized_gaussian_log_likelihood(x, mean, log_scale)
    assert nats.dtype == x.dtype and nats.isfinite().all() and nats.min() < -1e8
    for gradient in torch.autograd.grad(nats.sum(), (mean, log_scale)):
        assert gradient.isfinite().all() and (gradient != 0).any()


@pytest.mark.parametrize("log_variance", [-20.0, -9.8, 0.0])
def test_first_term_under_autocast(log_variance):
    scheduler = make(variance_type="learned")
    x_start = images(torch.float32)
    network = torch.nn.Conv2d(3, 6, 3, padding=1)
    torch.nn.init.zeros_(network.weight[3:].detach())
    torch.nn.init.constant_(network.bias[3:].detach(), log_variance)
    x_t = scheduler.q_sample(x_start, 0, randn(SEED_Q, torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        output = network(x_t)
        assert output.dtype == torch.bfloat16
        terms = scheduler.vlb_term(output, x_start, x_t, 0), scheduler.vlb_term(output, x_start, x_t, 999)
        decoder = discretized_gaussian_log_likelihood(x_start, output[:, :3], 0.5 * output[:, 3:])
    expected = scheduler.vlb_term(output.double(), x_start.double(), x_t.double(), 0)
    assert decoder.dtype == torch.float32 and decoder.isfinite().all()
    close(terms[0].double(), expected, rtol=1e-4)
    (terms[0] + terms[1] + decoder.mean()).sum().backward()
    for parameter in network.parameters():
        assert parameter.grad.isfinite().all() and (parameter.grad != 0).any()


def test_levels_are_an_argument():
    x = torch.tensor([-1.0, 1.0], dtype=F64).view(1, 1, 1, 2)
    scheduler = make(levels=2, prediction_type="sample", variance_type="learned", clip_sample=False)
    log_variance = torch.full_like(x, math.log(0.25))
    term = scheduler.vlb_term(torch.cat((0 * x + 0.1, log_variance), dim=1), x, x, 0)
    mean = scheduler.q_posterior(0 * x + 0.1, x, 0).mean
    black, white = Normal(mean, 0.5).cdf(torch.zeros(1, dtype=F64)).flatten().tolist()
    assert term.item() == pytest.approx(-(math.log2(black) + math.log2(1 - white)) / 2, rel=1e-12)
    assert make(levels=4).vlb_term(x, x, x, 0) != make(levels=8).vlb_term(x, x, x, 0)
    with pytest.raises(ValueError, match="levels=1"):
        discretized_gaussian_log_likelihood(x, x, x, levels=1)


# The bound as a whole: Gaussian data, where the best reverse process and the likelihood are known


class GaussianData:
    """One-pixel images x_0 ~ N(m, s^2), and the exact p(x_{t-1} | x_t) of any chain."""

    def __init__(self, m, s):
        self.m, self.s = m, s

    def grid(self):
        """x_0 and noise at 5 x 5 Gauss-Hermite nodes, with weights: expectations of quadratic terms are exact."""
        nodes, weights = np.polynomial.hermite_e.hermegauss(5)
        nodes, weights = torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())
        x_start = (self.m + self.s * nodes).repeat_interleave(5).view(-1, 1, 1, 1)
        return x_start, nodes.repeat(5).view(-1, 1, 1, 1), torch.outer(weights, weights).flatten()

    def log_variance(self, scheduler, t):
        alpha_bar, prev = alpha_bars(scheduler, t)
        return -math.log(1 / (prev * self.s**2 + 1 - prev) + alpha_bar / (prev - alpha_bar))

    def output(self, scheduler, x_t, t):
        alpha_bar, prev = alpha_bars(scheduler, t)
        gain = alpha_bar**0.5 * self.s**2 / (alpha_bar * self.s**2 + 1 - alpha_bar)
        x_start = self.m + gain * (x_t - alpha_bar**0.5 * self.m)
        epsilon = (x_t - alpha_bar**0.5 * x_start) / (1 - alpha_bar) ** 0.5
        marginal, beta = prev * self.s**2 + 1 - prev, 1 - alpha_bar / prev
        mean = prev**0.5 * self.m / marginal + (1 - beta) ** 0.5 / beta * x_t
        return {
            "epsilon": epsilon,
            "sample": x_start,
            "v_prediction": alpha_bar**0.5 * epsilon - (1 - alpha_bar) ** 0.5 * x_start,
            "previous": mean * math.exp(self.log_variance(scheduler, t)),
        }[scheduler.prediction_type]

    def bits_per_dim(self, scheduler):
        """Entropy in bits, of bins as narrow as the decoder's, and what x_T differs from N(0, 1)."""
        alpha_bar, _ = alpha_bars(scheduler, scheduler.chain[-1])
        x_T = Normal(alpha_bar**0.5 * self.m, (alpha_bar * self.s**2 + 1 - alpha_bar) ** 0.5)
        nats = 0.5 * math.log(2 * math.pi * math.e * self.s**2) + kl_divergence(x_T, Normal(0.0, 1.0)).item()
        return nats / math.log(2) - math.log2(2 / (scheduler.levels - 1))


def whole_bound(scheduler, data, values=None):
    """The expectation of the bound over data and noise; values(t) of the second half of the channels."""
    x_start, noise, weights = data.grid()
    total = scheduler.prior_bits_per_dim(x_start)
    for t in scheduler.chain:
        x_t = scheduler.q_sample(x_start, t, noise)
        output = data.output(scheduler, x_t, t)
        if values is not None:
            output = torch.cat((output, torch.full_like(output, values(t))), dim=1)
        total = total + scheduler.vlb_term(output, x_start, x_t, t)
    return (weights * total).sum().item()


WHOLE = [
    ("short", "epsilon"),
    ("short", "previous"),
    ("iddpm", "sample"),
    ("cosine", "v_prediction"),
    ("custom", "epsilon"),
]


@pytest.mark.parametrize("chain, prediction_type", WHOLE)
def test_the_bound_is_tight_for_gaussian_data(chain, prediction_type):
    data = GaussianData(0.2, 0.1)
    config = {"variance_type": "learned", "prediction_type": prediction_type, "clip_sample": False, "levels": 2**20 + 1}
    scheduler = make(chain, **config)
    nll = data.bits_per_dim(scheduler)
    best = whole_bound(scheduler, data, lambda t: data.log_variance(scheduler, t))
    assert best == pytest.approx(nll, abs=1e-7)
    for error in 0.1, -0.1:  # of each log variance: costs 0.5 (error + exp(-error) - 1) nats a step, exactly
        worse = whole_bound(scheduler, data, lambda t, error=error: data.log_variance(scheduler, t) + error)
        cost = len(scheduler.chain) * 0.5 * (error + math.exp(-error) - 1) / math.log(2)
        assert worse - nll == pytest.approx(cost, abs=1e-6) and cost > 0.01


@pytest.mark.parametrize("chain", ["short", "iddpm", "cosine"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"])
def test_what_a_fixed_variance_costs(chain, variance_type):
    data = GaussianData(-0.1, 0.2)
    scheduler = make(chain, variance_type=variance_type, clip_sample=False, levels=2**20 + 1)
    cost = 0.0
    for i, t in enumerate(scheduler.chain):
        alpha_bar, prev = alpha_bars(scheduler, t)
        variance = 1 - alpha_bar / prev
        if i == 0:
            alpha_bar, prev = alpha_bars(scheduler, scheduler.chain[1])
        if i == 0 or "small" in variance_type:
            variance = (1 - alpha_bar / prev) * (1 - prev) / (1 - alpha_bar)
        ratio = math.exp(data.log_variance(scheduler, t)) / variance
        cost += 0.5 * (ratio - 1 - math.log(ratio)) / math.log(2)
    assert cost > 0.01
    assert whole_bound(scheduler, data) - data.bits_per_dim(scheduler) == pytest.approx(cost, abs=1e-6)


def test_learned_range_reaches_the_best_variance():
    data = GaussianData(0.1, 0.1)
    scheduler = make("iddpm", variance_type="learned_range", clip_sample=False, levels=2**20 + 1)

    def value(t):
        i = scheduler.chain.index(t)
        (alpha_bar, prev), (a, p) = alpha_bars(scheduler, t), alpha_bars(scheduler, scheduler.chain[max(i, 1)])
        low, high = math.log((1 - a / p) * (1 - p) / (1 - a)), math.log(1 - alpha_bar / prev)
        v = 2 * (data.log_variance(scheduler, t) - low) / (high - low) - 1
        assert i == 0 or -1 < v < 1
        return v

    assert whole_bound(scheduler, data, value) == pytest.approx(data.bits_per_dim(scheduler), abs=1e-7)


@each_chain
def test_the_fixed_variances_are_the_two_extremes(chain):
    """Section 3.2: beta is best for x_0 ~ N(0, 1), the posterior variance for a single point."""
    large, small = make(chain, variance_type="fixed_large"), make(chain, prediction_type="sample", clip_sample=False)
    x_start, x_t = torch.full((1, 1, 1, 1), 0.4, dtype=F64), torch.full((1, 1, 1, 1), -1.3, dtype=F64)
    for t in large.chain[1:]:
        best = GaussianData(0.0, 1.0).log_variance(large, t)
        close(large.p_mean_variance(x_t, x_t, t).log_variance, best, atol=1e-9)
        close(small.vlb_term(x_start, x_start, x_t, t), 0.0)


# Chains and steps


@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize("T", [10, 37, 100])
def test_every_number_of_steps(spacing, T):
    scheduler = VariationalDDPMScheduler(T, timestep_spacing=spacing)
    for n in range(1, T + 1):
        scheduler.set_timesteps(n)
        steps = scheduler.chain
        assert len(steps) == n == scheduler.num_inference_steps and scheduler.timesteps.tolist() == steps[::-1]
        assert steps == sorted(set(steps)) and steps[0] >= 0 and steps[-1] < T
        strides = {b - a for a, b in itertools.pairwise(steps)}
        if spacing == "leading":
            assert steps[0] == 0 and strides <= {T // n}
        elif spacing == "trailing":
            assert steps[-1] == T - 1 and strides <= {T // n, -(-T // n)}
        elif n > 1:
            assert (steps[0], steps[-1]) == (0, T - 1)
            assert strides <= {(T - 1) // (n - 1), -(-(T - 1) // (n - 1))}


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_inference_steps": 3, "timesteps": [2, 1, 0]},
        {"timesteps": []},
        {"timesteps": [1, 2]},
        {"timesteps": [2, 2]},
        {"timesteps": [1000, 1]},
        {"timesteps": [5, -1]},
        {"num_inference_steps": 0},
        {"num_inference_steps": 1001},
        {"num_inference_steps": 1000},  # with the offset
        {"num_inference_steps": 2.5},
        {"num_inference_steps": "5"},
        {"timesteps": [2.5, 1]},
    ],
    ids=str,
)
def test_a_refused_chain_changes_nothing(arguments):
    scheduler = VariationalDDPMScheduler(steps_offset=1)
    scheduler.set_timesteps(timesteps=[30, 20, 10])
    with pytest.raises(ValueError):
        scheduler.set_timesteps(**arguments)
    assert scheduler.chain == [10, 20, 30] and scheduler.timesteps.tolist() == [30, 20, 10]


def test_a_chain_can_be_left_again():
    scheduler, fresh, x_t = make(), make(), randn(SEED_X)
    scheduler.set_timesteps(10)
    scheduler.set_timesteps(1000)
    actual = [s.step(x_t, 5, x_t, torch.manual_seed(0)).prev_sample for s in (scheduler, fresh)]
    assert torch.equal(*actual)


def calls(scheduler, x, t):
    return {
        "q_sample": lambda: scheduler.q_sample(x, t, x),
        "q_mean_variance": lambda: scheduler.q_mean_variance(x, t),
        "q_posterior": lambda: scheduler.q_posterior(x, x, t),
        "epsilon_from_x_start": lambda: scheduler.epsilon_from_x_start(x, x, t),
        "p_mean_variance": lambda: scheduler.p_mean_variance(x, x, t),
        "vlb_term": lambda: scheduler.vlb_term(x, x, x, t),
        "step": lambda: scheduler.step(x, t, x),
        "ddim": lambda: scheduler.step(x, t, x, eta=0),
        "reverse_step": lambda: scheduler.reverse_step(x, t, x),
        "previous_timestep": lambda: scheduler.previous_timestep(t),
    }


@pytest.mark.parametrize("name", calls(None, None, None))
@pytest.mark.parametrize("bad", [4, -1, 1000, 123456])
def test_a_timestep_outside_the_chain_is_named(name, bad):
    x, scheduler = images(), make("custom")
    ts = [bad, torch.tensor(bad)]
    if name != "previous_timestep":
        ts += [torch.tensor([3, 2, bad, 999]), torch.tensor([bad] * 4)]
    for t in ts:
        with pytest.raises(ValueError, match=rf"timestep {bad} "):
            calls(scheduler, x, t)[name]()


def test_a_fractional_timestep_is_refused():
    x = images()
    for t in 5.0, torch.tensor(5.0), torch.full((4,), 5.5):
        with pytest.raises(ValueError, match="must be (an integer|integers)"):
            make().step(x, t, x)


@each_chain
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large_log", "learned", "learned_range"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_last_step_lands_on_x_0(chain, variance_type, prediction_type):
    scheduler, x_t = make(chain, variance_type=variance_type, prediction_type=prediction_type), randn(SEED_X)
    t, noise = scheduler.timesteps[-1].item(), torch.full_like(x_t, 1e6)
    output = network(x_t, t, "EPSILON", variance_type.upper())
    for timestep in t, scheduler.timesteps[-1], torch.tensor([t] * 4):
        for eta in None, 0, 0.7, 1:
            step = scheduler.step(output, timestep, x_t, eta=eta, variance_noise=noise)
            if eta is None and prediction_type == "previous":
                assert torch.equal(step.prev_sample, output[:, :3])
            else:
                close(step.prev_sample, step.pred_original_sample, atol=1e-9)


@each_chain
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_ancestral_step(chain, variance_type):
    scheduler, x_t, noise = make(chain, variance_type=variance_type), randn(SEED_X), randn(SEED_STEP)
    for t in scheduler.chain[1:3] + scheduler.chain[-1:]:
        if t == scheduler.chain[0]:
            continue
        output = network(x_t, t, "EPSILON", variance_type.upper())
        p = scheduler.p_mean_variance(output, x_t, t)
        step = scheduler.step(output, t, x_t, variance_noise=noise)
        close(step.prev_sample, p.mean + (0.5 * p.log_variance).exp() * noise, atol=1e-10)
        close(step.pred_original_sample, p.pred_original_sample)


@each_chain
@pytest.mark.parametrize("eta", [0, 0.3, 1])
def test_ddim_step(chain, eta):
    """DDIM eq. 12 and 16 as written there, with epsilon from the clipped x_0."""
    scheduler, x_t, noise = make(chain), randn(SEED_X), randn(SEED_STEP)
    for t in scheduler.chain[:2] + scheduler.chain[-1:]:
        alpha_bar, prev = alpha_bars(scheduler, t)
        output = network(x_t, t, "EPSILON")
        x_start = ((x_t - (1 - alpha_bar) ** 0.5 * output) / alpha_bar**0.5).clamp(-1, 1)
        epsilon = (x_t - alpha_bar**0.5 * x_start) / (1 - alpha_bar) ** 0.5
        sigma = eta * ((1 - prev) / (1 - alpha_bar)) ** 0.5 * (1 - alpha_bar / prev) ** 0.5
        expected = prev**0.5 * x_start + (1 - prev - sigma**2) ** 0.5 * epsilon + sigma * noise
        close(scheduler.step(output, t, x_t, eta=eta, variance_noise=noise).prev_sample, expected, atol=1e-8)
        if eta == 1:  # DDPM
            ancestral = scheduler.step(output, t, x_t, variance_noise=noise).prev_sample
            close(ancestral, expected, atol=1e-8)


def test_eta_outside_its_range():
    x_t = randn(SEED_X)
    for eta in -0.1, 1.1, math.nan, "1":
        with pytest.raises(ValueError, match=f"eta={eta!r}"):
            make().step(x_t, 5, x_t, eta=eta)


@each_chain
def test_reverse_step_is_undone_by_ddim(chain):
    """Where epsilon does not change on the way, the ODE's steps up and down are inverse."""
    scheduler, epsilon = make(chain, clip_sample=False), randn(SEED_Q)
    steps, x = scheduler.chain, images()
    for t in steps[:-1]:
        x = scheduler.reverse_step(epsilon, t, x).prev_sample
    for t in steps[:0:-1]:
        x = scheduler.step(epsilon, t, x, eta=0).prev_sample
    close(x, images(), atol=1e-9)
    top = scheduler.reverse_step(epsilon, steps[-1], x).prev_sample  # abar = 0: epsilon alone
    close(top, epsilon, atol=1e-9)


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_per_image_t_is_each_image_alone(dtype, variance_type, prediction_type):
    if (variance_type, prediction_type) == ("analytic", "previous"):
        pytest.skip("no x_0")
    scheduler = make("custom", variance_type=variance_type, prediction_type=prediction_type)
    x, x_t, noise, ts = images(dtype), randn(SEED_X, dtype), randn(SEED_STEP, dtype), [2, 999, 640, 3]
    output = network(x_t, torch.tensor(ts), "EPSILON", variance_type.upper())

    def everything(i, t):
        x_i, x_t_i, noise_i, output_i = x[i], x_t[i], noise[i], output[i]
        yield scheduler.q_sample(x_i, t, noise_i)
        yield scheduler.epsilon_from_x_start(x_i, x_t_i, t)
        yield from scheduler.q_mean_variance(x_i, t)[:3]
        yield from scheduler.q_posterior(x_i, x_t_i, t)[:3]
        yield from scheduler.p_mean_variance(output_i, x_t_i, t)
        yield scheduler.vlb_term(output_i, x_i, x_t_i, t)
        for eta in None, 0, 0.5:
            yield from scheduler.step(output_i, t, x_t_i, eta=eta, variance_noise=noise_i, return_dict=False)
        yield scheduler.reverse_step(output_i, t, x_t_i).prev_sample

    together = list(everything(slice(None), torch.tensor(ts)))
    for i, t in enumerate(ts):
        for batched, alone in zip(together, everything(slice(i, i + 1), t)):
            assert batched.dtype == alone.dtype == dtype
            torch.testing.assert_close(batched[i : i + 1], alone, rtol={F64: 1e-13}.get(dtype, 1e-5), atol=1e-6)


@pytest.mark.parametrize("eta", [None, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_generator_for_each_image(eta, dtype):
    scheduler, x = make("linspace"), randn(SEED_X, dtype)

    def sample(x, generator):
        for t in scheduler.timesteps.tolist():
            x = scheduler.step(torch.sin(3 * x), t, x, generator=generator, eta=eta).prev_sample
        return x

    def seeded(i):
        return torch.Generator().manual_seed(i)

    together = sample(x, [seeded(i) for i in range(4)])
    assert together.dtype == dtype
    for i in range(4):
        assert torch.equal(together[i : i + 1], sample(x[i : i + 1], [seeded(i)]))
        assert torch.equal(together[i : i + 1], sample(x[i : i + 1], seeded(i)))
    assert not torch.equal(together, sample(x, [seeded(i + 4) for i in range(4)]))


def test_randomness_comes_from_the_generator_alone():
    x_t = randn(SEED_X)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    make().step(x_t, 5, x_t, generator=torch.Generator().manual_seed(1))
    make().step(x_t, 5, x_t, eta=0)
    make().step(x_t, 0, x_t)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(make().step(x_t, 5, x_t).prev_sample, make().step(x_t, 5, x_t).prev_sample)


def test_gradients_after_inference_mode():
    """What a step keeps for the next ones was made in inference mode, and serves gradients all the same."""
    scheduler, x = make(), randn(SEED_X)
    for t in 999, torch.tensor([999, 5, 1, 0]):
        with torch.inference_mode():
            scheduler.step(x, t, x)
        y = x.clone().requires_grad_()
        scheduler.step(y, t, y).prev_sample.sum().backward()
        assert y.grad.abs().sum() > 0


def test_the_last_step_gives_a_tensor_of_its_own():
    x, output = randn(SEED_X), images()
    step = make(prediction_type="previous").step(output, 0, x)
    assert torch.equal(step.prev_sample, output) and step.prev_sample is not output


def test_inputs_are_not_changed():
    x, x_t, noise = images(), randn(SEED_X), randn(SEED_STEP)
    for t in 0, 5, torch.tensor([0, 5, 500, 999]):
        for scheduler in make(), make(clip_sample=False, prediction_type="sample"), make(prediction_type="previous"):
            for name, call in calls(scheduler, x_t, t).items():
                if name != "previous_timestep":
                    call()
            scheduler.step(x, t, x_t, variance_noise=noise)
            scheduler.get_velocity(x, noise, torch.as_tensor(t).reshape(-1))
    assert torch.equal(x, images()) and torch.equal(x_t, randn(SEED_X)) and torch.equal(noise, randn(SEED_STEP))


# Properties, over schedules, T and subsequences

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@st.composite
def schedulers(draw, smallest=1):
    name = draw(st.sampled_from(sorted(BETA_SCHEDULES)))
    T = draw(st.integers(max(smallest, 25 if name == "linear_scaled_by_T" else 2), 120))
    scheduler = VariationalDDPMScheduler(T, beta_schedule=name, clip_sample=False, variance_type="fixed_large")
    steps = draw(st.sets(st.integers(0, T - 1), min_size=smallest))
    scheduler.set_timesteps(timesteps=sorted(steps, reverse=True))
    return scheduler


pixels = st.floats(-3, 3).map(lambda value: torch.full((1, 1, 1, 1), value, dtype=F64))


@PROPERTY
@given(schedulers(smallest=2), pixels, pixels, st.data())
def test_the_posterior_is_bayes_product(scheduler, x_start, x_t, data):
    t = data.draw(st.sampled_from(scheduler.chain[1:]))
    alpha_bar, prev = alpha_bars(scheduler, t)
    beta = 1 - alpha_bar / prev
    # N(x_t; sqrt(1 - beta) x, beta) N(x; sqrt(prev) x_0, 1 - prev), as a function of x
    precision = (1 - beta) / beta + 1 / (1 - prev)
    mean = ((1 - beta) ** 0.5 / beta * x_t + prev**0.5 / (1 - prev) * x_start) / precision
    posterior = scheduler.q_posterior(x_start, x_t, t)
    close(posterior.variance, 1 / precision, rtol=1e-8)
    close(posterior.log_variance, -math.log(precision), atol=1e-8)
    close(posterior.mean, mean, atol=1e-8)


@PROPERTY
@given(schedulers())
def test_a_chain_has_the_marginals_of_its_betas(scheduler):
    one, alpha_bar = torch.ones(1, 1, 1, 1, dtype=F64), 1.0
    for i, t in enumerate(scheduler.chain):
        marginal = scheduler.q_mean_variance(one, t)
        # fixed_large is the chain's own beta, but at its first step
        beta = scheduler.p_mean_variance(one, one, t).variance.item() if i else marginal.variance.item()
        alpha_bar *= 1 - beta
        close(marginal.mean**2, alpha_bar, rtol=1e-9, atol=1e-12)
        close(marginal.mean**2, alpha_bars(scheduler, t)[0], rtol=1e-9, atol=1e-15)
        close(marginal.variance, 1 - alpha_bar, rtol=1e-9)


@PROPERTY
@given(schedulers(smallest=2), pixels, pixels, st.data())
def test_a_step_of_q_forward_is_the_marginal(scheduler, x_start, noise, data):
    """The moments of x_{t-1} | x_0, put through the posterior's mean and variance backwards, are those of the chain."""
    t = data.draw(st.sampled_from(scheduler.chain[1:]))
    alpha_bar, prev = alpha_bars(scheduler, t)
    assume(alpha_bar > 0)
    x_t = scheduler.q_sample(x_start, t, noise)
    zero = torch.zeros_like(x_start)
    by_x_t = scheduler.q_posterior(zero, zero + 1, t).mean
    # E: mean at x_t = sqrt(abar) x_0; Var: of the mean through x_t, and the posterior's own
    close(scheduler.q_posterior(x_start, alpha_bar**0.5 * x_start, t).mean, prev**0.5 * x_start, atol=1e-9)
    close(by_x_t**2 * (1 - alpha_bar) + scheduler.q_posterior(x_start, x_t, t).variance, 1 - prev, rtol=1e-8)
    close(scheduler.p_mean_variance(noise, x_t, t).pred_original_sample, x_start, atol=1e-6 / alpha_bar**0.5)


@PROPERTY
@given(schedulers(), pixels, st.sampled_from([None, 0, 0.5, 1]), st.integers(0, 2**31))
def test_any_chain_lands_on_a_known_x_0(scheduler, x_start, eta, seed):
    """With the true noise as output at each step, sampling down any chain from any noise ends at x_0."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(x_start.shape, dtype=F64, generator=generator)
    for t in scheduler.timesteps.tolist():
        assume(alpha_bars(scheduler, t)[0] > 1e-9)
        output = scheduler.epsilon_from_x_start(x_start, x, t)
        x = scheduler.step(output, t, x, generator=generator, eta=eta).prev_sample
    close(x, x_start, atol=1e-6)


def test_tables_of_many_etas_are_not_kept():
    scheduler, x = VariationalDDPMScheduler(), torch.randn(1, 1, 2, 2)
    for eta in (i / 100 for i in range(100)):
        scheduler.step(x, 500, x, eta=eta)
        scheduler.step(x, torch.tensor([500]), x, eta=eta)
    gc.collect()
    assert sum(type(instance) is _Tables and "ddim" in instance.tables for instance in gc.get_objects()) <= 8
    alphas_cumprod = scheduler.alphas_cumprod.numpy()
    # and eta 0 again, which has been dropped: x_0 (1 - sqrt(..)) of eq. 12
    x = x.double()
    x_start = ((x - (1 - alphas_cumprod[500]) ** 0.5 * x) / alphas_cumprod[500] ** 0.5).clamp(-1, 1)
    epsilon = (x - alphas_cumprod[500] ** 0.5 * x_start) / (1 - alphas_cumprod[500]) ** 0.5
    expected = alphas_cumprod[499] ** 0.5 * x_start + (1 - alphas_cumprod[499]) ** 0.5 * epsilon
    torch.testing.assert_close(scheduler.step(x, 500, x, eta=0.0).prev_sample, expected)


@pytest.mark.parametrize("variance_type", ["fixed_small", "analytic"])
def test_tables_stay_on_the_cpu_whatever_the_default_device(variance_type):
    mse = [0.1] * 100 if variance_type == "analytic" else None
    with torch.device("meta"):
        scheduler = VariationalDDPMScheduler(100, variance_type=variance_type, x_start_mse=mse)
        scheduler.set_timesteps(10, device="cpu")
    x, t = torch.zeros(2, 1, 2, 2), torch.tensor([10, 20])
    assert scheduler.step(x, 10, x, generator=torch.Generator()).prev_sample.device.type == "cpu"
    assert scheduler.vlb_term(x, x, x, t).isfinite().all() and scheduler.add_noise(x, x, t).device.type == "cpu"
