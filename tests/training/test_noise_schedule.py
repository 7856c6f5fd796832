"""Betas that are learned with the network: the curve, and the gradients of both bounds."""

import math

import pytest
import torch

from ddpm_hf import (
    ContinuousBoundObjective,
    DiffusionObjective,
    LearnedNoiseSchedule,
    VariationalDDPMScheduler,
    discretized_gaussian_log_likelihood,
)
from ddpm_hf.schedulers.betas import linear_betas

F64, LN2 = torch.float64, math.log(2)
LEVELS = 9


def schedule_of(T=1000, seed=0, spread=1.0, pieces=8):
    """A schedule in float64 with an uneven shape."""
    generator = torch.Generator().manual_seed(seed)
    schedule = LearnedNoiseSchedule(T, pieces=pieces).double()
    with torch.no_grad():
        schedule.ends.copy_(torch.tensor([-5.0, 4.0]))
        schedule.rise_logits.copy_(spread * torch.randn(pieces, generator=generator, dtype=F64))
    return schedule


def scheduler_of(schedule, **keys):
    betas = schedule.betas()[0].tolist()
    return VariationalDDPMScheduler(beta_schedule="learned", trained_betas=betas, levels=LEVELS, **keys)


def batch(t, dtype=F64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (len(t), 1, 3, 2)
    x_start = torch.randint(LEVELS, shape, generator=generator) * (2 / (LEVELS - 1)) - 1
    noise = torch.randn(shape, generator=generator, dtype=F64)
    return dict(
        x_start=x_start.to(dtype),
        noise=noise.to(dtype),
        t=torch.tensor(t, dtype=torch.int64 if isinstance(t[0], int) else F64),
    )


def a_network(x_t, c_noise, class_labels=None, return_dict=False):
    """Smooth in the images and their times, and with as many channels again for a learned variance."""
    time = torch.as_tensor(c_noise, dtype=x_t.dtype).view(-1, 1, 1, 1) / 40
    return torch.cat((torch.tanh(0.7 * x_t + time), torch.sin(x_t - time)), dim=1)


def mean_only(x_t, c_noise, class_labels=None, return_dict=False):
    return (a_network(x_t, c_noise)[:, :1],)


def both(x_t, c_noise, class_labels=None, return_dict=False):
    return (a_network(x_t, c_noise),)


def finite_differences(loss, schedule, step=1e-6):
    """The gradient of loss() in each parameter of the schedule."""
    gradients = []
    for parameter in schedule.parameters():
        gradient = torch.zeros_like(parameter)
        for i in range(len(parameter)):
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter[i] += sign * step
                    values.append(float(loss()))
                    parameter[i] -= sign * step
            gradient[i] = (values[0] - values[1]) / (2 * step)
        gradients.append(gradient)
    return gradients


def gradients_of(loss, schedule):
    schedule.zero_grad()
    loss().backward()
    return [parameter.grad.clone() for parameter in schedule.parameters()]


@pytest.mark.parametrize("T", [2, 3, 50, 1000])
def test_the_curve_begins_as_a_straight_line_between_the_ends_of_the_linear_schedule(T):
    schedule = LearnedNoiseSchedule(T, beta_start=1e-3, beta_end=0.05)
    abar = torch.from_numpy(1 - linear_betas(T, 1e-3, 0.05)).cumprod(0)
    gamma = -(abar / (1 - abar)).log()
    position = torch.linspace(0, 1, T, dtype=F64)
    expected = gamma[0] + position * (gamma[-1] - gamma[0])
    torch.testing.assert_close(schedule(position), expected, rtol=1e-6, atol=1e-6)  # the ends are float32


@pytest.mark.parametrize("seed", range(4))
def test_betas_are_valid_whatever_the_parameters(seed):
    schedule = schedule_of(200, seed, spread=20.0, pieces=32)  # most pieces are nearly flat
    betas, alphas_cumprod = schedule.betas()
    assert (betas > 0).all() and (betas < 1).all()
    torch.testing.assert_close((1 - betas).cumprod(0), alphas_cumprod, rtol=1e-10, atol=0)
    gamma = schedule(torch.linspace(0, 1, 200, dtype=F64))
    assert (gamma.diff() > 0).all()
    torch.testing.assert_close(alphas_cumprod, torch.sigmoid(-gamma), rtol=1e-12, atol=0)
    torch.testing.assert_close(scheduler_of(schedule).alphas_cumprod, alphas_cumprod, rtol=1e-10, atol=0)


def test_the_slope_is_that_of_the_curve():
    schedule = schedule_of()
    position = torch.rand(100, dtype=F64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    (slope,) = torch.autograd.grad(schedule(position).sum(), position)
    torch.testing.assert_close(schedule.start_and_span()[1] * schedule.rise_and_slope(position)[1], slope)


PREDICTIONS = ["epsilon", "sample", "v_prediction"]


@pytest.mark.parametrize("prediction_type", [*PREDICTIONS, "previous"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range", "learned"])
def test_the_bound_of_a_chain_and_its_gradient_in_the_betas(prediction_type, variance_type):
    schedule = schedule_of(30)
    keys = dict(prediction_type=prediction_type, variance_type=variance_type)
    network = both if variance_type.startswith("learned") else mean_only
    objective = DiffusionObjective(scheduler_of(schedule, **keys), "vlb", noise_schedule=schedule)
    arguments = batch([0, 0, 1, 2, 14, 28, 29])
    with torch.no_grad():  # other betas than those that the scheduler began with
        schedule.ends += torch.tensor([0.3, -0.2])
    # the bound of a scheduler that knows no schedule, only the betas
    fixed = scheduler_of(schedule, **keys)
    expected = DiffusionObjective(fixed, "vlb")(network, **arguments) + fixed.prior_bits_per_dim(arguments["x_start"])
    losses = objective(network, **arguments)
    torch.testing.assert_close(losses, expected, rtol=1e-8, atol=1e-10)

    def loss():
        return objective(network, **arguments).mean()

    numerical = finite_differences(loss, schedule)
    for gradient, other in zip(gradients_of(loss, schedule), numerical, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


class OfNoiseLevel:
    """A network that sees noise levels, whatever times a schedule gives them: the times are those of a copy of it."""

    def __init__(self, schedule, prediction_type):
        self.schedule, self.prediction_type = schedule, prediction_type

    def output(self, x_t, gamma):
        return torch.tanh(0.7 * x_t + gamma.view(-1, 1, 1, 1) / 5)

    def __call__(self, x_t, c_noise, class_labels=None, return_dict=False):
        gamma = self.schedule(c_noise / (self.schedule.num_train_timesteps - 1))
        return (self.output(x_t, gamma),)

    def epsilon(self, x_t, gamma):
        scale, std = ((torch.sigmoid(sign * gamma).sqrt()).view(-1, 1, 1, 1) for sign in (-1, 1))
        output = self.output(x_t, gamma)
        if self.prediction_type == "sample":
            return (x_t - scale * output) / std
        return output if self.prediction_type == "epsilon" else std * x_t + scale * output


def bound_in_continuous_time(schedule, network, x_start, t, noise):
    """The terms as VDM has them, from gamma alone: the diffusion loss of each image, and prior and decoder."""
    position = t / (schedule.num_train_timesteps - 1)
    gamma_min, gamma_max = (schedule(torch.tensor(end, dtype=F64)) for end in (0.0, 1.0))
    gamma, slope = schedule(position), schedule.start_and_span()[1] * schedule.rise_and_slope(position)[1]
    scale, std = (torch.sigmoid(sign * gamma).sqrt().view(-1, 1, 1, 1) for sign in (-1, 1))
    error = network.epsilon(scale * x_start + std * noise, gamma) - noise
    diffusion = 0.5 * slope * error.square().flatten(1).mean(1) / LN2
    q = torch.distributions.Normal(torch.sigmoid(-gamma_max).sqrt() * x_start, torch.sigmoid(gamma_max).sqrt())
    prior = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0))
    log_scale = gamma_min / 2
    decoder = -discretized_gaussian_log_likelihood(x_start, x_start + log_scale.exp() * noise, log_scale, LEVELS)
    return diffusion, (prior + decoder).flatten(1).mean(1) / LN2


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_the_bound_in_continuous_time_and_its_gradients(prediction_type):
    """The end points get the gradient of the mean loss, the shape between them that of the mean squared diffusion loss."""
    schedule, reference = schedule_of(40), schedule_of(40)
    network = OfNoiseLevel(reference, prediction_type)
    objective = ContinuousBoundObjective(scheduler_of(schedule, prediction_type=prediction_type), schedule)
    arguments = batch([0.0, 0.3, 4.7, 11.1, 20.6, 33.2, 38.9])

    def terms():
        return bound_in_continuous_time(schedule, network, **arguments)

    losses = objective(network, **arguments)
    torch.testing.assert_close(losses, sum(terms()), rtol=1e-10, atol=0)
    ends, rises = gradients_of(lambda: objective(network, **arguments).mean(), schedule)
    of_mean, _ = finite_differences(lambda: sum(terms()).mean(), schedule)
    _, of_square = finite_differences(lambda: terms()[0].square().mean(), schedule)
    torch.testing.assert_close(ends, of_mean, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(rises, of_square, rtol=1e-6, atol=1e-8)


STD = 0.5  # of Gaussian data


class Exact:
    """Predicts the noise in images of normally distributed pixels with standard deviation STD as well as possible."""

    def __init__(self, schedule):
        self.schedule = schedule

    def __call__(self, x_t, c_noise, class_labels=None, return_dict=False):
        gamma = self.schedule(c_noise / (self.schedule.num_train_timesteps - 1)).view(-1, 1, 1, 1)
        return (torch.sigmoid(gamma).sqrt() * x_t / (torch.sigmoid(-gamma) * STD**2 + torch.sigmoid(gamma)),)


def diffusion_losses(schedule, count, generator, size=4):
    """Diffusion losses in nats per dimension at evenly spread times, and of which dimension."""
    objective = ContinuousBoundObjective(scheduler_of(schedule), schedule)
    objective._prior_and_decoder = lambda *arguments: 0.0
    t = (torch.arange(count, dtype=F64) + torch.rand((), generator=generator, dtype=F64)) / count
    x_start = STD * torch.randn(count, 1, size, size, generator=generator, dtype=F64)
    noise = torch.randn(x_start.shape, generator=generator, dtype=F64)
    return objective(Exact(schedule), x_start, t=t * (objective.end - 1), noise=noise) * LN2


def share_of_error(gamma):
    """The expected squared error of the noise, v = SNR s^2 / (1 + SNR s^2)."""
    return torch.sigmoid(2 * math.log(STD) - gamma)


def integral_of_error(schedule):
    """The integral of v over gamma, in closed form."""
    gamma = schedule(torch.tensor([0.0, 1.0], dtype=F64))
    low, high = torch.nn.functional.softplus(2 * math.log(STD) - gamma)
    return (low - high).item()


def test_the_bound_in_continuous_time_does_not_depend_on_the_shape():
    generator, results = torch.Generator().manual_seed(0), []
    for seed in range(3):
        schedule = schedule_of(seed=seed)
        with torch.no_grad():
            losses = diffusion_losses(schedule, 40_000, generator)
        assert losses.mean().item() == pytest.approx(integral_of_error(schedule) / 2, rel=0.01)
        results.append(losses.var().item())
    assert max(results) > 1.3 * min(results)  # the variance does


def test_the_shape_learns_the_lowest_variance_and_the_bound_stays():
    """E[loss^2] is lowest where gamma rises as 1 / v: it is then (1 + 2 / D) (integral of v / 2)^2."""
    schedule, generator = LearnedNoiseSchedule(pieces=32).double(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        schedule.ends.copy_(torch.tensor([-6.0, 5.0]))
    schedule.ends.requires_grad_(False)

    def mean_square():
        with torch.no_grad():
            return diffusion_losses(schedule, 40_000, generator).square().mean().item()

    dimensions, half = 16, integral_of_error(schedule) / 2
    lowest = (1 + 2 / dimensions) * half**2
    before = mean_square()
    optimizer = torch.optim.Adam([schedule.rise_logits], lr=0.03, betas=(0.9, 0.99))
    for _ in range(400):
        optimizer.zero_grad()
        diffusion_losses(schedule, 256, generator).mean().backward()
        optimizer.step()
    after = mean_square()
    assert before > 1.5 * lowest
    assert lowest * 0.98 < after < 1.03 * lowest
    with torch.no_grad():
        assert diffusion_losses(schedule, 40_000, generator).mean().item() == pytest.approx(half, rel=0.01)
    # the curve itself: p(gamma), the integral of v from gamma_min to gamma over the whole
    gamma = schedule(torch.linspace(0, 1, 9, dtype=F64)).detach()
    integral = torch.nn.functional.softplus(2 * math.log(STD) - gamma)
    p = (integral[0] - integral) / (integral[0] - integral[-1])
    torch.testing.assert_close(p, torch.linspace(0, 1, 9, dtype=F64), rtol=0, atol=0.03)


def test_what_cannot_be_learned_is_refused():
    schedule = LearnedNoiseSchedule(10)
    with pytest.raises(ValueError, match="loss='simple' cannot train a noise schedule: .*choose loss='vlb'"):
        DiffusionObjective(scheduler_of(schedule), noise_schedule=schedule)
    with pytest.raises(ValueError, match="loss='hybrid' cannot train a noise schedule"):
        DiffusionObjective(scheduler_of(schedule, variance_type="learned_range"), "hybrid", noise_schedule=schedule)
    with pytest.raises(ValueError, match="prediction_type='previous' has no meaning in continuous time"):
        ContinuousBoundObjective(scheduler_of(schedule, prediction_type="previous"), schedule)
    with pytest.raises(ValueError, match="variance_type='learned_range' has no meaning in continuous time"):
        ContinuousBoundObjective(scheduler_of(schedule, variance_type="learned_range"), schedule)
    with pytest.raises(ValueError, match="num_train_timesteps=1 must be an integer in"):
        LearnedNoiseSchedule(1)
    with pytest.raises(ValueError, match="beta_schedule='learned' has no formula; give trained_betas"):
        VariationalDDPMScheduler(beta_schedule="learned")


def test_the_scheduler_of_the_caller_stays_as_it_is():
    schedule = schedule_of(30)
    scheduler = scheduler_of(schedule)
    betas = scheduler.betas.clone()
    objective = DiffusionObjective(scheduler, "vlb", noise_schedule=schedule)
    with torch.no_grad():
        schedule.ends += 0.5
    objective(mean_only, **batch([0, 3])).mean().backward()
    assert torch.equal(scheduler.betas, betas) and not scheduler.alphas_cumprod.requires_grad
    scheduler.step(torch.zeros(1, 1, 2, 2), 3, torch.zeros(1, 1, 2, 2))


def test_the_bound_of_a_shorter_chain():
    schedule = schedule_of(30)
    scheduler, fixed = scheduler_of(schedule), scheduler_of(schedule)
    for process in (scheduler, fixed):
        process.set_timesteps(5)
    arguments = batch([0, 6, 12, 24])
    objective = DiffusionObjective(scheduler, "vlb", noise_schedule=schedule)
    expected = DiffusionObjective(fixed, "vlb")(mean_only, **arguments) + fixed.prior_bits_per_dim(arguments["x_start"])
    for _ in range(2):
        torch.testing.assert_close(objective(mean_only, **arguments), expected, rtol=1e-8, atol=1e-10)


def test_one_timestep_with_learned_betas():
    """t as an int, whose coefficients are single numbers, is differentiable too."""
    schedule = schedule_of(30)
    scheduler, arguments = scheduler_of(schedule), batch([4, 4])
    scheduler.use_betas(*schedule.betas())
    gradients = []
    for t in (4, arguments["t"]):
        x_t = scheduler.q_sample(arguments["x_start"], t, arguments["noise"])
        term = scheduler.vlb_term(mean_only(x_t, t)[0], arguments["x_start"], x_t, t, clip_sample=False)
        gradients.append(torch.autograd.grad(term.sum(), list(schedule.parameters()), retain_graph=True))
    torch.testing.assert_close(*gradients)


def test_a_process_with_other_timesteps_or_an_analytic_variance_is_refused():
    schedule, other = LearnedNoiseSchedule(10), LearnedNoiseSchedule(20)
    for make in (
        lambda: DiffusionObjective(scheduler_of(other), "vlb", noise_schedule=schedule),
        lambda: ContinuousBoundObjective(scheduler_of(other), schedule),
    ):
        with pytest.raises(ValueError, match="noise_schedule has num_train_timesteps=10, the scheduler 20"):
            make()
    analytic = scheduler_of(schedule, variance_type="analytic", x_start_mse=[0.1] * 10)
    with pytest.raises(ValueError, match="variance_type='analytic' needs fixed betas"):
        DiffusionObjective(analytic, "vlb", noise_schedule=schedule)
    with pytest.raises(ValueError, match="variance_type='analytic' has no meaning in continuous time"):
        ContinuousBoundObjective(analytic, schedule)


@pytest.mark.parametrize("t", [[-0.1, 1.0], [9.5, 1.0], [math.nan, 1.0]])
def test_times_out_of_range_are_refused(t):
    schedule = LearnedNoiseSchedule(10)
    objective = ContinuousBoundObjective(scheduler_of(schedule), schedule)
    with pytest.raises(ValueError, match=r"must be in \[0, 9\]"):
        objective(mean_only, **batch(t))


def test_betas_of_another_shape_are_refused():
    scheduler, other = scheduler_of(LearnedNoiseSchedule(10)), LearnedNoiseSchedule(20)
    with pytest.raises(ValueError, match=r"have the shapes \(20,\) and \(20,\); give \(10,\)"):
        scheduler.use_betas(*other.betas())
