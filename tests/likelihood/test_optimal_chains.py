"""Optimal variances and lists of timesteps: Gaussian data with the exact network, brute force, and the bound itself."""

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from ddpm_hf import DDPMImagePipeline, DDPMUNet, VariationalDDPMScheduler, bits_per_dim
from ddpm_hf.evaluation.chain_report import compare_chains
from ddpm_hf.likelihood.chains import (
    estimate_reverse_variances,
    measure_denoising_errors,
    optimal_chains,
    optimal_timesteps,
)
from ddpm_hf.schedulers.optimal import best_chains, clipped_x_start_mse, transitions

MEAN, STD, LEVELS = 0.1, 0.15, 2**12 + 1


class ExactNetwork:
    """E[epsilon | x_t] of pixels N(MEAN, STD^2); with `share`, also a constant place in the range of variances."""

    def __init__(self, scheduler, share=None):
        self.alphas_cumprod, self.share = scheduler.alphas_cumprod, share

    def __call__(self, x, t, class_labels=None, return_dict=True):
        abar = self.alphas_cumprod[torch.as_tensor(t).long()].view(-1, 1, 1, 1)
        x_start = MEAN + abar.sqrt() * STD**2 / (abar * STD**2 + 1 - abar) * (x - abar.sqrt() * MEAN)
        epsilon = (x - abar.sqrt() * x_start) / (1 - abar).sqrt()
        if self.share is None:
            return (epsilon,)
        return (torch.cat((epsilon, torch.full_like(epsilon, 2 * self.share - 1)), dim=1),)


def make(T=12, variance_type="fixed_small", share=None, **options):
    schedule = "cosine" if T < 20 else "linear"
    scheduler = VariationalDDPMScheduler(
        T, beta_schedule=schedule, levels=LEVELS, variance_type=variance_type, **options
    )
    return scheduler, ExactNetwork(scheduler, share)


@pytest.fixture(scope="module")
def x_start():
    x = MEAN + STD * torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (x * (LEVELS - 1) / 2).round() / ((LEVELS - 1) / 2)


def seeded():
    return torch.Generator().manual_seed(1)


def exact_mse(scheduler):
    abar = scheduler.alphas_cumprod.numpy()
    return STD**2 * (1 - abar) / (abar * STD**2 + 1 - abar)


def measured(scheduler, network, x_start, evaluations=12):
    return measure_denoising_errors(
        network, scheduler, x_start, num_evaluations=evaluations, generator=seeded(), clip_sample=False
    )


@pytest.mark.parametrize("T, evaluations", [(12, 12), (1000, 60)])
def test_variances_are_those_of_the_closed_form(x_start, T, evaluations):
    scheduler, network = make(T)
    chain = [0, 2, 5, 9, 11] if T == 12 else [0, 20, 200, 600, 999]
    scheduler.set_timesteps(timesteps=chain[::-1])
    result = estimate_reverse_variances(
        network, scheduler, x_start, num_evaluations=evaluations, generator=seeded(), clip_sample=False
    )
    abar = scheduler.alphas_cumprod.numpy()
    before, at = np.append(1.0, abar[chain][:-1]), abar[chain]
    # precisions add: that of x_s, a Gaussian, and that of x_t given x_s
    precision = 1 / (before * STD**2 + 1 - before)[1:] + (at / (before - at))[1:]
    assert (np.abs(result.variance[1:] - 1 / precision) < 4 * result.standard_error[1:] + 1e-3 / precision).all()
    np.testing.assert_allclose(result.variance[0], exact_mse(scheduler)[0], rtol=0.03)
    assert (np.abs(result.x_start_mse / exact_mse(scheduler) - 1) < 0.03).all()
    assert (result.standard_error > 0).all()


def test_clipping_by_the_bounds():
    abar = np.array([0.99, 0.5, 0.01])
    np.testing.assert_allclose(clipped_x_start_mse(np.array([9.0, 9.0, 9.0]), abar), [0.01 / 0.99, 1.0, 1.0])
    np.testing.assert_array_equal(clipped_x_start_mse(np.array([-1.0, 0.2, 0.3]), abar), [0, 0.2, 0.3])


