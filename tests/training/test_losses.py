import math
import os
import socket

import pytest
import torch

from ddpm_hf import (
    ContinuousTimes,
    DiffusionObjective,
    LossSecondMomentTimesteps,
    ScoreObjective,
    VariationalDDPMScheduler,
)
from ddpm_hf.likelihood.solver import process_of
from ddpm_hf.schedulers.sde import VESDE, VPSDE, SubVPSDE
from support.golden_data import case_id, case_scheduler, golden_cases, images, network, randn

F64 = torch.float64
SEED_TRAIN = 3


def scaled_network(case, a, b):
    def unet(x, t, class_labels=None, return_dict=True):
        output = network(x, t, case["mean_type"], case["var_type"])
        if output.shape[1] == x.shape[1]:
            return (a * output,)
        mean, v = output.chunk(2, dim=1)
        return (torch.cat((a * mean, b * v), dim=1),)

    return unet


def tanh_log_likelihood(x, mean, log_scale, levels=256):
    """The decoder of the reference: a tanh in place of the normal CDF, probabilities floored at 1e-12."""

    def cdf(z):
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    half, scale = 1 / (levels - 1), torch.exp(log_scale)
    upper, lower = cdf((x - mean + half) / scale), cdf((x - mean - half) / scale)
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return torch.log(probability.clamp(min=1e-12))


@pytest.mark.parametrize("case", golden_cases("training_losses"), ids=lambda c: f"{case_id(c)}-{c['loss_type']}")
def test_golden(case, monkeypatch):
    monkeypatch.setattr("ddpm_hf.schedulers.ddpm.discretized_gaussian_log_likelihood", tanh_log_likelihood)
    scheduler, steps = case_scheduler(case), case["T"]
    bound = case["loss_type"].endswith("KL")
    hybrid = case["var_type"] == "LEARNED_RANGE" and not bound
    # RESCALED_MSE weighs the bound's term by steps / 1000, MSE by 1
    weight = 0.001 if case["loss_type"].startswith("RESCALED") else 1 / steps
    objective = DiffusionObjective(scheduler, "vlb" if bound else "hybrid" if hybrid else "simple", vlb_weight=weight)
    a, b = (torch.ones((), dtype=torch.float64, requires_grad=True) for _ in range(2))
    losses = objective(scaled_network(case, a, b), images(), t=torch.tensor(case["t"]), noise=randn(SEED_TRAIN))
    if case["loss_type"] == "KL":
        losses = losses / steps
    torch.testing.assert_close(losses, torch.tensor(case["loss"], dtype=torch.float64), rtol=1e-7, atol=1e-8)
    losses.mean().backward()
    assert "dmean_da" in case
    assert a.grad.item() == pytest.approx(case["dmean_da"], rel=1e-7)
    if "dmean_db" in case:
        assert b.grad.item() == pytest.approx(case["dmean_db"], rel=1e-7)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction", "previous"])
def test_a_network_that_knows_the_answer_has_no_loss(prediction):
    scheduler = VariationalDDPMScheduler(prediction_type=prediction, variance_type="fixed_large")
    x_start, noise, t = torch.rand(5, 1, 4, 4) * 2 - 1, torch.randn(5, 1, 4, 4), torch.tensor([0, 1, 10, 500, 999])

    def oracle(x_t, t, class_labels=None, return_dict=True):
        return (scheduler.prediction_target(x_start, x_t, noise, t),)

    losses = DiffusionObjective(scheduler)(oracle, x_start, t=t, noise=noise)
    assert losses.max() < 1e-10
    wrong = DiffusionObjective(scheduler)(lambda *a, **k: (torch.zeros(5, 1, 4, 4),), x_start, t=t, noise=noise)
    assert wrong.min() > 1e-3
    # the same answer, seen by p: the predicted x_0 is x_0
    x_t = scheduler.q_sample(x_start, t, noise)
    pred = scheduler.p_mean_variance(oracle(x_t, t)[0], x_t, t).pred_original_sample
    torch.testing.assert_close(pred, x_start, rtol=1e-3, atol=1e-3)


