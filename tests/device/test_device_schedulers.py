import pytest
import torch

from ddpm_hf import (
    SubVPSDEScheduler,
    VariationalDDPMScheduler,
    VESDEScheduler,
    VPSDEScheduler,
    discretized_gaussian_log_likelihood,
)
from ddpm_hf.schedulers.ddpm import PREDICTION_TYPES
from ddpm_hf.schedulers.sde import PREDICTORS, VESDE, VPSDE, ChainSDE, SubVPSDE
from support.compare import assert_close

T = 20
# one for all images as an int and a 0-d tensor, one for each; the first step of the chain is among them
TIMES = {"int": 7, "first": 0, "0-d": torch.tensor(7), "each": torch.tensor([0, 7, 19])}


def scheduler_of(**config):
    scheduler = VariationalDDPMScheduler(T, **dict(beta_schedule="squaredcos_cap_v2", levels=17) | config)
    return scheduler


def on(device, value):
    return value.to(device) if isinstance(value, torch.Tensor) and value.dim() else value


@pytest.fixture
def images():
    x_start = torch.randint(0, 17, (3, 1, 4, 4)) / 8 - 1
    return x_start, torch.randn(3, 1, 4, 4)


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large_log", "learned", "learned_range"])
def test_every_function_of_the_process(device, images, variance_type, prediction_type, t):
    scheduler = scheduler_of(variance_type=variance_type, prediction_type=prediction_type)
    x_start, noise = images
    output = 0.5 * torch.randn(3, 2 if variance_type.startswith("learned") else 1, 4, 4)
    results = []
    for target in (device, torch.device("cpu")):
        x, e, o, at = (on(target, value) for value in (x_start, noise, output, TIMES[t]))
        x_t = scheduler.q_sample(x, at, e)
        p = scheduler.p_mean_variance(o, x_t, at)
        results.append(
            {
                "q_sample": x_t,
                "add_noise": scheduler.add_noise(x, e, at if isinstance(at, torch.Tensor) else torch.tensor(at)),
                "velocity": scheduler.get_velocity(x, e, torch.as_tensor(at).expand(3)),
                "q": scheduler.q_mean_variance(x, at)[:3],
                "posterior": scheduler.q_posterior(x, x_t, at)[:3],
                "p": p,
                "epsilon": scheduler.epsilon_from_x_start(x, x_t, at),
                "target": scheduler.prediction_target(x, x_t, e, at),
                "term": scheduler.vlb_term(o, x, x_t, at),
                "unclipped": scheduler.vlb_term(o, x, x_t, at, clip_sample=False),
                "decoder": scheduler.decoder_bits_per_dim(p, x),
                "prior": scheduler.prior_bits_per_dim(x),
                "step": scheduler.step(o, at, x_t, variance_noise=e).prev_sample,
                "guided": scheduler.step(o, at, x_t, variance_noise=e, gradient=e).prev_sample,
                "ddim": scheduler.step(o, at, x_t, eta=0.5, variance_noise=e, gradient=e).prev_sample,
                "reverse": scheduler.reverse_step(o, at, x_t).prev_sample,
            }
        )
    assert all(value.device.type == device.type for value in results[0].values() if isinstance(value, torch.Tensor))
    assert_close(*results)


def test_chain_of_fewer_steps_and_what_is_outside_of_it(device, images):
    scheduler = scheduler_of()
    scheduler.set_timesteps(5)
    x_start, noise = (value.to(device) for value in images)
    t = torch.tensor([0, 4, 5], device=device)  # the last is not of the chain: looking would wait for the device
    x_t = scheduler.q_sample(x_start, t, noise)
    assert x_t[2].isnan().all() and x_t[:2].isfinite().all()
    expected = scheduler.q_sample(images[0][:2], t[:2].cpu(), images[1][:2])
    assert_close(x_t[:2], expected)
    with pytest.raises(ValueError, match="timestep 5 is not in the chain"):
        scheduler.q_sample(x_start, 5, noise)


