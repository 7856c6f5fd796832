import math

import pytest
import torch
from golden_data import case_id, case_scheduler, golden_cases, images, network, randn

from ddpm_hf import DiffusionObjective, VariationalDDPMScheduler

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
    monkeypatch.setattr("ddpm_hf.scheduler.discretized_gaussian_log_likelihood", tanh_log_likelihood)
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