def test_hybrid_leaves_the_mean_to_the_simple_loss():
    scheduler = VariationalDDPMScheduler(variance_type="learned_range")
    weight = torch.ones(2, requires_grad=True)

    def unet(x, t, class_labels=None, return_dict=True):
        return (torch.cat((weight[0] * x, weight[1] * x), dim=1),)

    x_start, noise, t = torch.rand(4, 1, 4, 4), torch.randn(4, 1, 4, 4), torch.tensor([3, 5, 100, 900])
    gradients = {}
    for loss in ("simple", "hybrid"):
        weight.grad = None
        DiffusionObjective(scheduler, loss)(unet, x_start, t=t, noise=noise).sum().backward()
        gradients[loss] = weight.grad.clone()
    assert gradients["simple"][0] == gradients["hybrid"][0] != 0
    assert gradients["simple"][1] == 0 != gradients["hybrid"][1]


def test_timesteps_are_drawn_from_the_chain():
    scheduler = VariationalDDPMScheduler()
    scheduler.set_timesteps(timesteps=[900, 500, 7])
    drawn = scheduler.draw_timesteps(3000)
    counts = [(drawn == t).sum().item() for t in (7, 500, 900)]
    assert sum(counts) == 3000 and min(counts) > 850


def test_vlb_with_a_fixed_variance_has_the_weights_of_eq_12():
    scheduler = VariationalDDPMScheduler(variance_type="fixed_small")
    x_start, noise = torch.rand(4, 1, 4, 4, dtype=F64), torch.randn(4, 1, 4, 4, dtype=F64)
    t = torch.tensor([1, 10, 500, 999])

    def losses(loss):
        return DiffusionObjective(scheduler, loss)(lambda x, t, **_: (0.5 * x,), x_start, t=t, noise=noise)

    beta, abar = scheduler.betas[t], scheduler.alphas_cumprod[t]
    variance = beta * (1 - scheduler.alphas_cumprod[t - 1]) / (1 - abar)
    eq_12 = beta**2 / (2 * variance * (1 - beta) * (1 - abar)) * losses("simple")
    torch.testing.assert_close(losses("vlb"), 1000 * eq_12 / math.log(2), rtol=1e-9, atol=0)


@pytest.mark.parametrize("chain", [None, [999, 500, 250, 50, 1, 0]], ids=["all", "some"])
@pytest.mark.parametrize("weighting", ["min_snr", "truncated_snr", "p2"])
def test_a_weighting_is_the_same_whatever_is_predicted(weighting, chain):
    """Of the same prediction of x_0, said in four ways; and the published forms of the weights."""
    x_start, noise, wrong = (torch.randn(6, 1, 4, 4, dtype=F64) for _ in range(3))
    t = torch.tensor([0, 1, 50, 250, 500, 999])

    def weighed(prediction, weighting):
        scheduler = VariationalDDPMScheduler(prediction_type=prediction)
        if chain:
            scheduler.set_timesteps(timesteps=chain)

        def unet(x_t, t, class_labels=None, return_dict=True):
            return (scheduler.prediction_target(wrong, x_t, scheduler.epsilon_from_x_start(wrong, x_t, t), t),)

        return DiffusionObjective(scheduler, weighting=weighting)(unet, x_start, t=t, noise=noise)

    abar = VariationalDDPMScheduler().alphas_cumprod[t]
    snr = abar / (1 - abar)
    of_epsilon = {"min_snr": snr.clamp(max=5) / snr, "truncated_snr": snr.clamp(min=1) / snr, "p2": 1 / (1 + snr)}
    expected = of_epsilon[weighting] * weighed("epsilon", None)
    for prediction in PREDICTIONS[weighting]:
        torch.testing.assert_close(weighed(prediction, weighting), expected, rtol=1e-5, atol=0)


PREDICTIONS = dict.fromkeys(("min_snr", "p2"), ("epsilon", "sample", "v_prediction", "previous"))
PREDICTIONS["truncated_snr"] = ("sample", "v_prediction")


