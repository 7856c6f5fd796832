"""`VariationalDDPMScheduler` beside diffusers' `DDPMScheduler`: a drop-in, and right where that is measurably wrong."""

import inspect
import itertools
import json
import logging
import math
import pickle

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.schedulers import scheduling_ddpm
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

from ddpm_hf.schedulers.betas import BETA_SCHEDULES, space_timesteps
from ddpm_hf.schedulers.ddpm import VariationalDDPMScheduler
from ddpm_hf.schedulers.gaussian import discretized_gaussian_log_likelihood
from support.golden_data import SEED_Q, SEED_STEP, SEED_X, images, network, randn

BOTH = pytest.mark.parametrize("cls", [VariationalDDPMScheduler, DDPMScheduler], ids=["ours", "stock"])
STOCK_SCHEDULES = ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"]


def rel(value, truth):
    return abs(float(value) - float(truth)) / abs(float(truth))


def worst(a, b):
    return (a.double() - b.double()).abs().max().item()


# Where diffusers' class is measurably wrong (tests/golden/README.md): both sides, row by row


@pytest.fixture
def stock_noise(monkeypatch):
    """diffusers' `step` draws this noise."""
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *args, dtype, **kwargs: randn(SEED_STEP, dtype))
    return randn(SEED_STEP)


@pytest.mark.parametrize(
    "ours, stock, one_minus_alpha_bar, error",
    [
        ({}, {}, 1e-4, 1.7e-4),
        ({"beta_schedule": "cosine"}, {"beta_schedule": "squaredcos_cap_v2"}, None, 5e-4),
        ({"num_train_timesteps": 4000, "beta_schedule": "linear_scaled_by_T"}, {"beta_start": 2.5e-5}, 2.5e-5, 1e-3),
        ({"num_train_timesteps": 4000, "beta_schedule": "cosine"}, {"beta_schedule": "squaredcos_cap_v2"}, None, 3e-3),
    ],
)
def test_alphas_cumprod_is_not_float32(ours, stock, one_minus_alpha_bar, error):
    T = ours.get("num_train_timesteps", 1000)
    if one_minus_alpha_bar is None:  # of the cosine: 1 - cos(b)^2 / cos(a)^2 = sin(b - a) sin(b + a) / cos(a)^2
        a, b = 0.008 / 1.008 * math.pi / 2, (1 / T + 0.008) / 1.008 * math.pi / 2
        one_minus_alpha_bar = math.sin(b - a) * math.sin(b + a) / math.cos(a) ** 2
    stock = DDPMScheduler(T, **stock)
    assert rel(1 - stock.alphas_cumprod[0], one_minus_alpha_bar) == pytest.approx(error, rel=0.1)
    variance = VariationalDDPMScheduler(**ours).q_mean_variance(torch.zeros(1, 1, 1, 1).double(), 0).variance
    assert rel(variance, one_minus_alpha_bar) < 2e-11


def test_one_step_at_small_t(stock_noise):
    x_t, t = randn(SEED_X), 2
    output = network(x_t, t, "EPSILON")
    beta = np.linspace(1e-4, 0.02, 1000)
    alpha_bar, alpha_bar_prev = np.prod(1 - beta[:3]), np.prod(1 - beta[:2])
    x_start = ((x_t - (1 - alpha_bar) ** 0.5 * output) / alpha_bar**0.5).clamp(-1, 1)
    mean = (alpha_bar_prev**0.5 * beta[2] * x_start + (1 - beta[2]) ** 0.5 * (1 - alpha_bar_prev) * x_t) / (
        1 - alpha_bar
    )
    truth = mean + (beta[2] * (1 - alpha_bar_prev) / (1 - alpha_bar)) ** 0.5 * stock_noise
    for dtype, tolerance in (torch.float64, 1e-11), (torch.float32, 4e-7):
        args = output.to(dtype), t, x_t.to(dtype)
        assert worst(DDPMScheduler().step(*args).prev_sample, truth) == pytest.approx(3.7e-4, rel=0.05)
        ours = VariationalDDPMScheduler().step(*args, variance_noise=stock_noise).prev_sample
        assert ours.dtype == dtype and worst(ours, truth) < tolerance


