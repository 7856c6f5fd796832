import re

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, ScoreSdeVePipeline, ScoreSdeVeScheduler, UNet2DModel

from ddpm_hf import DDPMImagePipeline, DDPMUNet, VariationalDDPMScheduler
from ddpm_hf.likelihood import encode, ode_log_likelihood
from ddpm_hf.schedulers.prediction import SDE_PREDICTIONS
from ddpm_hf.schedulers.sde import VESDE, VPSDE, SubVPSDE
from ddpm_hf.schedulers.sde_samplers import SubVPSDEScheduler, VESDEScheduler, VPSDEScheduler
from ddpm_hf.training.losses import ScoreObjective
from support.analytic import Mixture
from support.elsewhere import ROUNDING, open_elsewhere
from support.golden_data import assert_fingerprint, golden_cases, randn
from support.networks import small_unet
from support.unet_configs import PLAIN

GOLDEN = golden_cases("sde", "sde")
PROCESSES = {"VP": VPSDE, "subVP": SubVPSDE, "VE": VESDE}
SEED = 6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['sde']}-{case['t'][0]}")
def test_golden_processes(case, dtype):
    sde, x = PROCESSES[case["sde"]](N=case["N"]), randn(SEED, dtype)
    t = torch.tensor(case["t"], dtype=torch.float64)
    score, other = -x, -0.5 * x * (1 + t.view(-1, 1, 1, 1)).to(dtype)
    mean, std = sde.marginal(x, t)
    f, G = sde.discretize(x, t)
    actual = {"marginal_mean": mean, "drift": sde.drift(x, t), "discretize_f": f}
    for name, values in (("reverse", score), ("reverse_b", other)):
        for flow in (False, True):
            end = "_pflow" if flow else ""
            actual[f"{name}_drift{end}"] = sde.reverse_drift(x, t, values, flow)
            actual[f"{name}_discretize_f{end}"] = sde.reverse_discretize(x, t, values, flow)[0]
    for name, values in actual.items():
        assert values.dtype == dtype
        exact = dict(rtol=1e-9, atol=1e-11)
        tolerance = exact if dtype == torch.float64 else dict(rtol=0, atol=5 * case["f32"][name]["max_abs"] + 1e-6)
        assert_fingerprint(values, case[name], **tolerance)
    lists = {"marginal_std": std, "diffusion": sde.diffusion(t), "discretize_G": G, "prior_logp": sde.prior_log_prob(x)}
    for name, values in lists.items():
        rtol = 1e-9 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(values, torch.tensor(case[name], dtype=torch.float64), rtol=rtol, atol=1e-11)


@pytest.mark.parametrize("sde", [VPSDE(), SubVPSDE(), VESDE()], ids=lambda sde: type(sde).__name__)
def test_the_marginal_solves_the_sde(sde):
    """Mean and variance of a linear SDE follow m' = f m, v' = 2 f v + g^2: by differences of the closed forms."""
    t, h = torch.linspace(0.05, 0.95, 19, dtype=torch.float64), 1e-5
    slope = (sde.log_scale(t + h) - sde.log_scale(t - h)) / (2 * h)
    torch.testing.assert_close(slope, sde.drift_coefficient(t), rtol=1e-7, atol=1e-9)
    slope = (sde.std(t + h) ** 2 - sde.std(t - h) ** 2) / (2 * h)
    expected = 2 * sde.drift_coefficient(t) * sde.std(t) ** 2 + sde.diffusion(t) ** 2
    torch.testing.assert_close(slope, expected, rtol=1e-7, atol=1e-9)


def test_the_limits_of_sub_vp_and_the_numbers_of_ve():
    t = torch.linspace(0.01, 1, 50, dtype=torch.float64)
    assert (SubVPSDE().std(t) < VPSDE().std(t)).all() and (SubVPSDE().diffusion(t) < VPSDE().diffusion(t)).all()
    torch.testing.assert_close(SubVPSDE().std(t), VPSDE().std(t) ** 2)
    sde = VESDE(0.01, 50.0, N=1000)
    assert sde.std(0.0).item() == pytest.approx(0.01) and sde.std(1.0).item() == pytest.approx(50.0)
    assert sde.discretize(torch.ones(1), 0.0)[1].item() == pytest.approx(0.01)  # from nothing to the first sigma
    variance = sum(sde.discrete(k / 999 + 1e-9)[1] ** 2 for k in range(1000))
    assert variance.item() == pytest.approx(50.0**2)


def test_vp_is_the_limit_of_the_ddpm_chain():
    errors = []
    for T in (100, 1000, 10000):
        ddpm = VariationalDDPMScheduler(num_train_timesteps=T, beta_schedule="linear_scaled_by_T")
        sde = VPSDE(N=T)
        t = torch.arange(T, dtype=torch.float64)
        torch.testing.assert_close(sde.index(sde.times(t) + 1e-9), t.long())
        torch.testing.assert_close(sde.step_beta(sde.times(t) + 1e-9), ddpm.betas, rtol=1e-12, atol=0)
        middle = t >= T // 20  # where both are far from 0
        gap = sde.std((t + 1) / T) ** 2 / (1 - ddpm.alphas_cumprod) - 1
        errors.append(gap[middle].abs().max().item())
    assert errors[1] < 0.02 and errors[1] / errors[0] < 0.15 and errors[2] / errors[1] < 0.15  # of first order