@pytest.mark.parametrize("process", [{}, {"beta_schedule": "cosine"}, {"rescale_betas_zero_snr": True}])
@pytest.mark.parametrize("weighting", ["min_snr", "truncated_snr", "p2"])
def test_weights_are_bounded(weighting, process):
    """By those of the papers: 1 for epsilon and v, gamma or the largest SNR for x_0; and no loss of a poor network is large."""
    x_start, noise = torch.rand(1000, 1, 2, 2, dtype=F64) * 2 - 1, torch.randn(1000, 1, 2, 2, dtype=F64)
    for prediction in ("epsilon", "sample", "v_prediction", "previous"):
        scheduler = VariationalDDPMScheduler(prediction_type=prediction, **process)
        if prediction not in PREDICTIONS[weighting]:
            with pytest.raises(
                ValueError, match=f"^weighting='truncated_snr' is for .* this scheduler has '{prediction}'"
            ):
                DiffusionObjective(scheduler, weighting=weighting)
            continue
        objective = DiffusionObjective(scheduler, weighting=weighting)
        weights, snr = objective.weights.double(), 1 / (1 / scheduler.alphas_cumprod - 1)
        of_x_start = {"min_snr": 5.0, "truncated_snr": snr.max().item(), "p2": 1.0}[weighting]
        bound = {"epsilon": 1.0, "v_prediction": 1.0, "sample": of_x_start, "previous": math.inf}[prediction]
        assert weights.isfinite().all() and (weights >= 0).all() and weights.max() <= bound * 1.001
        losses = objective(lambda x_t, t, **_: (torch.zeros_like(x_t),), x_start, t=scheduler.timesteps, noise=noise)
        assert losses.isfinite().all()


@pytest.mark.parametrize("loss", ["simple", "vlb", "hybrid"])
def test_epsilon_says_nothing_of_x_0_at_zero_snr(loss):
    """The middle of the range is predicted there, in training and sampling: losses and samples are finite without clipping."""
    scheduler = VariationalDDPMScheduler(
        rescale_betas_zero_snr=True,
        variance_type="learned_range" if loss == "hybrid" else "fixed_small",
        clip_sample=False,
        timestep_spacing="trailing",
    )
    assert scheduler.alphas_cumprod[999] == 0
    x_start = torch.rand(2, 1, 4, 4) * 2 - 1
    off = torch.tensor(0.1, requires_grad=True)

    def unet(x_t, t, **_):
        output = x_t + off  # at t = 999 x_t is the noise
        return (torch.cat((output, output), dim=1) if loss == "hybrid" else output,)

    losses = DiffusionObjective(scheduler, loss)(unet, x_start, t=torch.full((2,), 999), noise=torch.randn(2, 1, 4, 4))
    losses.sum().backward()
    assert losses.max() < 100 and off.grad.isfinite()
    x_t = torch.randn(2, 1, 4, 4)
    step = scheduler.step(unet(x_t, 999)[0], 999, x_t)
    assert not step.pred_original_sample.any() and step.prev_sample.abs().max() < 6


GOLDEN_SAMPLER = golden_cases("respacing_resampler", "second_moment_resampler")


@pytest.mark.parametrize("batch_size", [1, 7, 25])
@pytest.mark.parametrize("case", GOLDEN_SAMPLER, ids=lambda case: str(case["T"]))
def test_golden_importance_sampling(case, batch_size):
    """The history is that of one update after another, however many come in one batch."""
    T = case["T"]
    scheduler = VariationalDDPMScheduler(T)
    for state in case["states"]:
        sampler = LossSecondMomentTimesteps(scheduler, case["history_per_term"], case["uniform_prob"])
        k = torch.arange(state["after_updates"])
        t = (7 * k) % T
        for part in k.split(batch_size):
            sampler.update(t[part], 0.1 + ((13 * part) % 17).double() / (1 + t[part]))
        expected = torch.tensor(state["weights"], dtype=F64)
        torch.testing.assert_close(sampler.probabilities(), expected / expected.sum(), rtol=1e-12, atol=1e-14)
        assert state["warmed_up"] == (not torch.equal(expected, torch.ones(T, dtype=F64)))
    drawn, weights = sampler.sample(4000)
    expected = torch.tensor(case["importance_weight_1_over_T_p_after_last"])
    torch.testing.assert_close(weights, expected[drawn], rtol=1e-6, atol=0)
    share = torch.bincount(drawn, minlength=T) / 4000
    assert (share - 1 / (T * expected)).abs().max() < 0.04