def test_variance_of_the_first_step():
    beta = np.linspace(1e-4, 0.02, 1000)
    second = beta[1] * beta[0] / (1 - (1 - beta[0]) * (1 - beta[1]))  # posterior variance of the second step
    assert second == pytest.approx(5.453e-5, rel=1e-4)
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for variance_type, stock in ("fixed_large", 1e-4), ("fixed_small", 1e-20), ("learned_range", 1e-20):
        output = x - 1 if variance_type == "learned_range" else x  # -1: the lower end of the range
        wrong = DDPMScheduler(variance_type=variance_type)._get_variance(0, output)
        assert rel(wrong, math.log(stock) if variance_type == "learned_range" else stock) < 2e-4
        output = torch.cat((x, output), dim=1) if variance_type == "learned_range" else output
        p = VariationalDDPMScheduler(variance_type=variance_type).p_mean_variance(output, x, 0)
        assert rel(p.log_variance.exp(), second) < 1e-10


def test_decoder_with_the_variance_of_the_first_step():
    x_start, scheduler = images(), VariationalDDPMScheduler()
    x_t = scheduler.q_sample(x_start, 0, randn(SEED_Q))
    p = scheduler.p_mean_variance(network(x_t, 0, "EPSILON"), x_t, 0)

    def bits_per_dim(variance, floor):
        log_scale = 0.5 * torch.as_tensor(variance).double().log()
        nats = discretized_gaussian_log_likelihood(x_start, p.mean, log_scale).clamp(min=floor)
        return -nats[0].mean().item() / math.log(2)

    floor = math.log(1e-12)  # of the reference implementations
    assert bits_per_dim(DDPMScheduler()._get_variance(0), floor) == pytest.approx(27.0, abs=0.05)
    assert bits_per_dim(DDPMScheduler()._get_variance(0), -math.inf) > 1e15
    beta_0 = DDPMScheduler(variance_type="fixed_large")._get_variance(0)
    assert bits_per_dim(beta_0, floor) == pytest.approx(2.48, abs=0.01)
    for actual in (
        bits_per_dim(p.log_variance[0, 0, 0, 0].exp(), floor),
        scheduler.vlb_term(network(x_t, 0, "EPSILON"), x_start, x_t, 0)[0].item(),
    ):
        assert actual == pytest.approx(2.7424, abs=1e-4)  # 2.7553 with the reference's approximate CDF


@pytest.mark.parametrize("variance_type", ["fixed_large_log", "learned"])
def test_no_nan(variance_type):
    x_t = randn(SEED_X)
    for t in 1, 2, 500, 999:
        output = network(x_t, t, "EPSILON", variance_type.upper())
        stock = DDPMScheduler(variance_type=variance_type).step(output, t, x_t).prev_sample
        expected = output[:, 3:] < 0 if variance_type == "learned" else torch.ones_like(x_t, dtype=torch.bool)
        assert expected.any() and torch.equal(stock.isnan(), expected)
        ours = VariationalDDPMScheduler(variance_type=variance_type).step(output, t, x_t).prev_sample
        assert ours.isfinite().all()


@pytest.mark.parametrize("T, stock, ours", [(100, 0.364, 2.04e-5), (4000, 2.65e-18, 4.25e-5)])
def test_linear_scaled_by_T(T, stock, ours):
    plain = VariationalDDPMScheduler(T).alphas_cumprod  # as given, as diffusers does it
    assert rel(plain[-1], stock) < 2e-3 and worst(plain, DDPMScheduler(T).alphas_cumprod) < 2e-6
    scaled = VariationalDDPMScheduler(T, beta_schedule="linear_scaled_by_T").alphas_cumprod
    assert rel(scaled[-1], ours) < 2e-3


def test_250_of_1000_timesteps():
    reference = space_timesteps(1000, 250)

    def steps(cls, **config):
        scheduler = cls(**config)
        scheduler.set_timesteps(250)
        return scheduler.timesteps.tolist()[::-1]

    assert sum(a != b for a, b in zip(steps(DDPMScheduler), reference)) == 208
    assert steps(VariationalDDPMScheduler, timestep_spacing="iddpm") == reference
    assert steps(DDPMScheduler, timestep_spacing="linspace") == reference