def gaussian_network(sde, mean, std):
    """The exact network for data N(mean, std^2), of the process's prediction type, called with labels."""

    def network(x, label):
        t = sde.times(float(label))
        scale, noise = sde.scale(t).item(), sde.std(t).item()
        score = -(x - scale * mean) / (scale**2 * std**2 + noise**2)
        x_start = (x + noise**2 * score) / scale
        return {
            "score": score,
            "epsilon": -noise * score,
            "sample": x_start,
            "v_prediction": -scale * noise * score - noise * x_start,
        }[sde.prediction_type]

    return network


@pytest.mark.parametrize("prediction_type", ["score", "epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("sde", [VPSDE, SubVPSDE, VESDE])
def test_the_score_from_every_prediction(sde, prediction_type):
    sde, x = sde(prediction_type=prediction_type), torch.randn(5, 1, 2, 2, dtype=torch.float64)
    for t in (0.01, 0.4, 1.0):
        scale, noise = sde.scale(t), sde.std(t)
        actual = sde.score(gaussian_network(sde, 0.3, 0.2)(x, sde.conditioning_times(t)), x, t)
        torch.testing.assert_close(actual, -(x - scale * 0.3) / (scale**2 * 0.04 + noise**2))


SCHEDULERS = [VPSDEScheduler, SubVPSDEScheduler, VESDEScheduler]


def run(scheduler, network, steps, count=10000, seed=0, correct=None):
    generator = torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(steps)
    x = torch.randn(count, 1, 1, 1, generator=generator, dtype=torch.float64) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        for _ in range(scheduler.config.correct_steps):
            x = scheduler.step_correct(network(x, t), t, x, generator)
        output = scheduler.step(network(x, t), t, x, generator)
        x = output.prev_sample
    return x.flatten(), output.pred_original_sample.flatten()


@pytest.mark.parametrize("kind", SCHEDULERS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("predictor", ["reverse_diffusion", "ancestral", "euler_maruyama", "probability_flow", "ddim"])
@pytest.mark.parametrize("correct_steps", [0, 1])
def test_samplers_reach_the_moments_of_gaussian_data(kind, predictor, correct_steps):
    if kind is SubVPSDEScheduler and predictor == "ancestral":
        with pytest.raises(ValueError, match="predictor='ancestral' is for VP and VE"):
            kind(predictor=predictor)
        return
    # one dimension has a norm of its own in each image: Langevin's step in it is not the paper's; its annealed form is
    scheduler = kind(
        predictor=predictor, corrector="annealed_langevin", correct_steps=correct_steps, snr=0.05, sampling_eps=1e-3
    )
    if predictor == "probability_flow" and correct_steps:
        pytest.skip("the corrector is the same beside every predictor")
    steps = 2000 if predictor == "probability_flow" else 500  # Euler's steps of an ODE: of first order
    x, _ = run(scheduler, gaussian_network(scheduler.sde, 0.3, 0.5), steps)
    assert x.mean().item() == pytest.approx(0.3, abs=4 * 0.5 / 10000**0.5 + 0.01)
    assert x.std().item() == pytest.approx(0.5, rel=0.035)


@pytest.mark.parametrize("kind", SCHEDULERS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("predictor", ["reverse_diffusion", "ancestral", "euler_maruyama", "probability_flow", "ddim"])
def test_samplers_reach_a_mixture(kind, predictor):
    """Mean, spread, and the share of each mode."""
    if kind is SubVPSDEScheduler and predictor == "ancestral":
        pytest.skip("refused, as tested above")
    scheduler = kind(predictor=predictor, correct_steps=0, **({"sigma_max": 20.0} if kind is VESDEScheduler else {}))
    data = Mixture(scheduler.sde)
    x, _ = run(scheduler, lambda x, t: data(x, t)[0], 1000)
    mean = (data.weights * data.means).sum()
    std = ((data.weights * (data.stds**2 + data.means**2)).sum() - mean**2).sqrt()
    assert x.mean().item() == pytest.approx(mean.item(), abs=4 * std.item() / 10000**0.5 + 0.005)
    assert x.std().item() == pytest.approx(std.item(), rel=0.03)
    assert (x < -0.2).double().mean().item() == pytest.approx(0.3, abs=0.025)


def test_the_last_step_predicts_x_start_and_adds_no_noise():
    scheduler = VPSDEScheduler(predictor="ddim")
    network = gaussian_network(scheduler.sde, 0.3, 0.5)
    x, x_start = run(scheduler, network, 50)
    torch.testing.assert_close(x, x_start)
    scheduler = VPSDEScheduler()
    scheduler.set_timesteps(100)
    x, t = torch.randn(2, 1, 4, 4), scheduler.timesteps[-1]
    first, second = (scheduler.step(network(x, t), t, x).prev_sample for _ in range(2))
    assert torch.equal(first, second)


def test_ddim_in_continuous_time_is_the_schedulers_ddim():
    """Both are exact in x_0 and epsilon, on the same levels of noise."""
    ours = VPSDEScheduler(predictor="ddim", sampling_eps=1e-2)
    ours.set_timesteps(20)
    t = ours.sde.times(ours.timesteps.double())
    abar = ours.sde.scale(t) ** 2
    betas = 1 - abar.flip(0) / torch.cat((torch.ones(1, dtype=torch.float64), abar.flip(0)[:-1]))
    theirs = VariationalDDPMScheduler(trained_betas=betas.tolist(), clip_sample=False)
    x = y = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    for i, t in enumerate(ours.timesteps):
        x = ours.step(torch.tanh(x), t, x).prev_sample
        y = theirs.step(torch.tanh(y), 19 - i, y, eta=0.0).prev_sample
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)  # timesteps are float32


def test_the_steps_of_diffusers_score_sde_ve_scheduler():
    theirs = ScoreSdeVeScheduler(num_train_timesteps=2000, snr=0.15, sigma_max=1348.0)
    ours = VESDEScheduler.from_config(theirs.config)
    assert not ours.config.centered
    assert (ours.config.snr, ours.config.sigma_max, ours.config.correct_steps) == (0.15, 1348.0, 1)
    defaults = VESDEScheduler.from_config(ScoreSdeVeScheduler().config).config  # theirs, not ours
    assert (defaults.num_train_timesteps, defaults.snr, defaults.sigma_max) == (2000, 0.15, 1348.0)
    n = 7
    ours.set_timesteps(n)
    theirs.set_timesteps(n)
    theirs.set_sigmas(n)
    assert ours.init_noise_sigma == theirs.init_noise_sigma
    torch.testing.assert_close(ours.timesteps, theirs.sigmas, rtol=1e-5, atol=0)
    x = torch.randn(1, 3, 4, 4) * ours.init_noise_sigma  # of a batch theirs takes the norms' means
    for i, t in enumerate(ours.timesteps):
        score = -x / (1 + t**2)
        expected = theirs.step_correct(score, x, torch.Generator().manual_seed(i)).prev_sample
        actual = ours.step_correct(score, t, x, torch.Generator().manual_seed(i))
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * max(1, t.item()))
        expected = theirs.step_pred(score, theirs.timesteps[i], x, torch.Generator().manual_seed(i))
        actual = ours.step(score, t, x, torch.Generator().manual_seed(i)).prev_sample
        last = i == n - 1
        x = expected.prev_sample_mean if last else expected.prev_sample
        torch.testing.assert_close(actual, x, rtol=1e-4, atol=1e-5 * max(1, t.item()))


def test_langevin_steps_have_the_signal_to_noise_ratio():
    scheduler = VPSDEScheduler(snr=0.3, correct_steps=1)
    scheduler.set_timesteps(100)
    x, score, noise = torch.randn(3, 4, 3, 8, 8, dtype=torch.float64)
    t = scheduler.timesteps[40]
    sde = scheduler.sde
    output = -score * sde.std(sde.times(t))
    actual = scheduler.step_correct(output, t, x, variance_noise=noise)
    alpha = 1 - sde.step_beta(sde.times(t.double()))  # of the trained process, however many steps are taken
    for image in range(4):  # Algorithm 5
        epsilon = 2 * alpha * (0.3 * noise[image].norm() / score[image].norm()) ** 2
        expected = x[image] + epsilon * score[image] + (2 * epsilon).sqrt() * noise[image]
        torch.testing.assert_close(actual[image], expected, rtol=1e-4, atol=1e-4)
    zero = torch.zeros_like(x)
    assert torch.equal(scheduler.step_correct(zero, t, x), x)  # no score, no step


def test_annealed_langevin_dynamics_alone():
    """NCSN: ten levels of noise, many steps at each."""
    scheduler = VESDEScheduler(
        sigma_max=10.0, sigma_min=0.05, predictor="none", corrector="annealed_langevin", correct_steps=200, snr=0.2
    )
    x, x_start = run(scheduler, gaussian_network(scheduler.sde, 0.3, 0.5), 10, count=4000)
    assert x.mean().item() == pytest.approx(0.3, abs=0.04)
    assert x.std().item() == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("kind", SCHEDULERS, ids=lambda kind: kind.__name__)
def test_configs_are_saved_and_loaded(kind, tmp_path):
    scheduler = kind(predictor="ddim", correct_steps=3, snr=0.2, sampling_eps=0.01, num_train_timesteps=77)
    scheduler.save_pretrained(tmp_path)
    reopened = kind.from_pretrained(tmp_path)
    assert all(scheduler.config[key] == value for key, value in reopened.config.items())
    for configured in (scheduler, reopened):
        configured.set_timesteps(5)
    assert torch.equal(scheduler.timesteps, reopened.timesteps) and scheduler._tables == reopened._tables


def test_configs_of_other_schedulers():
    converted = VPSDEScheduler.from_config(
        DDPMScheduler(num_train_timesteps=500, beta_start=2e-4, beta_end=0.03).config
    )
    assert (converted.config.beta_min, converted.config.beta_max) == (pytest.approx(0.1), pytest.approx(15.0))
    assert converted.config.num_train_timesteps == 500
    converted = VPSDEScheduler.from_config(DDPMScheduler(num_train_timesteps=10_000).config)
    assert converted.config.beta_max == pytest.approx(200.0) and converted.sde.scale(1.0) > 1e-22
    ours = VariationalDDPMScheduler(
        num_train_timesteps=500, beta_schedule="linear_scaled_by_T", prediction_type="sample"
    )
    converted = SubVPSDEScheduler.from_config(ours.config)
    assert (converted.config.beta_min, converted.config.beta_max) == (pytest.approx(0.1), pytest.approx(20.0))
    assert converted.config.prediction_type == "sample"
    for kind, other in (
        (SubVPSDEScheduler, VariationalDDPMScheduler(beta_schedule="cosine")),
        (SubVPSDEScheduler, DDPMScheduler(trained_betas=[0.1, 0.2])),
        (VESDEScheduler, DDPMScheduler()),
    ):
        with pytest.raises(ValueError, match=f"^{kind.__name__} has no process for beta_schedule="):
            kind.from_config(other.config)
    with pytest.raises(ValueError, match="^VPSDEScheduler cannot be built from a config with sigma_min"):
        VPSDEScheduler.from_config(VESDEScheduler().config)
    with pytest.raises(ValueError, match="^VESDEScheduler cannot be built from a config with beta_min"):
        VESDEScheduler.from_config(VPSDEScheduler().config)
    with pytest.raises(ValueError, match="^trained_betas=.*: alphas_cumprod must fall and stay above 0"):
        VPSDEScheduler.from_config(DDPMScheduler(rescale_betas_zero_snr=True).config)
    converted = VPSDEScheduler.from_config({"_class_name": "DDPMScheduler", "beta_start": 1e-4, "beta_end": 0.02})
    assert (converted.config.beta_min, converted.config.beta_max) == (pytest.approx(0.1), pytest.approx(20.0))
    converted = VPSDEScheduler.from_config({"beta_schedule": "squaredcos_cap_v2"})
    assert converted.config.trained_betas[-1] == pytest.approx(0.999)


@pytest.mark.parametrize(
    "other",
    [
        VariationalDDPMScheduler(beta_schedule="cosine", num_train_timesteps=100),
        DDPMScheduler(beta_schedule="squaredcos_cap_v2", num_train_timesteps=100),
        DDPMScheduler(trained_betas=np.linspace(0.001, 0.2, 100)),
    ],
    ids=lambda other: str(other.config.beta_schedule),
)
def test_the_steps_of_a_chain_by_the_sde(other, tmp_path):
    """At T steps the discretisation is the chain itself, and so are its ancestral steps."""
    sde = VPSDEScheduler.from_config(other.config, predictor="ancestral", clip_sample=False)
    sde.save_pretrained(tmp_path)
    sde = VPSDEScheduler.from_pretrained(tmp_path)
    sde.set_timesteps(100)
    chain = VariationalDDPMScheduler.from_config(other.config, clip_sample=False, variance_type="fixed_large")
    x, output, noise = torch.randn(3, 2, 1, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(sde.timesteps, torch.arange(99.0, -1, -1), rtol=0, atol=1e-4)
    for t in (98, 50, 1):
        expected = chain.step(output, t, x, variance_noise=noise).prev_sample
        actual = sde.step(output, sde.timesteps[99 - t], x, variance_noise=noise).prev_sample
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_a_chain_in_fewer_steps_is_the_respaced_chain():
    """Its ancestral steps are those of the chain of the same timesteps."""
    chain = VariationalDDPMScheduler(
        beta_schedule="cosine", num_train_timesteps=96, clip_sample=False, variance_type="fixed_large"
    )
    sde = VPSDEScheduler.from_config(chain.config, predictor="ancestral")
    chain.set_timesteps(timesteps=list(range(95, -1, -5)))
    sde.set_timesteps(20)
    torch.testing.assert_close(sde.timesteps, torch.arange(95.0, -1, -5), rtol=0, atol=1e-4)
    x, output, noise = torch.randn(3, 2, 1, 4, 4, dtype=torch.float64)
    for t in (90, 50, 5):
        expected = chain.step(output, t, x, variance_noise=noise).prev_sample
        actual = sde.step(output, sde.timesteps[(95 - t) // 5], x, variance_noise=noise).prev_sample
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("steps", [20, 250])
@pytest.mark.parametrize("predictor", ["reverse_diffusion", "ancestral", "ddim"])
def test_samplers_of_a_chain_reach_its_data(predictor, steps):
    scheduler = VPSDEScheduler.from_config(
        VariationalDDPMScheduler(beta_schedule="cosine", clip_sample=False).config, predictor=predictor
    )
    x, _ = run(scheduler, gaussian_network(scheduler.sde, 0.3, 0.5), steps)
    assert x.mean().item() == pytest.approx(0.3, abs=0.03)
    assert x.std().item() == pytest.approx(0.5, rel=0.1 if steps == 20 else 0.035)


def test_clipping_is_the_ddpms():
    chain = VariationalDDPMScheduler(beta_schedule="cosine", num_train_timesteps=96)
    chain.set_timesteps(timesteps=list(range(95, -1, -5)))
    sde = VPSDEScheduler.from_config(chain.config, predictor="ddim")
    assert sde.config.clip_sample and not VPSDEScheduler().config.clip_sample
    sde.set_timesteps(20)
    x, output = torch.randn(2, 2, 1, 4, 4, dtype=torch.float64)
    for t in (95, 50, 5, 0):
        expected = chain.step(output, t, x, eta=0.0)
        actual = sde.step(output, sde.timesteps[(95 - t) // 5], x)
        torch.testing.assert_close(actual.prev_sample, expected.prev_sample, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(actual.pred_original_sample, expected.pred_original_sample, rtol=1e-5, atol=1e-5)


def test_sampling_may_end_anywhere():
    """The last step goes to data from there, in one."""
    scheduler = VPSDEScheduler(predictor="ddim", sampling_eps=0.3)
    x, _ = run(scheduler, gaussian_network(scheduler.sde, 0.3, 0.0), 200)
    torch.testing.assert_close(x, torch.full_like(x, 0.3), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "kind, arguments, message",
    [
        (
            VPSDEScheduler,
            {"beta_min": 101.0, "beta_max": 200.0},
            "beta_min=101.0, beta_max=200.0: their sum must be 300 at most",
        ),
        (VPSDEScheduler, {"beta_min": 0.0}, "beta_min=0.0 must be a number in (0, 150]"),
        (VPSDEScheduler, {"beta_min": 30.0}, "beta_min=30.0, beta_max=20.0: must be 0 < beta_min <= beta_max"),
        (VESDEScheduler, {"sigma_max": 0.001}, "sigma_min=0.01, sigma_max=0.001: must be"),
        (VESDEScheduler, {"predictor": "heun"}, "predictor='heun' is not known; choose one of reverse_diffusion,"),
        (VESDEScheduler, {"corrector": "mala"}, "corrector='mala' is not known"),
        (VESDEScheduler, {"correct_steps": -1}, "correct_steps=-1 must be an integer in [0, 10000]"),
        (VESDEScheduler, {"snr": 0.0}, "snr=0.0 must be a number in (0, 100]"),
        (VESDEScheduler, {"snr": float("nan")}, "snr=nan must be a number in (0, 100]"),
        (VPSDEScheduler, {"sampling_eps": 0.0}, "sampling_eps=0.0 must be a number in (0, 1)"),
        (
            VESDEScheduler,
            {"predictor": "none", "correct_steps": 0},
            "predictor='none' with correct_steps=0 does nothing",
        ),
        (
            VPSDEScheduler,
            {"trained_betas": []},
            "trained_betas=[] must be 1 to 100,000 betas, for VPSDEScheduler alone",
        ),
        (
            SubVPSDEScheduler,
            {"trained_betas": [0.1]},
            "trained_betas=[0.1] must be 1 to 100,000 betas, for VPSDEScheduler alone",
        ),
        (VPSDEScheduler, {"num_train_timesteps": 0}, "num_train_timesteps=0 must be an integer in [1, 100000]"),
        (VPSDEScheduler, {"prediction_type": "previous"}, "prediction_type='previous' is not known"),
    ],
)
def test_bad_configs(kind, arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        kind(**arguments)


def test_bad_calls():
    scheduler, x = VPSDEScheduler(), torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="^timesteps are not set; call set_timesteps"):
        scheduler.step(x, 0.5, x)
    for predictor in ("euler_maruyama", "probability_flow"):
        with pytest.raises(
            ValueError, match=r"^num_inference_steps=5 makes a step with beta=0.98\d, but predictor='(eul|prob)"
        ):
            VPSDEScheduler(predictor=predictor).set_timesteps(5)
    cosine = VariationalDDPMScheduler(beta_schedule="cosine").config
    with pytest.raises(
        ValueError, match="^num_inference_steps=1000 makes a step with beta=0.999, but predictor='prob.* give"
    ):
        VPSDEScheduler.from_config(cosine, predictor="probability_flow").set_timesteps(1000)
    with pytest.raises(ValueError, match="^num_inference_steps=3 gives two steps the same timestep"):
        VPSDEScheduler(num_train_timesteps=1).set_timesteps(3)
    with pytest.raises(ValueError, match="^num_inference_steps=1 must be"):
        scheduler.set_timesteps(1)
    scheduler.set_timesteps(100)
    with pytest.raises(ValueError, match="^timestep=0.5 is not in `timesteps`; give one of its 100"):
        scheduler.step(x, 0.5, x)
    VPSDEScheduler(predictor="ddim").set_timesteps(10)


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return small_unet(block_out_channels=(8, 8), **PLAIN)


def seeded(pipe, **kwargs):
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    return pipe(3, generators, 60, "latent", **kwargs).images.clamp(-1, 1)


@pytest.mark.parametrize("kind", [VPSDEScheduler, SubVPSDEScheduler], ids=lambda kind: kind.__name__)
def test_a_pipeline_with_correctors(kind, unet):
    calls = []
    unet.register_forward_hook(lambda *_: calls.append(1))
    pipe = DDPMImagePipeline(unet, kind(correct_steps=2))
    images = seeded(pipe)
    assert len(calls) == 60 * 3 and images.shape == (3, 1, 8, 8) and images.isfinite().all()
    one = pipe(1, torch.Generator().manual_seed(1), 60, "latent").images.clamp(
        -1, 1
    )  # norms of its own, whatever the batch
    torch.testing.assert_close(one, images[1:2], rtol=1e-4, atol=1e-4)
    assert not torch.equal(images, seeded(DDPMImagePipeline(unet, kind())))
    assert len(list(pipe.progressive(2, num_inference_steps=60, every=20))) == 4


def test_a_ddpm_checkpoint_by_the_sde(unet):
    """One network, ancestral steps of the chain and of the SDE that it tends to: nearly the same images."""
    process = dict(num_train_timesteps=200, beta_start=5e-4, beta_end=0.1, clip_sample=False)
    pipe = DDPMImagePipeline(unet, DDPMScheduler(**process))
    noise = torch.Generator().manual_seed(0)
    chain = pipe(2, noise, 200, "latent", eta=0.0).images
    pipe.scheduler = VPSDEScheduler.from_config(pipe.scheduler.config, predictor="ddim", sampling_eps=5e-3)
    assert (pipe.scheduler.config.beta_min, pipe.scheduler.config.beta_max) == (pytest.approx(0.1), pytest.approx(20))
    sde = pipe(2, noise.manual_seed(0), 200, "latent").images
    assert (sde - chain).norm() < 0.2 * chain.norm()
    assert pipe.scheduler.config.beta_end == 0.1  # the way back
    assert VariationalDDPMScheduler.from_config(pipe.scheduler.config).betas[-1] == pytest.approx(0.1)


@pytest.mark.parametrize(
    "scheduler",
    [
        VPSDEScheduler(correct_steps=1),
        pytest.param(SubVPSDEScheduler(predictor="ddim"), marks=pytest.mark.slow),
    ],
)
def test_pipelines_are_saved_with_their_scheduler(scheduler, unet, tmp_path):
    pipe = DDPMImagePipeline(unet, scheduler)
    expected = seeded(pipe)
    pipe.save_pretrained(tmp_path / "pipe")
    reopened = DDPMImagePipeline.from_pretrained(tmp_path / "pipe")
    assert type(reopened.scheduler) is type(scheduler)
    torch.testing.assert_close(seeded(reopened), expected, rtol=0, atol=10 * ROUNDING)  # not cut off at 1
    here = pipe(2, torch.Generator().manual_seed(0), 60, "np").images
    output = open_elsewhere("remote", tmp_path / "pipe", tmp_path / "remote", tmp_path / "cache", steps=60)
    assert f"DDPMImagePipeline DDPMUNet {type(scheduler).__name__}" in output
    np.testing.assert_allclose(np.load(tmp_path / "remote.npy"), here, atol=ROUNDING)
    for path in (tmp_path / "pipe").rglob("*"):  # a pipeline opened as remote code, saved once more
        if path.is_file():
            reopened = tmp_path / "remote_again" / path.relative_to(tmp_path / "pipe")
            assert reopened.read_bytes() == path.read_bytes(), path


def test_the_folders_of_diffusers_score_sde_ve_pipeline(tmp_path):
    torch.manual_seed(0)
    net = UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        norm_num_groups=None,
        time_embedding_type="fourier",
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    ).eval()
    theirs = ScoreSdeVePipeline(net, ScoreSdeVeScheduler(sigma_max=2.0, correct_steps=1))
    theirs.save_pretrained(tmp_path)
    theirs.set_progress_bar_config(disable=True)
    ours = DDPMImagePipeline.from_pretrained(tmp_path)
    ours.set_progress_bar_config(disable=True)
    assert isinstance(ours.scheduler, VESDEScheduler) and isinstance(ours.unet, DDPMUNet)
    assert (ours.scheduler.config.sigma_max, ours.scheduler.config.correct_steps) == (2.0, 1)
    expected = theirs(1, 20, generator=torch.Generator().manual_seed(0), output_type="np").images
    actual = ours(1, torch.Generator().manual_seed(0), 20, "np").images
    np.testing.assert_allclose(actual, expected, atol=1e-4)
    ours.save_pretrained(tmp_path / "ours")
    for pipeline in (DDPMImagePipeline(net, theirs.scheduler), DDPMImagePipeline.from_pretrained(tmp_path / "ours")):
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to("cpu").optimize(compile=False)
        actual = pipeline(1, torch.Generator().manual_seed(0), 20, "np").images
        np.testing.assert_allclose(actual, expected, atol=1e-4)
    swapped = DDPMImagePipeline.from_pretrained(tmp_path / "ours", scheduler=VESDEScheduler(predictor="ddim"))
    assert swapped.scheduler.config.predictor == "ddim"
    with pytest.raises(ValueError, match="trust_remote_code"):  # stock classes would draw from noise of another size
        DiffusionPipeline.from_pretrained(tmp_path / "ours")


def test_progress_and_interpolation(unet):
    """The conditioning time, unchanged."""
    net = DDPMUNet.from_config(unet.config, time_embedding_type="fourier").eval()
    pipe = DDPMImagePipeline(net, VESDEScheduler(sigma_max=4.0, num_train_timesteps=3))
    pipe.set_progress_bar_config(disable=True)
    times = [t for t, _, _ in pipe.progressive(1, num_inference_steps=5)]
    assert times == pipe_timesteps(pipe, 5) and 0 < times[-1] < 0.02
    images = torch.rand(2, 2, 1, 8, 8) * 2 - 1
    assert len(pipe.interpolate(*images, [0.5], 3.5, num_inference_steps=5, output_type="pt").images) == 2
    with pytest.raises(ValueError, match="^timestep=5 is beyond the process; choose one from 0 to (3.99|4)"):
        pipe.interpolate(*images, [0.5], 5, num_inference_steps=5)
    pipe.scheduler = VESDEScheduler(sigma_max=4.0, centered=False)
    back = pipe.interpolate(*images, [0.0], 0.0101, num_inference_steps=5, output_type="pt").images
    torch.testing.assert_close(back, images[0] / 2 + 0.5, rtol=0, atol=0.3)


def pipe_timesteps(pipe, steps):
    pipe.scheduler.set_timesteps(steps)
    return pipe.scheduler.timesteps.tolist()


@pytest.mark.parametrize("prediction_type", SDE_PREDICTIONS)
def test_x_start_of_ve_is_by_the_score_at_the_networks_time(prediction_type):
    """The steps of NCSN go to t = 0, the times of its network to sampling_eps: x_0 = x_t + std(step)^2 score(network's t)."""
    scheduler = VESDEScheduler(num_train_timesteps=50, prediction_type=prediction_type)
    scheduler.set_timesteps(20)
    std = scheduler.sde.std(torch.linspace(1.0, 0.0, 20, dtype=torch.float64))[3]
    score = scheduler.sde.score_weights(torch.linspace(1.0, 1e-5, 20, dtype=torch.float64)[3])
    expected = 1 + std**2 * score[0], std**2 * score[1]
    assert scheduler._tables["x_start"][3] == pytest.approx(
        [float(weight) for weight in expected], rel=1e-12, abs=1e-15
    )


# VE of discrete noise levels: ve/cifar10_ncsnpp and ve/cifar10_ddpm of Score-SDE


def falling_sigmas(N, sigma_min=0.01, sigma_max=50.0):
    """The table by whose entries Score-SDE's networks divide; index 0 is the highest level."""
    return torch.linspace(np.log(sigma_max), np.log(sigma_min), N, dtype=torch.float64).exp()


def test_conditioning_by_the_index_of_the_level():
    sde, N = VESDE(N=1000, conditioning="level_index"), 1000
    t = torch.rand(5000, dtype=torch.float64)
    labels = sde.conditioning_times(t)
    assert torch.equal(labels, torch.round((1 - t) * (N - 1)).long())  # their words
    assert sde.conditioning_times(1.0) == 0 and sde.conditioning_times(1e-5) == N - 1
    assert sde.time_embedding_type == "positional" and VESDE().time_embedding_type == "fourier"
    index = torch.arange(N)
    assert torch.equal(sde.conditioning_times(sde.times(index)), index)
    torch.testing.assert_close(sde.std(sde.times(index)), falling_sigmas(N), rtol=1e-9, atol=0)
    torch.testing.assert_close(sde.std(sde.trained_times(t)), falling_sigmas(N)[labels], rtol=1e-9, atol=0)
    continuous = VESDE()
    assert continuous.trained_times(t) is t and torch.equal(continuous.conditioning_times(t), continuous.std(t))


@pytest.mark.parametrize("n", [2, 7, 10])
@pytest.mark.parametrize("eps", [1e-5, 0.05])
def test_steps_through_discrete_levels(n, eps):
    """Steps count up, and each is at its level exactly; there are no more than levels."""
    scheduler = VESDEScheduler(10, sampling_eps=eps, conditioning="level_index")
    if n == 10 and eps > 1e-5:
        scheduler = VESDEScheduler(1000, sampling_eps=eps, conditioning="level_index")
    scheduler.set_timesteps(n)
    labels, N = scheduler.timesteps, scheduler.config.num_train_timesteps
    assert labels.dtype == torch.int64 and labels[0] == 0 and (labels.diff() > 0).all()
    assert labels[-1] == round((1 - (0 if eps == 1e-5 else eps)) * (N - 1))
    assert n != 10 or eps > 1e-5 or labels.tolist() == list(range(10))
    stds = [scheduler._tables["correct"][i][1] for i in range(n)]
    torch.testing.assert_close(torch.tensor(stds, dtype=torch.float64), falling_sigmas(N)[labels], rtol=1e-9, atol=0)


def test_no_more_steps_than_levels():
    with pytest.raises(ValueError, match="num_inference_steps=11 gives two steps the same timestep; give fewer steps"):
        VESDEScheduler(10, conditioning="level_index").set_timesteps(11)


def test_reverse_diffusion_through_discrete_levels():
    """As Score-SDE's `ReverseDiffusionPredictor` with a network that is not continuous, and the mean at the end."""
    N, sigmas, x = 20, falling_sigmas(20), 50 * randn(SEED, torch.float64)
    scheduler = VESDEScheduler(N, correct_steps=0, conditioning="level_index")
    scheduler.set_timesteps(N)
    expected, noises = x, torch.randn(N, *x.shape, dtype=torch.float64)

    def score(x, label):  # of data N(0.2, 0.3^2), by the table
        return (0.2 - x) / (0.3**2 + sigmas[label] ** 2)

    for label, noise in zip(scheduler.timesteps, noises):
        x = scheduler.step(score(x, label), label, x, variance_noise=noise).prev_sample
    for i, noise in enumerate(noises):
        G2 = sigmas[i] ** 2 - (sigmas[i + 1] ** 2 if i + 1 < N else 0)
        mean = expected + G2 * score(expected, i)
        expected = mean + G2.sqrt() * noise
    torch.testing.assert_close(x, mean, rtol=1e-9, atol=1e-9)


def test_a_pipeline_of_discrete_levels(tmp_path):
    scheduler = VESDEScheduler(50, sigma_max=5.0, conditioning="level_index")
    unet = small_unet()
    pipe, told = DDPMImagePipeline(unet, scheduler), []
    pipe.set_progress_bar_config(disable=True)
    hook = unet.register_forward_pre_hook(lambda module, arguments: told.append(int(arguments[1])))
    images = pipe(2, torch.Generator().manual_seed(0), 5, "latent").images
    assert told == [label for label in (0, 12, 24, 37, 49) for _ in range(2)]  # corrector and predictor
    told.clear()
    pipe.interpolate(images, -images, [0.5], 24, generator=torch.Generator().manual_seed(0), num_inference_steps=5)
    assert told[::2] == [24, 37, 49]
    hook.remove()
    with pytest.raises(ValueError, match="timestep=50 is beyond the process; choose one from 0 to 49"):
        pipe.interpolate(images, -images, [0.5], 50)
    x_t = scheduler.add_noise(torch.zeros_like(images), torch.ones_like(images), torch.tensor([0, 49]))
    torch.testing.assert_close(x_t[:, 0, 0, 0], torch.tensor([5.0, 0.01]))
    pipe.save_pretrained(tmp_path)
    opened = DDPMImagePipeline.from_pretrained(tmp_path)
    assert opened.scheduler.config.conditioning == "level_index" and opened.scheduler.sde.has_levels
    opened.set_progress_bar_config(disable=True)
    again = opened(2, torch.Generator().manual_seed(0), 5, "latent").images
    torch.testing.assert_close(again, images, rtol=1e-4, atol=1e-4)


def test_the_ode_needs_the_levels_between():
    for process in (scheduler := VESDEScheduler(conditioning="level_index"), scheduler.sde):
        for call in ode_log_likelihood, encode:
            with pytest.raises(ValueError, match="^conditioning='level_index': .* noise levels only, [^\n]*$"):
                call(small_unet(), process, torch.zeros(1, 1, 8, 8))


def test_score_matching_at_discrete_levels():
    """Noise of the level that the network is told, as in Score-SDE's `get_smld_loss_fn`."""
    sde, told = VESDE(N=30, conditioning="level_index"), []

    def network(x, label, class_labels=None, return_dict=True):
        told.append(label)
        return (x,)

    x_start, noise, t = torch.zeros(64, 1, 2, 2), torch.randn(64, 1, 2, 2), torch.rand(64)
    losses = ScoreObjective(sde)(network, x_start, t=t, noise=noise)
    sigma = falling_sigmas(30)[torch.round((1 - t.double()) * 29).long()].float().view(-1, 1, 1, 1)
    assert torch.equal(told[0], torch.round((1 - t) * 29))
    expected = (sigma * (sigma * noise) + noise).square().mean((1, 2, 3))  # std * score + noise
    torch.testing.assert_close(losses, expected)
