"""Evenly spread timesteps (VDM, Kingma et al. 2021) by what holds exactly for points at equal distances on a circle."""

import math

import pytest
import torch

from ddpm_hf import (
    ChainSDE,
    ContinuousTimes,
    DiffusionObjective,
    LowDiscrepancyTimesteps,
    UniformTimesteps,
    VariationalDDPMScheduler,
)
from ddpm_hf.schedulers.sde import VESDE, VPSDE, SubVPSDE
from ddpm_hf.training.timesteps import low_discrepancy_points

CPU = torch.device("cpu")
PROCESSES = [VPSDE(), SubVPSDE(), VESDE(), ChainSDE(VariationalDDPMScheduler(40).alphas_cumprod)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(sampler, batch_size, draws, seed=0):
    """Timesteps or times, (draws, batch_size)."""
    generator = seeded(seed)
    return torch.stack([sampler.sample(batch_size, generator=generator)[0] for _ in range(draws)])


def subsequence():
    scheduler = VariationalDDPMScheduler(100)
    scheduler.set_timesteps(timesteps=[90, 70, 61, 60, 33, 12, 3])
    return scheduler


@pytest.mark.parametrize("batch_size", [1, 2, 7, 64])
def test_the_points(batch_size):
    """One shift for all: their differences are multiples of 1 / batch_size, each multiple once."""
    points = torch.stack([low_discrepancy_points(batch_size, CPU, seeded(seed)) for seed in range(200)])
    assert points.dtype == torch.float64 and points.min() >= 0 and points.max() < 1
    multiples = (points - points[:, :1]) % 1 * batch_size
    expected = torch.arange(batch_size, dtype=torch.float64).expand(200, -1)
    torch.testing.assert_close(multiples, expected, rtol=0, atol=1e-12)
    shifts = points[:, -1].sort().values  # of any image, here the last, uniform: Kolmogorov and Smirnov at 1e-6
    steps = torch.arange(1, 201) / 200
    assert (shifts - steps).abs().max() < 2.7 / math.sqrt(200)


@pytest.mark.parametrize("batch_size, steps", [(10, 10), (30, 10), (7, 7), (64, 16)])
def test_batches_of_a_multiple_of_the_length_have_every_timestep_equally_often(batch_size, steps):
    t = drawn(LowDiscrepancyTimesteps(VariationalDDPMScheduler(steps)), batch_size, 200)
    counts = torch.stack([row.bincount(minlength=steps) for row in t])
    assert (counts == batch_size // steps).all()
    assert len({tuple(row) for row in t.tolist()}) > 1  # in another order


@pytest.mark.parametrize("batch_size, steps", [(1, 10), (3, 10), (4, 1000), (7, 64), (9, 10), (25, 10)])
def test_gaps_and_counts_of_other_batches(batch_size, steps):
    t = drawn(LowDiscrepancyTimesteps(VariationalDDPMScheduler(steps)), batch_size, 200).sort(1).values
    gaps = torch.cat((t.diff(dim=1), t[:, :1] + steps - t[:, -1:]), dim=1)  # around the circle
    assert set(gaps.flatten().tolist()) <= {steps // batch_size, -(-steps // batch_size)}
    for end in range(1, steps + 1):
        inside = (t < end).sum(1)
        assert (inside - batch_size * end / steps).abs().max() < 1


@pytest.mark.parametrize("index", [0, 2])
def test_each_timestep_is_uniform_by_itself(index):
    """Of any image of the batch, and not only of the batch as a whole: every timestep equally often, by chi-square."""
    steps, draws = 10, 20000
    counts = drawn(LowDiscrepancyTimesteps(VariationalDDPMScheduler(steps)), 4, draws)[:, index].bincount()
    chi_square = ((counts - draws / steps) ** 2 / (draws / steps)).sum()
    assert chi_square < 45  # above it with a probability below 1e-6


def test_the_mean_of_a_batch_varies_far_less_and_stays_unbiased():
    scheduler, batch_size, draws = VariationalDDPMScheduler(1000), 32, 4000

    def function(t):
        return torch.exp(-t / 200) + 0.3 * torch.sin(t / 150)

    exact = function(torch.arange(1000, dtype=torch.float64)).mean()
    even, uniform = (
        function(drawn(kind(scheduler), batch_size, draws).double()).mean(1)
        for kind in (LowDiscrepancyTimesteps, UniformTimesteps)
    )
    for means in (even, uniform):
        assert abs(means.mean() - exact) < 5 * means.std() / math.sqrt(draws)
    assert even.var() < uniform.var() / 50


def test_the_loss_of_a_network_varies_less():
    """The losses themselves, of a network whose error depends on t alone."""
    scheduler = VariationalDDPMScheduler(100)
    objective, x_start, noise = DiffusionObjective(scheduler), torch.zeros(20, 1, 2, 2), torch.randn(20, 1, 2, 2)

    def network(x_t, t, class_labels=None, return_dict=False):
        return (noise + (t / 100).view(-1, 1, 1, 1),)

    def mean_losses(sampler):
        generator = seeded()
        losses = []
        for _ in range(300):
            t, weights = sampler.sample(20, generator=generator)
            losses.append((objective(network, x_start, t=t, noise=noise) * weights).mean())
        return torch.stack(losses)

    even, uniform = mean_losses(LowDiscrepancyTimesteps(scheduler)), mean_losses(UniformTimesteps(scheduler))
    exact = ((torch.arange(100) / 100) ** 2).mean()
    assert abs(even.mean() - exact) < 5 * even.std() / math.sqrt(300)
    assert even.var() < uniform.var() / 20


def test_chains_that_are_subsequences():
    scheduler = subsequence()
    sampler = LowDiscrepancyTimesteps(scheduler)
    for t in drawn(sampler, 14, 20):
        assert sorted(t.tolist()) == sorted(2 * scheduler.chain)
    assert set(drawn(sampler, 1, 200).flatten().tolist()) == set(scheduler.chain)
    scheduler.set_timesteps(5)  # as a sheet of samples does during training
    assert set(drawn(sampler, 7, 1).flatten().tolist()) == {3, 12, 33, 60, 61, 70, 90}


def samplers():
    yield LowDiscrepancyTimesteps(subsequence())
    yield from (ContinuousTimes(sde, low_discrepancy=True) for sde in PROCESSES)


@pytest.mark.parametrize("sampler", samplers(), ids=lambda sampler: type(sampler).__name__)
def test_the_interface(sampler):
    first, again, other = (sampler.sample(5, generator=seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])
    for t, weights in (first, sampler.sample(1), sampler.sample(3, CPU)):
        assert t.shape == weights.shape and weights.dtype == torch.float32 and (weights == 1).all()
        assert t.dtype == (torch.int64 if isinstance(sampler, LowDiscrepancyTimesteps) else torch.float64)
    sampler.update(first[0], torch.ones(5))
    assert sampler.state_dict() == {}
    sampler.load_state_dict({})
    torch.manual_seed(5)
    one = sampler.sample(5)[0]
    torch.manual_seed(5)
    assert torch.equal(sampler.sample(5)[0], one)


@pytest.mark.parametrize("sde", PROCESSES, ids=lambda sde: type(sde).__name__)
def test_continuous_times(sde):
    t = drawn(ContinuousTimes(sde, low_discrepancy=True), 16, 500)
    assert t.min() >= sde.t_min and t.max() <= 1
    width = (1 - sde.t_min) / 16
    widths = torch.full((500, 15), width, dtype=torch.float64)
    torch.testing.assert_close(t.sort(1).values.diff(dim=1), widths, rtol=0, atol=1e-12)
    even, uniform = t.square().mean(1), drawn(ContinuousTimes(sde), 16, 500).square().mean(1)
    exact = (1 - sde.t_min**3) / (3 * (1 - sde.t_min))
    assert abs(even.mean() - exact) < 5 * even.std() / math.sqrt(500)
    assert even.var() < uniform.var() / 10
    single = drawn(ContinuousTimes(sde, low_discrepancy=True), 1, 500)
    assert single.min() < sde.t_min + 0.05 and single.max() > 0.95


def test_importance_is_another_choice():
    with pytest.raises(ValueError, match="^importance=True and low_discrepancy=True exclude each other; give one$"):
        ContinuousTimes(VPSDE(), importance=True, low_discrepancy=True)