@pytest.mark.parametrize(
    "config, arguments, last",
    [
        ({}, {"timesteps": [999, 500, 99]}, 99),
        ({"timestep_spacing": "trailing"}, {"num_inference_steps": 10}, 99),
        ({"steps_offset": 1}, {"num_inference_steps": 10}, 1),
    ],
    ids=["custom", "trailing", "offset"],
)
@pytest.mark.parametrize("variance_type", ["fixed_large", "fixed_small_log", "learned_range"])
def test_last_step_adds_no_noise(config, arguments, last, variance_type):
    x_t = randn(SEED_X)
    output = network(x_t, last, "EPSILON", variance_type.upper())
    results = {}
    for cls in VariationalDDPMScheduler, DDPMScheduler:
        scheduler = cls(variance_type=variance_type, **config)
        scheduler.set_timesteps(**arguments)
        assert scheduler.timesteps[-1] == last
        prev_sample, x_start = scheduler.step(output, last, x_t, generator=torch.manual_seed(0), return_dict=False)
        results[cls] = prev_sample - x_start
    assert results[VariationalDDPMScheduler].abs().max() < 1e-12
    if variance_type == "fixed_large":
        assert results[DDPMScheduler].std().item() == pytest.approx({99: 0.32, 1: 0.015}[last], rel=0.05)


def test_ddim_recomputes_epsilon_from_the_clipped_x_0():
    x_t, ours, stock = randn(SEED_X), VariationalDDPMScheduler(), DDIMScheduler()
    ours.set_timesteps(1000)
    stock.set_timesteps(1000)
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    errors = []
    for t in 999, 500, 100, 2:
        output = network(x_t, t, "EPSILON")
        x_start = ((x_t - (1 - alpha_bar[t]) ** 0.5 * output) / alpha_bar[t] ** 0.5).clamp(-1, 1)
        epsilon = (x_t - alpha_bar[t] ** 0.5 * x_start) / (1 - alpha_bar[t]) ** 0.5
        truth = alpha_bar[t - 1] ** 0.5 * x_start + (1 - alpha_bar[t - 1]) ** 0.5 * epsilon
        assert worst(ours.step(output, t, x_t, eta=0).prev_sample, truth) < 1e-10
        errors.append(worst(stock.step(output, t, x_t).prev_sample, truth))
        assert worst(stock.step(output, t, x_t, use_clipped_model_output=True).prev_sample, truth) < 3e-4
    assert max(errors) == pytest.approx(2.96, abs=0.01)


def test_ddim_goes_to_the_next_timestep_of_the_list():
    config = {"timestep_spacing": "linspace", "clip_sample": False}
    x_t, ours, stock = randn(SEED_X), VariationalDDPMScheduler(**config), DDIMScheduler(**config)
    ours.set_timesteps(250)
    stock.set_timesteps(250)
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    timesteps = ours.timesteps.tolist()
    assert timesteps == stock.timesteps.tolist()
    errors = []
    for t, prev_t in itertools.pairwise(timesteps):
        output = network(x_t, t, "EPSILON")
        x_start = (x_t - (1 - alpha_bar[t]) ** 0.5 * output) / alpha_bar[t] ** 0.5
        truth = alpha_bar[prev_t] ** 0.5 * x_start + (1 - alpha_bar[prev_t]) ** 0.5 * output
        assert worst(ours.step(output, t, x_t, eta=0).prev_sample, truth) < 1e-9
        errors.append(worst(stock.step(output, t, x_t).prev_sample, truth))
    assert max(errors) > 1e-3


def test_per_image_t():
    x_t, t = randn(SEED_X), torch.tensor([1, 2, 500, 999])
    with pytest.raises(RuntimeError):
        DDPMScheduler().step(x_t, t, x_t)
    assert VariationalDDPMScheduler().step(x_t, t, x_t).prev_sample.isfinite().all()


@pytest.mark.parametrize("t", [2, 20, 500, 900])
def test_bfloat16_is_rounded_once(t, stock_noise):
    x_t, noise = randn(SEED_X, torch.bfloat16), randn(SEED_STEP, torch.bfloat16)
    output = network(x_t, t, "EPSILON")
    truth = VariationalDDPMScheduler().step(output.double(), t, x_t.double(), variance_noise=noise.double())
    ours = VariationalDDPMScheduler().step(output, t, x_t, variance_noise=noise)
    stock = DDPMScheduler().step(output, t, x_t)
    for name in "prev_sample", "pred_original_sample":
        assert ours[name].dtype == torch.bfloat16
        assert (ours[name] != truth[name].bfloat16()).sum() <= 1  # float32 may round a tie otherwise
    assert (stock.prev_sample != truth.prev_sample.bfloat16()).sum() > 100