def test_transitions_are_those_of_a_chain():
    scheduler, _ = make()
    chain = [1, 4, 10]
    scheduler.set_timesteps(timesteps=chain[::-1])
    abar = scheduler.alphas_cumprod.numpy()
    q = transitions(abar[:, None], abar[None, :])
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for s, t in itertools.pairwise(chain):
        posterior = scheduler.q_posterior(x, 0 * x, t)
        assert q.variance[s, t] == pytest.approx(posterior.variance.item())
        assert q.of_x_start[s, t] == pytest.approx(posterior.mean.item())
    assert np.isnan(q.variance[4, 4]) and np.isnan(q.variance[10, 1])


@pytest.mark.parametrize(
    "own, variance_type",
    [
        ("fixed_small", "fixed_small"),
        ("fixed_large", "fixed_large"),
        ("fixed_small", "analytic"),
        ("learned_range", "learned_range"),
    ],
)
def test_the_best_list_is_that_of_brute_force(x_start, own, variance_type):
    scheduler, network = make(variance_type=own, share=0.3 if own == "learned_range" else None)
    errors = measured(scheduler, network, x_start)
    costs = errors.step_costs(variance_type)

    def cost(chain):
        opening = costs.first[chain[:2]] if len(chain) > 1 else costs.alone[chain[0]]
        return opening + sum(costs.kl[pair] for pair in itertools.pairwise(chain)) + costs.prior[chain[-1]]

    bounds, chains = best_chains(costs, 12)
    for steps in range(1, 13):
        best = min(itertools.combinations(range(12), steps), key=cost)
        assert tuple(chains[steps - 1]) == best and bounds[steps - 1] == pytest.approx(cost(best), abs=1e-12)
        estimate = errors.bits_per_dim(list(best), variance_type)
        assert estimate.value == pytest.approx(bounds[steps - 1], abs=1e-9)


@pytest.mark.parametrize(
    "own, variance_type, chain",
    [
        ("fixed_small", "analytic", [0, 3, 7, 11]),
        ("fixed_small", "fixed_small", [1, 2, 3, 8, 11]),
        ("fixed_large", "fixed_large", [1, 5, 11]),
        ("learned_range", "learned_range", [0, 1, 4, 6, 11]),
        ("fixed_small", "fixed_small", [5]),
        ("fixed_small", "analytic", [5]),
    ],
)
def test_the_table_gives_the_bound_of_a_chain(x_start, own, variance_type, chain):
    scheduler, network = make(variance_type=own, share=0.3 if own == "learned_range" else None)
    errors = measured(scheduler, network, x_start)
    estimate = errors.bits_per_dim(chain, variance_type)
    if variance_type == "analytic":
        mse = errors.x_start_mse().value
        scheduler = VariationalDDPMScheduler.from_config(scheduler.config, variance_type="analytic", x_start_mse=mse)
    scheduler.set_timesteps(timesteps=chain[::-1])
    bound = bits_per_dim(network, scheduler, x_start, generator=seeded(), clip_sample=False)
    assert bound.mean == pytest.approx(estimate.value, abs=4 * bound.standard_error + 0.01)
    assert estimate.standard_error == pytest.approx(bound.standard_error, rel=0.7)


def test_analytic_beats_fixed_variances_with_few_steps(x_start):
    """With the exact network, the exact variance makes the chain exact: the images' code length, for any number of steps."""
    scheduler, network = make(1000)
    errors = measured(scheduler, network, x_start, 100)
    (analytic,) = optimal_chains(errors, [8], "analytic")
    (fixed,) = optimal_chains(errors, [8], "fixed_small")
    z = (x_start - MEAN) / STD
    nats = 0.5 * z.square().mean().item() + 0.5 * math.log(2 * math.pi * STD**2) + math.log((LEVELS - 1) / 2)
    assert analytic.bits_per_dim == pytest.approx(nats / math.log(2), abs=0.03)
    assert fixed.bits_per_dim > analytic.bits_per_dim
    assert analytic.timesteps == sorted(analytic.timesteps, reverse=True) and len(analytic.timesteps) == 8


