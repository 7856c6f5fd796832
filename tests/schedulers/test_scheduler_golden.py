"""`VariationalDDPMScheduler` against every number of tests/golden that is the scheduler's."""

import math
from functools import partial

import pytest
import torch

from ddpm_hf.schedulers.betas import space_timesteps
from ddpm_hf.schedulers.gaussian import discretized_gaussian_log_likelihood
from support.golden_data import (
    SEED_Q,
    SEED_STEP,
    SEED_X,
    assert_fingerprint,
    case_id,
    case_scheduler,
    golden_cases,
    images,
    network,
    randn,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def for_each_case(name, *kinds):
    return pytest.mark.parametrize("case", golden_cases(name, *kinds), ids=case_id)


def tolerance(dtype, f32, rtol=1e-8, atol=1e-9):
    """Of the golden headers: float32 code within 5x of what the reference loses in float32."""
    if dtype == torch.float64:
        return {"rtol": rtol, "atol": atol}
    return {"rtol": 0, "atol": 5 * f32["max_abs"]}


def tables(scheduler):
    """The chain's tables, read through the public functions with one image of one pixel for each step."""
    t, one = torch.tensor(scheduler.chain), torch.ones(len(scheduler.chain), 1, 1, 1, dtype=torch.float64)
    posterior = scheduler.q_posterior(one, 0 * one, t)
    # beta is the variance of fixed_large but at the first step, which has no predecessor: 1 - abar
    betas = scheduler.p_mean_variance(one, one, t).variance.flatten()
    betas[0] = scheduler.q_mean_variance(one, t).variance[0].item()
    return {
        "betas": scheduler.betas if len(t) == len(scheduler) else betas,
        "alphas_cumprod": scheduler.q_mean_variance(one, t).mean.flatten() ** 2,
        "posterior_variance": posterior.variance.flatten(),
        "posterior_log_variance_clipped": posterior.log_variance.flatten(),
        "posterior_mean_coef1": posterior.mean.flatten(),
        "posterior_mean_coef2": scheduler.q_posterior(0 * one, one, t).mean.flatten(),
    }


@for_each_case("schedules")
def test_tables(case):
    scheduler = case_scheduler(case, variance_type="fixed_large")
    assert len(scheduler.chain) == case["num_steps"]
    for name, values in tables(scheduler).items():
        worst = 10 * case["worst_rel_error_of_reference_float64_vs_60_digits_over_all_t"][name]
        exact = torch.tensor(case["exact_at_t"][name], dtype=torch.float64)
        torch.testing.assert_close(values[case["t"]], exact, rtol=worst, atol=0, msg=partial("{}: {}".format, name))
        assert values.sum().item() == pytest.approx(case["sum_over_all_t"][name], rel=worst + 1e-15)
    assert (scheduler.alphas_cumprod.dtype, scheduler.betas.dtype) == (torch.float64,) * 2


@for_each_case("respacing_resampler", "space_timesteps")
def test_space_timesteps(case):
    if "error" in case:
        with pytest.raises(ValueError, match=str(case["section_counts"])):
            space_timesteps(case["T"], case["section_counts"])
    else:
        assert space_timesteps(case["T"], case["section_counts"]) == case["steps"]


@DTYPES
@for_each_case("p_mean_variance", "q")
def test_q(case, dtype):
    scheduler, t, x_start = case_scheduler(case), torch.tensor(case["t"]), images(dtype)
    x_t = scheduler.q_sample(x_start, t, randn(SEED_Q, dtype))
    for name, value in ("q_sample", x_t), ("q_posterior_mean", scheduler.q_posterior(x_start, x_t, t).mean):
        assert value.dtype == dtype
        assert_fingerprint(value, case[name], **tolerance(dtype, case["f32"][name]))


@DTYPES
@for_each_case("p_mean_variance", "p_mean")
def test_p_mean(case, dtype):
    x_t, t = randn(SEED_X, dtype), torch.tensor(case["t"])
    output = network(x_t, t, case["mean_type"])
    actual = [case_scheduler(case).p_mean_variance(output, x_t, t)]
    actual.append(
        case_scheduler(case, clip_sample=not case["clip_denoised"]).p_mean_variance(
            output, x_t, t, clip_sample=case["clip_denoised"]
        )
    )
    for p in actual:
        assert_fingerprint(p.mean, case["mean"], **tolerance(dtype, case["f32"]["mean"]))
        assert_fingerprint(p.pred_original_sample, case["pred_xstart"], **tolerance(dtype, case["f32"]["pred_xstart"]))


@DTYPES
@for_each_case("p_mean_variance", "p_variance")
def test_p_variance(case, dtype):
    x_t, t = randn(SEED_X, dtype), torch.tensor(case["t"])
    variants = [case["var_type"].lower()]
    if case["var_type"].startswith("FIXED"):
        variants.append(variants[0] + "_log")  # the same log variance; the variance is its exponential
    for variance_type in variants:
        p = case_scheduler(case, variance_type=variance_type).p_mean_variance(
            network(x_t, t, "EPSILON", case["var_type"]), x_t, t
        )
        assert_fingerprint(p.log_variance, case["log_variance"], **tolerance(dtype, case["f32"]["log_variance"]))
        if variance_type == "fixed_small_log":
            torch.testing.assert_close(p.variance, p.log_variance.exp())
        else:
            assert_fingerprint(p.variance, case["variance"], **tolerance(dtype, case["f32"]["variance"]))


@DTYPES
@for_each_case("likelihood_bound", "vb_terms_bpd")
def test_bound_terms(case, dtype):
    scheduler, x_start, noise = case_scheduler(case), images(dtype), randn(SEED_Q, dtype)
    for i, t in enumerate(case["t"]):
        expected = case["t0_with_exact_cdf"]["unfloored"] if t == 0 else case["per_t_per_image"][i]
        bound = tolerance(dtype, case["f32_per_t"][i], rtol=1e-7, atol=1e-8)
        for timestep in t, torch.full((4,), t):
            x_t = scheduler.q_sample(x_start, timestep, noise)
            output = network(x_t, t, case["mean_type"], case["var_type"])
            term = scheduler.vlb_term(output, x_start, x_t, timestep)
            assert term.shape == (4,) and term.dtype == dtype
            torch.testing.assert_close(term.double(), torch.tensor(expected, dtype=torch.float64), **bound)


@DTYPES
@for_each_case("likelihood_bound", "prior_bpd")
def test_prior(case, dtype):
    prior = case_scheduler(case).prior_bits_per_dim(images(dtype))
    expected = torch.tensor(case["per_image"], dtype=torch.float64)
    torch.testing.assert_close(prior.double(), expected, **tolerance(dtype, case["f32"], rtol=1e-7, atol=1e-12))


@DTYPES
@for_each_case("sampling_steps", "p_sample", "ddim_sample", "ddim_reverse_sample")
def test_one_step(case, dtype):
    scheduler, x_t, noise = case_scheduler(case), randn(SEED_X, dtype), randn(SEED_STEP, dtype)
    t = torch.tensor(scheduler.chain)[case["t_index"]]
    output = network(x_t, t, case["mean_type"], case.get("var_type"))
    if case["kind"] == "ddim_reverse_sample":
        sample = scheduler.reverse_step(output, t, x_t).prev_sample
    else:
        sample = scheduler.step(output, t, x_t, variance_noise=noise, eta=case.get("eta")).prev_sample
    assert sample.dtype == dtype
    assert_fingerprint(sample, case["sample"], **tolerance(dtype, case["f32"]))


@DTYPES
@for_each_case("sampling_steps", "ddim_sample_loop", "p_sample_loop")
def test_sampling_loop(case, dtype):
    scheduler, x_t = case_scheduler(case), randn(SEED_X, dtype)
    for i, t in enumerate(scheduler.timesteps.tolist()):
        noise = randn(case["noise_seed_base"] + case["num_steps"] - 1 - i, dtype)
        output = network(x_t, t, case["mean_type"], case["var_type"])
        x_t = scheduler.step(output, t, x_t, variance_noise=noise, eta=case.get("eta")).prev_sample
    assert_fingerprint(x_t, case["sample"], **tolerance(dtype, case["f32"], rtol=1e-6))


def test_decoder():
    x, mean, log_scale, _, exact = torch.tensor(golden_cases("decoder_loglik"), dtype=torch.float64).T[:5]
    actual = discretized_gaussian_log_likelihood(x, mean, log_scale)
    assert exact.min() < -1e6 < math.log(1e-12)  # far beyond the reference's floor
    torch.testing.assert_close(actual, exact, rtol=1e-15, atol=1e-6)