# A drop-in: what diffusers' tests ask of DDPMScheduler


def toy_model(x, t):
    """Deterministic, and different at every pixel and step."""
    return torch.sin(3 * x + 0.01 * t) * (0.5 + 0.0005 * t)


def saved_and_loaded(scheduler, path, cls=None):
    scheduler.save_pretrained(path)
    return (cls or type(scheduler)).from_pretrained(path)


def settings(scheduler):
    """What the config says to diffusers' class."""
    return {key: scheduler.config[key] for key in DDPMScheduler._get_init_keys(DDPMScheduler) - {"self"}}


CONFIGS = {
    **{f"T{T}": {"num_train_timesteps": T} for T in (1, 5, 100, 1000)},
    **{f"betas{b}": {"beta_start": a, "beta_end": b} for a, b in ((1e-4, 0.002), (0.001, 0.02), (0.01, 0.2))},
    **{name: {"beta_schedule": name} for name in STOCK_SCHEDULES},
    **{name: {"variance_type": name} for name in ("fixed_small", "fixed_large", "fixed_small_log", "other")},
    **{f"clip_{clip}": {"clip_sample": clip} for clip in (True, False)},
    "clip_range": {"clip_sample_range": 0.3},
    "zero_snr": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    "trained_betas": {"trained_betas": np.array([0.1, 0.3])},
    **{
        f"threshold_{value}_{prediction}": {
            "thresholding": True,
            "prediction_type": prediction,
            "sample_max_value": value,
        }
        for value in (0.5, 1.0, 2.0)
        for prediction in ("epsilon", "sample", "v_prediction")
    },
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_saved_and_loaded_it_steps_the_same(config, tmp_path):
    scheduler = VariationalDDPMScheduler(**config)
    reopened = saved_and_loaded(scheduler, tmp_path)
    sample = 2 * randn(SEED_X, torch.float32)
    assert torch.equal(scheduler.betas, reopened.betas) and len(reopened) == len(scheduler)
    for t in range(min(2, len(scheduler.betas))):
        actual = [s.step(0.1 * sample, t, sample, generator=torch.manual_seed(0)) for s in (scheduler, reopened)]
        assert torch.equal(actual[0].prev_sample, actual[1].prev_sample)
        stock = DDPMScheduler(**config).step(0.1 * sample, t, sample, generator=torch.manual_seed(0))
        torch.testing.assert_close(actual[0].prev_sample, stock.prev_sample, rtol=0, atol=3e-3)
    assert settings(scheduler) == settings(reopened)


def test_trained_betas(tmp_path):
    betas = np.array([0.1, 0.3, 0.25])
    scheduler = VariationalDDPMScheduler(3, trained_betas=betas)
    assert scheduler.betas.tolist() == betas.tolist() == saved_and_loaded(scheduler, tmp_path).betas.tolist()
    assert scheduler.config.trained_betas == betas.tolist()


def test_step_shapes_tuple_and_attributes():
    scheduler, sample = VariationalDDPMScheduler(), randn(SEED_X, torch.float32)
    for t in 0, 1, torch.tensor(1), 999:
        output = scheduler.step(0.1 * sample, t, sample, generator=torch.manual_seed(0))
        assert isinstance(output, scheduling_ddpm.DDPMSchedulerOutput) and output.prev_sample.shape == sample.shape
        as_tuple = scheduler.step(0.1 * sample, t, sample, torch.manual_seed(0), return_dict=False)
        assert isinstance(as_tuple, tuple) and len(as_tuple) == 2
        assert torch.equal(as_tuple[0], output.prev_sample) and torch.equal(as_tuple[1], output.pred_original_sample)
        stock = scheduling_ddpm.DDPMSchedulerOutput(*as_tuple)
        assert type(output) is type(stock) and list(output) == list(stock) and vars(output).keys() == vars(stock).keys()
        for other in output, pickle.loads(pickle.dumps(output)), torch.utils._pytree.tree_map(torch.clone, output):
            assert torch.equal(other[0], stock[0]) and torch.equal(other["pred_original_sample"], stock[1])
            assert torch.equal(other.pred_original_sample, stock.to_tuple()[1])
    assert len(scheduler) == 1000 and len(VariationalDDPMScheduler(7)) == 7
    assert scheduler.init_noise_sigma == 1.0 and scheduler.order == 1
    assert scheduler.scale_model_input(sample, 3) is sample
    with pytest.raises(AttributeError, match="does_not_exist"):
        scheduler.does_not_exist  # noqa: B018


def test_signatures_take_what_diffusers_takes():
    for name in "__init__", "step", "add_noise", "get_velocity", "set_timesteps", "previous_timestep", "_get_variance":
        ours = inspect.signature(getattr(VariationalDDPMScheduler, name)).parameters.values()
        stock = inspect.signature(getattr(DDPMScheduler, name)).parameters.values()
        assert [(p.name, p.default) for p in ours][: len(stock)] == [(p.name, p.default) for p in stock]


@pytest.mark.parametrize("steps", [None, 100, 7])
def test_add_noise_and_velocity(steps):
    ours, stock, x, noise = VariationalDDPMScheduler(), DDPMScheduler(), randn(SEED_X), randn(SEED_STEP)
    if steps:
        ours.set_timesteps(steps)
        stock.set_timesteps(steps)
    for t in ours.timesteps[5:6], torch.tensor([0, 1, 998, 999]), torch.tensor([501] * 4, dtype=torch.int32):
        for name in "add_noise", "get_velocity":
            actual = getattr(ours, name)(x, noise, t)
            torch.testing.assert_close(actual, getattr(stock, name)(x, noise, t), rtol=0, atol=1e-5)
            assert getattr(ours, name)(x.half(), noise.half(), t).dtype == torch.float16
    for t in 1000, -1001:
        with pytest.raises((IndexError, ValueError)):  # as diffusers' class
            ours.add_noise(x, noise, torch.tensor([t]))


@pytest.mark.parametrize("name", STOCK_SCHEDULES)
@pytest.mark.parametrize("T", [1, 2, 10, 1000])
def test_the_same_schedules(name, T):
    ours, stock = VariationalDDPMScheduler(T, beta_schedule=name), DDPMScheduler(T, beta_schedule=name)
    assert worst(ours.betas, stock.betas) < 1e-6 and worst(ours.alphas_cumprod, stock.alphas_cumprod) < 2e-6


@BOTH
def test_custom_timesteps(cls):
    scheduler, timesteps = cls(), [100, 87, 50, 1, 0]
    scheduler.set_timesteps(timesteps=timesteps)
    assert scheduler.timesteps.tolist() == timesteps
    for t, previous in zip(scheduler.timesteps, [*timesteps[1:], -1]):
        assert scheduler.previous_timestep(t).item() == previous
    for bad in (
        {"timesteps": [100, 87, 50, 51, 0]},
        {"timesteps": [100, 87, 87, 0]},
        {"timesteps": timesteps, "num_inference_steps": 5},
        {"timesteps": [1000]},
        {"num_inference_steps": 1001},
    ):
        with pytest.raises(ValueError):
            scheduler.set_timesteps(**bad)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("T, offset", [(1000, 0), (1000, 1), (100, 0), (37, 0)])
def test_the_same_timesteps(spacing, T, offset):
    config = {"num_train_timesteps": T, "timestep_spacing": spacing, "steps_offset": offset}
    for n in 1, 2, 3, 10, 25, 37:
        ours, stock = VariationalDDPMScheduler(**config), DDPMScheduler(**config)
        ours.set_timesteps(n)
        stock.set_timesteps(n)
        assert torch.equal(ours.timesteps, stock.timesteps) and ours.timesteps.dtype == torch.int64
        assert ours.num_inference_steps == n


@BOTH
def test_variance_of_three_steps(cls):
    scheduler = cls()
    for t, variance in (0, 0.0), (487, 0.00979), (999, 0.02):
        assert scheduler._get_variance(t).item() == pytest.approx(variance, abs=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_small_log", "fixed_large"])
@pytest.mark.parametrize("steps", [None, 50], ids=["1000", "50"])
def test_full_loop(prediction_type, variance_type, steps):
    results = {}
    for cls in VariationalDDPMScheduler, DDPMScheduler:
        scheduler = cls(prediction_type=prediction_type, variance_type=variance_type)
        if steps:
            scheduler.set_timesteps(steps)
        sample, generator = randn(SEED_X, torch.float32), torch.manual_seed(0)
        for t in scheduler.timesteps:
            sample = scheduler.step(toy_model(sample, t), t, sample, generator=generator).prev_sample
        results[cls] = sample
    assert results[DDPMScheduler].std() > 0.1
    torch.testing.assert_close(*results.values(), rtol=0, atol=1e-3)


def test_full_loop_learned_range():
    results = {}
    for cls in VariationalDDPMScheduler, DDPMScheduler:
        scheduler, sample, generator = cls(variance_type="learned_range"), randn(SEED_X).float(), torch.manual_seed(0)
        for t in scheduler.timesteps:
            output = torch.cat((toy_model(sample, t), torch.cos(sample)), dim=1)
            sample = scheduler.step(output, t, sample, generator=generator).prev_sample
        results[cls] = sample
    torch.testing.assert_close(*results.values(), rtol=0, atol=1e-3)


def test_full_loop_from_noised_images():
    """Image to image: the last timesteps of a chain, from `add_noise`."""
    results = []
    for cls in VariationalDDPMScheduler, DDPMScheduler:
        scheduler, generator = cls(), torch.manual_seed(0)
        scheduler.set_timesteps(100)
        timesteps = scheduler.timesteps[60:]
        sample = scheduler.add_noise(images(torch.float32), randn(SEED_Q, torch.float32), timesteps[:1])
        for t in timesteps:
            sample = scheduler.step(toy_model(sample, t), t, sample, generator=generator).prev_sample
        results.append(sample)
    torch.testing.assert_close(*results, rtol=0, atol=1e-3)


def test_clip_range_and_thresholding():
    sample = 3 * randn(SEED_X)
    for config, largest in (
        ({"clip_sample_range": 0.3}, 0.3),
        ({"clip_sample_range": 2.0}, 2.0),
        ({"thresholding": True, "sample_max_value": 2.0}, 1.0),
        ({"clip_sample": False, "thresholding": True, "sample_max_value": 2.0}, 1.0),
    ):
        ours, stock = (cls(prediction_type="sample", **config) for cls in (VariationalDDPMScheduler, DDPMScheduler))
        actual = ours.step(sample, 500, sample).pred_original_sample
        assert actual.abs().max().item() == pytest.approx(largest)
        torch.testing.assert_close(actual, stock.step(sample, 500, sample).pred_original_sample)


# from_config and from_pretrained, to and from every class that diffusers calls compatible

COMPATIBLES = sorted(scheduler.name for scheduler in KarrasDiffusionSchedulers)
T100 = {"num_train_timesteps": 100}
SCHEDULES = {name: T100 | {"beta_schedule": name} for name in BETA_SCHEDULES} | {
    "default": {},
    "scaled_linear_1000": {"beta_schedule": "scaled_linear"},
    "cosine_1000": {"beta_schedule": "cosine"},
    "betas": T100 | {"beta_start": 3e-4, "beta_end": 0.01},
    "trained_betas": T100 | {"trained_betas": np.linspace(1e-4, 0.03, 100)},
    "trained_betas_over_quad": T100 | {"trained_betas": np.linspace(1e-4, 0.03, 100), "beta_schedule": "quad"},
    "zero_snr": T100 | {"rescale_betas_zero_snr": True},
    "quad_zero_snr": T100 | {"beta_schedule": "quad", "rescale_betas_zero_snr": True},
}
OURS = {"levels": 17, "variance_type": "learned", "timestep_spacing": "iddpm", "prediction_type": "v_prediction"}


def compatible(name):
    cls = getattr(diffusers, name)
    if hasattr(cls, "_backends"):
        pytest.skip(f"{name} needs {cls._backends}")
    return cls


@pytest.fixture
def logged():
    """The warnings that diffusers logs."""
    records = []

    class Handler(logging.Handler):
        def emit(self, record):
            records.append(record.getMessage()[:200])

    handler = Handler(logging.WARNING)
    logging.getLogger("diffusers").addHandler(handler)
    yield records
    logging.getLogger("diffusers").removeHandler(handler)


def state(scheduler):
    keys = "levels", "variance_type", "timestep_spacing", "prediction_type"
    return scheduler.betas.tolist(), *(getattr(scheduler, key) for key in keys), len(scheduler)


def test_compatibles():
    assert sorted(cls.__name__ for cls in VariationalDDPMScheduler().compatibles) == COMPATIBLES


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of NumPy, for diffusers' code
@pytest.mark.parametrize("name", COMPATIBLES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_from_config_to_and_from(name, schedule, logged, tmp_path):
    cls = compatible(name)
    cls().set_timesteps(10)
    own_warnings, logged[:] = set(logged), []
    for config in {}, OURS:
        ours = VariationalDDPMScheduler(**SCHEDULES[schedule], **config)
        other = cls.from_config(ours.config)
        if hasattr(other, "alphas_cumprod"):
            assert worst(other.alphas_cumprod, ours.alphas_cumprod) < 1e-6
        assert len(other) == len(ours)
        other.set_timesteps(10)
        converted = VariationalDDPMScheduler.from_config(other.config)
        assert state(converted) == state(ours)
        assert settings(converted) == settings(ours)
    # a saved file says no more which values are defaults: what was left at one may come back as the other class's
    assert state(saved_and_loaded(other, tmp_path, VariationalDDPMScheduler)) == state(ours)
    if name != "EDMEulerScheduler":  # it has no betas, and says so of any scheduler's config
        assert set(logged) <= own_warnings


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", COMPATIBLES)
def test_opens_what_another_class_saved(name, logged, tmp_path):
    cls = compatible(name)
    other = cls()
    logged.clear()
    ours = saved_and_loaded(other, tmp_path, VariationalDDPMScheduler)
    if hasattr(other, "alphas_cumprod"):
        assert worst(other.alphas_cumprod, ours.alphas_cumprod) < 1e-6
    ours.set_timesteps(10)
    assert ours.levels == 256 and not logged


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_saved_under_the_name_of_the_stock_class(schedule, logged, tmp_path):
    for config in {}, OURS, {"variance_type": "fixed_large_log", "timestep_spacing": "trailing"}:
        ours = VariationalDDPMScheduler(**SCHEDULES[schedule], **config)
        stock = saved_and_loaded(ours, tmp_path, DDPMScheduler)
        assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == "DDPMScheduler"
        assert type(stock) is DDPMScheduler and worst(stock.alphas_cumprod, ours.alphas_cumprod) < 1e-6
        stock.set_timesteps(10)
        stock.set_timesteps(timesteps=[99, 0])
        assert state(VariationalDDPMScheduler.from_pretrained(tmp_path)) == state(ours)
        x = randn(SEED_X)
        if ours.variance_type == "learned":  # it cannot sample that, and must stop instead of giving NaN
            with pytest.raises(RuntimeError, match="size"):
                stock.step(torch.cat((x, x), dim=1), 99, x)
        else:
            assert stock.step(0.1 * x, 99, x).prev_sample.isfinite().all()
        assert not logged


@pytest.mark.parametrize("cls", [VariationalDDPMScheduler, DDPMScheduler], ids=["ours", "by way of stock"])
def test_overrides(cls, tmp_path):
    config = cls.from_config(VariationalDDPMScheduler(beta_schedule="quad", **OURS).config).config
    cls.from_config(config).save_pretrained(tmp_path)
    for overrides in (
        {"levels": 5},
        {"beta_schedule": "linear"},
        {"beta_schedule": "jsd"},
        {"num_train_timesteps": 50},
        {"num_train_timesteps": 100, "beta_schedule": "linear_scaled_by_T", "levels": 2},
        {"beta_end": 0.01},
        {"variance_type": "fixed_small"},
        {"timestep_spacing": "leading"},
    ):
        expected = VariationalDDPMScheduler(**{"beta_schedule": "quad"} | OURS | overrides)
        assert state(VariationalDDPMScheduler.from_config(config, **overrides)) == state(expected)
        assert state(VariationalDDPMScheduler.from_pretrained(tmp_path, **overrides)) == state(expected)
        converted = VariationalDDPMScheduler.from_config(
            VariationalDDPMScheduler.from_config(config, **overrides).config
        )
        assert state(converted) == state(expected)


def test_override_of_trained_betas():
    config = VariationalDDPMScheduler(4, trained_betas=[0.1, 0.2, 0.3, 0.4]).config
    ours = VariationalDDPMScheduler.from_config(config, trained_betas=[0.5, 0.6], num_train_timesteps=2)
    assert ours.betas.tolist() == [0.5, 0.6]
    assert VariationalDDPMScheduler.from_config(config, trained_betas=None).betas[0] == 1e-4