class TestScheduler:
    def analytic(self, **options):
        scheduler, network = make(**options)
        mse = exact_mse(scheduler).tolist()
        lists = {"optimal": {"3": [0, 4, 11]}}
        scheduler = VariationalDDPMScheduler.from_config(
            scheduler.config, variance_type="analytic", x_start_mse=mse, timestep_lists=lists
        )
        return scheduler, network

    def test_ancestral_samples_have_the_distribution_of_the_data(self):
        scheduler, network = self.analytic()
        scheduler.set_timesteps(3, timesteps="optimal")
        assert scheduler.chain == [0, 4, 11]
        for eta in (None, 0.0, 0.5, 1.0):
            generator = seeded()
            x = torch.randn(4000, 1, 2, 2, generator=generator, dtype=torch.float64)
            for t in scheduler.timesteps.tolist():
                x = scheduler.step(network(x, t)[0], t, x, eta=eta, generator=generator).prev_sample
            # the last step returns the mean of x_0, whose variance is smaller by the error that is left
            std = math.sqrt(STD**2 - exact_mse(scheduler)[0])
            assert x.mean().item() == pytest.approx(MEAN, abs=0.01) and x.std().item() == pytest.approx(
                std, rel=0.04
            ), eta

    def test_config(self, tmp_path):
        scheduler, _ = self.analytic()
        assert scheduler.config.variance_type == "fixed_small"  # what stock reads
        scheduler.save_pretrained(tmp_path)
        again = VariationalDDPMScheduler.from_pretrained(tmp_path)
        assert again.variance_type == "analytic" and again.timestep_lists == scheduler.timestep_lists
        np.testing.assert_array_equal(again.x_start_mse, scheduler.x_start_mse)
        plain = VariationalDDPMScheduler.from_config(again.config, variance_type="fixed_large")
        assert plain.variance_type == "fixed_large" and plain.x_start_mse is None

    @pytest.mark.parametrize(
        "options, text",
        [
            ({"variance_type": "analytic"}, "needs x_start_mse"),
            ({"variance_type": "analytic", "x_start_mse": [0.1] * 3}, "x_start_mse has 3 entries"),
            ({"variance_type": "analytic", "x_start_mse": [2.0] * 1000}, "x_start_mse=.* must be"),
            ({"timestep_lists": {"a": {"2": [1, 1000]}}}, "must have that number of ascending timesteps below 1000"),
            ({"timestep_lists": {"a": {"3": [1, 2]}}}, "that number of ascending timesteps"),
            ({"timestep_lists": {"a": [1, 2]}}, "must have names, and for each lists by number of steps"),
            ({"timestep_lists": {"a": {}}}, "must have names, and for each lists by number of steps"),
            ({"timestep_lists": {"a": {"0": []}}}, "that number of ascending timesteps"),
            ({"timestep_lists": {"a\nb": {"1": [1000]}}}, r"^timestep_lists: 'a\\nb', '1' must"),
        ],
    )
    def test_bad_configs(self, options, text):
        with pytest.raises(ValueError, match=text):
            VariationalDDPMScheduler(**options)

    def test_bad_names(self):
        scheduler, _ = self.analytic()
        with pytest.raises(ValueError, match="timesteps='best' is no list of this scheduler; it has optimal"):
            scheduler.set_timesteps(3, timesteps="best")
        with pytest.raises(ValueError, match="num_inference_steps=4: the lists of timesteps='optimal' have 3 steps"):
            scheduler.set_timesteps(4, timesteps="optimal")

    def test_pipeline(self):
        scheduler, _ = self.analytic()
        unet = DDPMUNet(
            8,
            1,
            1,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            attention_head_dim=8,
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
        )
        pipe = DDPMImagePipeline(unet, scheduler)
        seen = [int(t) for t, *_ in pipe.progressive(1, num_inference_steps=3, timesteps="optimal")]
        assert seen == [11, 4, 0]
        with pytest.raises(ValueError, match="have 3 steps"):
            pipe(num_inference_steps=5, timesteps="optimal")
        pipe.scheduler = DDIMScheduler.from_config(scheduler.config)
        with pytest.raises(ValueError, match="timesteps='optimal': DDIMScheduler has no lists of timesteps"):
            pipe(num_inference_steps=3, timesteps="optimal")

    def test_it_replaces_a_learned_variance(self, x_start):
        scheduler, network = self.analytic()
        learned = ExactNetwork(scheduler, share=0.3)
        bounds = [bits_per_dim(unet, scheduler, x_start[:3], generator=seeded()).total for unet in (network, learned)]
        assert torch.equal(*bounds)
        x = x_start[:1]
        steps = [scheduler.step(unet(x, 5)[0], 5, x, generator=seeded()).prev_sample for unet in (network, learned)]
        assert torch.equal(*steps)

    def test_an_error_of_zero_has_a_finite_bound(self):
        scheduler, _ = make(variance_type="analytic", x_start_mse=[0.0] * 12)
        x = torch.zeros(1, 1, 4, 4)
        bound = bits_per_dim(lambda x_t, t, **kw: (x_t / (1 - scheduler.alphas_cumprod[t]).sqrt(),), scheduler, x)
        assert bound.mean < 1


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "analytic"])
@pytest.mark.parametrize("chain", [[0, 1, 400], [200, 201, 900], [600, 999], [999]])
def test_coarse_levels_late_starts_and_poor_networks(variance_type, chain):
    """A network that always predicts 0.3 for black and white pixels has a bound without noise."""
    own = "fixed_small" if variance_type == "analytic" else variance_type
    scheduler = VariationalDDPMScheduler(1000, levels=2, prediction_type="sample", variance_type=own)
    x = torch.ones(4, 1, 2, 2, dtype=torch.float64)
    x[:, :, 0] = -1

    def network(x_t, t, **kwargs):
        return (torch.full_like(x_t, 0.3),)

    errors = measure_denoising_errors(network, scheduler, x, num_evaluations=1000)
    estimate = errors.bits_per_dim(chain, variance_type).value
    costs = errors.step_costs(variance_type)
    opening = costs.first[tuple(chain[:2])] if len(chain) > 1 else costs.alone[chain[0]]
    total = opening + sum(costs.kl[pair] for pair in itertools.pairwise(chain)) + costs.prior[chain[-1]]
    if variance_type == "analytic":
        mse = errors.x_start_mse().value
        scheduler = VariationalDDPMScheduler.from_config(scheduler.config, variance_type="analytic", x_start_mse=mse)
    scheduler.set_timesteps(timesteps=chain[::-1])
    bound = bits_per_dim(network, scheduler, x, batch_size=3).mean
    assert estimate == pytest.approx(bound, rel=0.01) and total == pytest.approx(estimate, rel=1e-9)