def test_importance_sampling_is_unbiased_on_a_chain():
    scheduler = VariationalDDPMScheduler()
    scheduler.set_timesteps(timesteps=[900, 500, 40, 7])
    sampler = LossSecondMomentTimesteps(scheduler, history_per_timestep=3)
    loss = torch.zeros(1000, dtype=F64).index_put_(
        (torch.tensor([7, 40, 500, 900]),), torch.tensor([9.0, 1, 4, 2]).double()
    )
    t, weights = sampler.sample(100)
    assert (weights == 1).all() and set(t.tolist()) == {7, 40, 500, 900}
    for _ in range(3):
        sampler.update(t, loss[t])
    t, weights = sampler.sample(20000, generator=torch.Generator().manual_seed(0))
    assert (t == 7).float().mean() == pytest.approx(9 / 16, abs=0.02)
    # of a loss that t decides alone the weighted one is constant: no variance is left
    torch.testing.assert_close(weights * loss[t], torch.full((20000,), 4.0, dtype=F64), rtol=0.01, atol=0)
    other = LossSecondMomentTimesteps(scheduler, history_per_timestep=3)
    other.load_state_dict(sampler.state_dict())
    assert torch.equal(other.probabilities(), sampler.probabilities())
    before = sampler.probabilities()
    sampler.update(torch.tensor([7, 40]), torch.tensor([math.nan, math.inf]))
    assert torch.equal(before, sampler.probabilities()) and torch.equal(before, other.probabilities())
    with pytest.raises(ValueError, match="is from a sampler of another chain"):
        LossSecondMomentTimesteps(VariationalDDPMScheduler()).load_state_dict(sampler.state_dict())