def test_generators_of_both_devices_and_lists_of_them(device, images, generator):
    scheduler, x_t = scheduler_of(), images[1].to(device)
    output = torch.zeros_like(x_t)

    def step(generator):
        return scheduler.step(output, 7, x_t, generator).prev_sample

    expected = scheduler.step(output.cpu(), 7, x_t.cpu(), generator()).prev_sample
    assert_close(step(generator()), expected)  # the CPU's numbers, moved
    assert torch.equal(step(torch.Generator(device).manual_seed(1)), step(torch.Generator(device).manual_seed(1)))
    for source in ("cpu", device):
        samples = step([torch.Generator(source).manual_seed(i) for i in range(3)])
        alone = scheduler.step(output[2:], 7, x_t[2:], [torch.Generator(source).manual_seed(2)]).prev_sample
        assert_close(samples[2:], alone, 1e-6)


def test_timesteps_are_drawn_where_the_generator_is(device, generator):
    scheduler = scheduler_of()
    expected = scheduler.draw_timesteps(50, generator=generator())
    actual = scheduler.draw_timesteps(50, device, generator())
    assert actual.device.type == device.type and torch.equal(actual.cpu(), expected)
    for source in (None, torch.Generator(device)):
        drawn = scheduler.draw_timesteps(500, device, source)
        assert drawn.device.type == device.type and sorted(set(drawn.tolist())) == list(range(T))


def test_decoder_in_its_tails_and_with_gradients(device):
    x = torch.tensor([-1.0, -0.5, 0.0, 1.0, 1.0])
    mean = torch.tensor([-1.0, 0.5, 0.01, -1.0, 0.9])
    results = []
    for target in (device, "cpu"):
        m = mean.to(target).requires_grad_()
        nats = discretized_gaussian_log_likelihood(x.to(target), m, torch.full_like(m, -4.0), levels=17)
        nats.sum().backward()
        results.append((nats, m.grad))
    assert results[0][0].device.type == device.type
    assert_close(*results)
    assert results[0][0].min() < -1000


@pytest.mark.parametrize("predictor", [name for name in PREDICTORS if name != "none"])
@pytest.mark.parametrize("cls", [VPSDEScheduler, SubVPSDEScheduler, VESDEScheduler])
def test_steps_of_sde_samplers(device, images, cls, predictor):
    if predictor == "ancestral" and cls is SubVPSDEScheduler:
        pytest.skip("refused")
    for corrector in ("langevin", "annealed_langevin"):
        scheduler = cls(predictor=predictor, corrector=corrector, correct_steps=1, prediction_type="epsilon")
        scheduler.set_timesteps(50)
        x_start, noise = images
        results = []
        for target in (device, "cpu"):
            x, e = x_start.to(target), noise.to(target)
            x_t = scheduler.add_noise(x, e, scheduler.timesteps[[5, 20, 40]].to(target))
            t = scheduler.timesteps[20]
            corrected = scheduler.step_correct(e, t, x_t, variance_noise=x)
            results.append((x_t, corrected, *scheduler.step(e, t, x_t, return_dict=False, variance_noise=x)))
        assert_close(*results)


@pytest.mark.parametrize(
    "sde",
    [
        VPSDE(),
        SubVPSDE(),
        VESDE(),
        ChainSDE(scheduler_of().alphas_cumprod),
        ChainSDE(scheduler_of().alphas_cumprod[:1]),
    ],
    ids=["vp", "subvp", "ve", "chain", "chain of one"],
)
def test_coefficients_of_sdes_at_times_on_the_device(device, sde, images):
    t, (x_start, noise) = torch.tensor([0.1, 0.55, 1.0], dtype=torch.float64), images
    kind = torch.float32 if device.type == "mps" else torch.float64
    results = []
    for target, dtype in ((device, kind), ("cpu", torch.float64)):
        at, x, e = t.to(dtype).to(target), x_start.to(target), noise.to(target)
        names = ("log_scale", "std", "drift_coefficient", "diffusion", "conditioning_times")
        results.append(
            [getattr(sde, name)(at).float() for name in names]
            + [value.float() for value in (*sde.discrete(at), *sde.score_weights(at))]
            + [sde.times(sde.conditioning_times(at)).float(), sde.sample(x, at, e), sde.score(e, x, at)]
            + [sde.reverse_drift(x, at, e), sde.reverse_discretize(x, at, e)[0], sde.prior_log_prob(x).float()]
        )
    assert_close(*results)