def test_a_process_of_one_noisy_step():
    scheduler = VariationalDDPMScheduler(trained_betas=[0.9], prediction_type="sample")
    result = optimal_timesteps(lambda x, t, **kw: (0 * x,), scheduler, torch.ones(1, 1, 2, 2), steps=1)
    assert result.timesteps == [0] and math.isfinite(result.bits_per_dim) and math.isnan(result.standard_error)


def test_a_directly_learned_variance_is_only_replaced(x_start):
    scheduler, network = make(variance_type="learned", share=0.3)
    errors = measured(scheduler, network, x_start[:10])
    with pytest.raises(ValueError, match="variance_type='learned' .*; choose 'analytic'"):
        optimal_chains(errors, [3], "learned")
    assert len(optimal_chains(errors, [3], "analytic")[0].timesteps) == 3
    assert list(compare_chains(errors, [3]).optimal) == ["analytic"]


def test_bad_input(x_start):
    scheduler, network = make()
    for options, text in (
        ({"steps": 13}, "steps=13 must be an integer, 1 to 12"),
        ({"steps": 0}, "steps=0 must be"),
        ({"steps": 3, "num_evaluations": 1}, "num_evaluations=1 must be"),
        ({"steps": 3, "variance_type": "learned_range"}, "is not for a network of variance_type='fixed_small'"),
    ):
        with pytest.raises(ValueError, match=text):
            optimal_timesteps(network, scheduler, x_start, clip_sample=False, **options)
    with pytest.raises(ValueError, match="off the grid"):
        optimal_timesteps(network, scheduler, x_start + 1e-4, steps=3)
    with pytest.raises(ValueError, match="zero signal-to-noise ratio"):
        optimal_timesteps(network, make(rescale_betas_zero_snr=True)[0], x_start, steps=3)
    with pytest.raises(ValueError, match="previous"):
        optimal_timesteps(network, make(prediction_type="previous")[0], x_start, steps=3)
    with pytest.raises(ValueError, match="num_train_timesteps=20000 is too many: .* up to 10000"):
        optimal_timesteps(
            network, VariationalDDPMScheduler(20000, beta_schedule="cosine"), torch.ones(1, 1, 2, 2), steps=3
        )
    with pytest.raises(ValueError, match="has no bound"):
        optimal_timesteps(network, object(), x_start, steps=3)