def _share_histories(rank, port, queue):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.distributed.init_process_group("gloo")
    sampler = LossSecondMomentTimesteps(VariationalDDPMScheduler(4), history_per_timestep=2)
    for t in (0, 1, 2, 3):
        sampler.update(torch.tensor([t]), torch.tensor([1.0 + t + 10 * rank]))
    queue.put((rank, sampler.probabilities().tolist()))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_share_one_history():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    processes = [context.Process(target=_share_histories, args=(rank, port, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    histories = dict(queue.get() for _ in processes)
    for process in processes:
        process.join()
    size = torch.tensor([((1.0 + t) ** 2 + (11.0 + t) ** 2) ** 0.5 for t in range(4)], dtype=F64)
    expected = 0.999 * size / size.sum() + 0.001 / 4
    assert histories[0] == histories[1] == pytest.approx(expected.tolist(), rel=1e-12)


def test_mean_of_vlb_over_t_is_the_bound():
    scheduler = VariationalDDPMScheduler(num_train_timesteps=20, beta_schedule="linear_scaled_by_T")
    x_start, noise = torch.randint(0, 256, (2, 1, 4, 4)) / 127.5 - 1, torch.randn(2, 1, 4, 4)

    def unet(x, t, class_labels=None, return_dict=True):
        return (0.5 * x,)

    losses = [
        DiffusionObjective(scheduler, "vlb")(unet, x_start, t=torch.full((2,), t), noise=noise) for t in range(20)
    ]
    terms = []
    for t in range(20):
        x_t = scheduler.q_sample(x_start, t, noise)
        terms.append(scheduler.vlb_term(0.5 * x_t, x_start, x_t, t, clip_sample=False))
    torch.testing.assert_close(torch.stack(losses).mean(0), torch.stack(terms).sum(0))


def test_wrong_arguments():
    with pytest.raises(ValueError, match="'l1'"):
        DiffusionObjective(VariationalDDPMScheduler(), "l1")
    with pytest.raises(ValueError, match="fixed_small"):
        DiffusionObjective(VariationalDDPMScheduler(), "hybrid")
    with pytest.raises(ValueError, match="weighting='snr' is not known"):
        DiffusionObjective(VariationalDDPMScheduler(), weighting="snr")
    with pytest.raises(ValueError, match="loss='vlb' has weights of its own"):
        DiffusionObjective(VariationalDDPMScheduler(), "vlb", weighting="p2")
    for arguments in {"history_per_timestep": 0}, {"uniform_probability": 0.0}, {"uniform_probability": 1.1}:
        with pytest.raises(ValueError, match=next(iter(arguments))):
            LossSecondMomentTimesteps(VariationalDDPMScheduler(), **arguments)


@pytest.mark.parametrize("prediction_type", ["epsilon", "score", "sample", "v_prediction"])
@pytest.mark.parametrize("kind", [VPSDE, SubVPSDE, VESDE])
def test_score_matching_of_normal_data_in_closed_form(kind, prediction_type):
    """Of the exact network of N(0.3, 0.5^2) the expected loss at t is 1 - std^2 / (scale^2 0.25 + std^2)."""
    sde = kind(prediction_type=prediction_type)
    generator = torch.Generator().manual_seed(0)
    x_start = 0.3 + 0.5 * torch.randn(20000, 1, 2, 2, generator=generator, dtype=torch.float64)
    noise = torch.randn(x_start.shape, generator=generator, dtype=torch.float64)

    def network(x, labels, class_labels=None, return_dict=False):
        t = sde.times(labels)
        scale, std = (v.view(-1, 1, 1, 1) for v in (sde.scale(t), sde.std(t)))
        score = -(x - scale * 0.3) / (scale**2 * 0.25 + std**2)
        x_0 = (x + std**2 * score) / scale
        outputs = {
            "score": score,
            "epsilon": -std * score,
            "sample": x_0,
            "v_prediction": -scale * std * score - std * x_0,
        }
        return (outputs[prediction_type],)

    for at in (0.05, 0.3, 0.9):
        t = torch.full((len(x_start),), at, dtype=torch.float64)
        scale, std, g = sde.scale(at), sde.std(at), sde.diffusion(at)
        expected = 1 - std**2 / (scale**2 * 0.25 + std**2)
        actual = ScoreObjective(sde)(network, x_start, t=t, noise=noise)
        assert actual.shape == (20000,)
        torch.testing.assert_close(actual.mean(), expected, rtol=0.03, atol=1e-9)
        weighted = ScoreObjective(sde, "likelihood")(network, x_start, t=t, noise=noise)
        torch.testing.assert_close(weighted, actual * (g / std) ** 2)
    with pytest.raises(ValueError, match="^weighting='p2' is not known; choose one of variance, likelihood"):
        ScoreObjective(sde, "p2")


def test_an_epsilon_networks_score_matching_is_the_simple_loss():
    scheduler, sde = VariationalDDPMScheduler(), process_of(VariationalDDPMScheduler())
    x_start, noise, output = torch.randn(3, 5, 1, 4, 4, dtype=torch.float64)
    t = torch.tensor([0, 10, 500, 800, 999])

    def network(x, label, class_labels=None, return_dict=False):
        torch.testing.assert_close(label.double(), t.double(), rtol=0, atol=1e-9)
        return (output + x,)

    actual = ScoreObjective(sde)(network, x_start, t=sde.times(t), noise=noise)
    torch.testing.assert_close(actual, DiffusionObjective(scheduler)(network, x_start, t=t, noise=noise))


@pytest.mark.parametrize(
    "sde", [VPSDE(), SubVPSDE(), VESDE(), process_of(VariationalDDPMScheduler(beta_schedule="cosine"))]
)
def test_times_by_importance_keep_the_mean_and_lessen_the_spread(sde):
    def weighted(t):  # of a network with an error of the same size everywhere
        return (sde.diffusion(t) / sde.std(t)) ** 2

    generator = torch.Generator().manual_seed(0)
    t, weights = ContinuousTimes(sde, importance=True).sample(200000, generator=generator)
    assert t.min() >= sde.t_min and t.max() <= 1 and weights.dtype == torch.float32
    terms = weights * weighted(t)
    grid = torch.linspace(math.log(sde.t_min), 0, 200001, dtype=torch.float64).exp()
    exact = torch.trapezoid(weighted(grid), grid) / (1 - sde.t_min)
    assert terms.mean().item() == pytest.approx(exact.item(), rel=0.01)
    assert terms.std() < 0.2 * exact  # even times: many times the mean
    even, ones = ContinuousTimes(sde).sample(200000, generator=generator)
    assert (ones == 1).all() and even.mean().item() == pytest.approx(0.5, abs=0.005) and even.min() >= sde.t_min
    # of any other function too
    assert (weights * t**2).mean().item() == pytest.approx(1 / 3, rel=0.05)
