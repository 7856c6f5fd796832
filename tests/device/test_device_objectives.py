import copy

import pytest
import torch

from ddpm_hf import (
    ContinuousBoundObjective,
    DiffusionObjective,
    LearnedNoiseSchedule,
    ScoreObjective,
    VariationalDDPMScheduler,
)
from ddpm_hf.schedulers.ddpm import PREDICTION_TYPES
from ddpm_hf.schedulers.sde import VESDE, VPSDE, ChainSDE, SubVPSDE
from ddpm_hf.training.losses import SCORE_WEIGHTINGS, WEIGHTINGS, drop_labels
from ddpm_hf.training.timesteps import (
    ContinuousTimes,
    LossSecondMomentTimesteps,
    LowDiscrepancyTimesteps,
    UniformTimesteps,
)
from support.compare import assert_close

T = 20
LOSSES = [
    *(("simple", prediction, None) for prediction in PREDICTION_TYPES),
    *(("simple", prediction, name) for name in WEIGHTINGS for prediction in ("sample", "v_prediction")),
    *(("vlb", prediction, None) for prediction in PREDICTION_TYPES),
    ("hybrid", "epsilon", None),
]


@pytest.fixture
def batch():
    return torch.randint(0, 17, (4, 1, 8, 8)) / 8 - 1, torch.tensor([0, 3, 11, 19]), torch.randn(4, 1, 8, 8)


def scheduler_of(**config):
    return VariationalDDPMScheduler(T, **dict(beta_schedule="squaredcos_cap_v2", levels=17) | config)


@pytest.mark.parametrize(("loss", "prediction_type", "weighting"), LOSSES)
def test_losses_and_gradients(device, unet, batch, loss, prediction_type, weighting):
    learned = loss == "hybrid"
    scheduler = scheduler_of(
        prediction_type=prediction_type, variance_type="learned_range" if learned else "fixed_large"
    )
    network, (x_start, t, noise) = unet(out_channels=2 if learned else 1), batch
    there = copy.deepcopy(network).to(device)
    objective = DiffusionObjective(scheduler, loss, weighting=weighting)
    expected = objective(network, x_start, t=t, noise=noise)
    actual = objective(there, x_start.to(device), t=t.to(device), noise=noise.to(device))
    assert_close(actual, expected)
    assert_close(objective(there, x_start.to(device), t=t, noise=noise.to(device)), expected)  # t of the CPU
    for losses in (expected, actual):
        losses.mean().backward()
    assert_close(*({key: p.grad for key, p in net.named_parameters()} for net in (there, network)))
    assert objective(there, x_start.to(device)).isfinite().all()  # with draws of its own


@pytest.mark.parametrize("weighting", SCORE_WEIGHTINGS)
@pytest.mark.parametrize(
    "sde",
    [VPSDE(N=T), SubVPSDE(N=T), VESDE(), ChainSDE(scheduler_of().alphas_cumprod)],
    ids=["vp", "subvp", "ve", "chain"],
)
def test_losses_of_continuous_time(device, unet, batch, sde, weighting):
    network = unet(time_embedding_type="fourier" if isinstance(sde, VESDE) else "positional")
    there, (x_start, _, noise) = copy.deepcopy(network).to(device), batch
    objective = ScoreObjective(sde, weighting)
    t = objective.times[[0, 5, 10, -1]]
    expected = objective(network, x_start, t=t, noise=noise)
    assert_close(objective(there, x_start.to(device), t=t, noise=noise.to(device)), expected, 1e-3)
    assert objective(there, x_start.to(device)).isfinite().all()


@pytest.mark.parametrize("loss", ["vlb", "vlb_continuous"])
def test_learned_betas(device, unet, batch, loss):
    network, (x_start, t, noise) = unet(), batch
    results = []
    for place in ("cpu", device):
        there, schedule = copy.deepcopy(network).to(place), LearnedNoiseSchedule(T).to(place)
        scheduler = scheduler_of(beta_schedule="learned", trained_betas=LearnedNoiseSchedule(T).betas()[0].tolist())
        if loss == "vlb":
            objective = DiffusionObjective(scheduler, "vlb", noise_schedule=schedule)
        else:
            objective = ContinuousBoundObjective(scheduler, schedule)
        losses = objective(there, x_start.to(place), t=t.to(place), noise=noise.to(place))
        losses.mean().backward()
        results.append({"losses": losses, **{name: value.grad for name, value in schedule.named_parameters()}})
        assert objective(there, x_start.to(place)).isfinite().all()  # with draws of its own
    assert_close(results[1], results[0], 1e-3)


@pytest.mark.parametrize("kind", [UniformTimesteps, LowDiscrepancyTimesteps])
@pytest.mark.parametrize("source", ["default", "cpu", "device"])
def test_timesteps_of_weight_one(device, kind, source):
    generator = None if source == "default" else torch.Generator("cpu" if source == "cpu" else device).manual_seed(0)
    t, weights = kind(scheduler_of()).sample(5, device, generator)
    assert t.device.type == weights.device.type == device.type and t.dtype == torch.int64
    assert weights.tolist() == [1.0] * 5 and t.min() >= 0 and t.max() < T


def test_importance_of_timesteps_is_learned_as_on_the_cpu(device):
    scheduler = scheduler_of()
    samplers = [LossSecondMomentTimesteps(scheduler, history_per_timestep=3) for _ in range(2)]
    for i in range(T * 3 // 12 + 3):
        t = (torch.arange(12) + 12 * i) % T
        losses = (1 + t) / T + 0.01 * torch.rand(12)
        losses[i % 3] = torch.nan if i == 4 else losses[i % 3]
        for sampler, target in zip(samplers, (device, "cpu")):
            sampler.update(t.to(target), losses.to(target))
    actual, expected = samplers
    assert actual.losses.device.type == device.type
    assert_close(
        {key: value.float() for key, value in actual.state_dict().items()},
        {key: value.float() for key, value in expected.state_dict().items()},
    )
    assert_close(actual.probabilities().float(), expected.probabilities().float(), 1e-6)
    assert not torch.allclose(expected.probabilities(), torch.tensor(1 / T, dtype=torch.float64))
    t, weights = actual.sample(2000, device, torch.Generator(device).manual_seed(0))
    assert t.device.type == weights.device.type == device.type
    assert abs(weights.mean().item() - 1) < 0.05  # E[1 / (N p)] = 1
    # a checkpoint of either device is for the other, too
    for sampler, state in ((actual, expected.state_dict()), (expected, actual.state_dict())):
        sampler.load_state_dict(state)
        sampler.sample(4, "cpu")


@pytest.mark.parametrize("arguments", [{}, {"importance": True}, {"low_discrepancy": True}], ids=str)
def test_continuous_times_with_and_without_a_device(device, arguments, generator):
    """Of a call with a device nothing stays for the next one without."""
    times, fresh = (ContinuousTimes(VPSDE(), **arguments) for _ in range(2))
    t, weights = times.sample(2000, device, torch.Generator(device).manual_seed(0))
    assert t.device.type == weights.device.type == device.type
    assert ((t > 0) & (t <= 1)).all()
    assert abs(weights.mean().item() - 1) < 0.05
    repeated = times.sample(50, generator=generator())
    expected = fresh.sample(50, generator=generator())
    assert repeated[0].device.type == "cpu" and repeated[0].dtype == torch.float64
    assert all(torch.equal(*pair) for pair in zip(repeated, expected))


def test_labels_are_dropped_on_the_device(device):
    labels = drop_labels(torch.zeros(1000, dtype=torch.int64, device=device), 10, 0.25)
    assert labels.device.type == device.type and 180 < (labels == 10).sum().item() < 320
