"""`bits_per_dim` against the golden whole bounds, and data whose likelihood is known."""

import math
from functools import partial

import pytest
import torch
from diffusers import DDPMScheduler
from torch.distributions import Normal, kl_divergence

from ddpm_hf.likelihood.bound import bits_per_dim, progressive_coding, rate_distortion
from ddpm_hf.likelihood.estimate import _LinearDenoiser, estimate_bits_per_dim
from ddpm_hf.models.unet import DDPMUNet
from ddpm_hf.schedulers.betas import space_timesteps
from ddpm_hf.schedulers.ddpm import VariationalDDPMScheduler
from support.golden_data import SEED_X, case_id, case_scheduler, golden_cases, images, network, randn

F64 = torch.float64
LOOPS = golden_cases("likelihood_bound", "calc_bpd_loop")


def as_unet(mean_type="EPSILON", var_type=None):
    def unet(x, t, class_labels=None, return_dict=True):
        assert class_labels is None and not return_dict
        return (network(x, t, mean_type, var_type),)

    return unet


class TinyUNet(torch.nn.Module):
    """Called as diffusers' models are; its dropout makes it noisy in training."""

    def __init__(self):
        super().__init__()
        self.conv, self.dropout = torch.nn.Conv2d(3, 3, 3, padding=1), torch.nn.Dropout(0.5)
        self.embedding = torch.nn.Embedding(10, 3)
        self.modes, self.batches = [], []

    @property
    def dtype(self):
        return self.conv.weight.dtype

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        assert sample.dtype == self.dtype and not torch.is_grad_enabled()
        self.modes.append(self.training)
        self.batches.append(len(sample))
        output = self.dropout(self.conv(sample)) + 0.001 * torch.as_tensor(timestep).view(-1, 1, 1, 1)
        if class_labels is not None:
            output = output + self.embedding(class_labels)[:, :, None, None]
        return (output,)


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return TinyUNet()


def short(**config):
    return VariationalDDPMScheduler(**{"num_train_timesteps": 5, "beta_schedule": "quad", "beta_end": 0.5} | config)


def fixed_noise(t, shape):
    return randn(100 + t, torch.float32)[: shape[0]]


# The golden loops


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", LOOPS, ids=case_id)
def test_golden_loop(case, dtype):
    def noise_fn(t, shape):
        assert shape == (4, 3, 8, 8)
        return randn(case["noise_seed_base"] + t, dtype)

    unet = as_unet(case["mean_type"], case["var_type"])
    # what the reference clips is the argument's business, not the config's
    scheduler = case_scheduler(case, clip_sample=not case["clip_denoised"])
    actual = bits_per_dim(unet, scheduler, images(dtype), clip_sample=case["clip_denoised"], noise_fn=noise_fn)

    def compare(name, value, expected, sums=1):
        expected = torch.tensor(expected, dtype=F64)
        error = 5 * case["f32"][name]["max_abs"] * sums
        bound = {"rtol": 1e-7, "atol": 1e-8} if dtype == F64 else {"rtol": 0, "atol": error}
        torch.testing.assert_close(value.double(), expected, **bound, msg=partial("{}: {}".format, name))

    T = case["num_steps"]
    assert actual.terms.shape == actual.x_start_mse.shape == actual.epsilon_mse.shape == (4, T)
    assert all(tensor.dtype == dtype for tensor in actual)
    exact = case["total_bpd_with_exact_cdf"]["unfloored"]
    compare("total_bpd", actual.total, exact)
    compare("prior_bpd", actual.prior, case["prior_bpd"])
    torch.testing.assert_close(actual.total, actual.prior + actual.terms.sum(1))
    # The golden decoder, column 0, has the approximate CDF: judged by the totals, and by the rest here.
    t = case["vb_at_t"]["t"]
    assert t[0] == 0
    compare("vb", actual.terms[:, t[1:]], [row[1:] for row in case["vb_at_t"]["rows_are_images"]])
    assert (actual.terms[:, 0] - torch.tensor(case["vb_at_t"]["rows_are_images"])[:, 0]).abs().max() < 0.02
    if "vb_image0_t_ascending" in case:
        compare("vb", actual.terms[0, 1:], case["vb_image0_t_ascending"][1:])
    for name, value in ("xstart_mse", actual.x_start_mse), ("mse", actual.epsilon_mse):
        compare(name, value[:, case[f"{name}_at_t"]["t"]], case[f"{name}_at_t"]["rows_are_images"])
        compare(name, value.sum(1), case[f"sum_over_t_{name}"], sums=T)
    expected = torch.tensor(exact, dtype=F64)
    assert actual.mean == pytest.approx(expected.mean().item(), rel=1e-5)
    assert actual.standard_error == pytest.approx(expected.std().item() / 2, rel=1e-4)


# The likelihood of Gaussian data, by Monte Carlo


@pytest.mark.parametrize("steps", [None, 12])
def test_gaussian_data(steps):
    """Pixels x_0 ~ N(m, s^2) and the exact reverse process: the bound is the entropy, within its standard error."""
    m, s = 0.1, 0.15
    scheduler = VariationalDDPMScheduler(
        60, beta_schedule="linear_scaled_by_T", variance_type="learned", clip_sample=False, levels=2**16 + 1
    )
    if steps:
        scheduler.set_timesteps(timesteps=space_timesteps(60, steps)[::-1])
    alpha_bar = [*scheduler.alphas_cumprod[scheduler.chain].tolist(), 1.0]
    generator = torch.Generator().manual_seed(0)
    x_start = m + s * torch.randn(64, 3, 8, 8, generator=generator, dtype=F64)
    x_start = (x_start * 2**15).round() / 2**15

    def unet(x, t, class_labels=None, return_dict=True, error=0.0):
        i = scheduler.chain.index(t)
        a, prev = alpha_bar[i], alpha_bar[i - 1]
        gain = a**0.5 * s**2 / (a * s**2 + 1 - a)
        epsilon = (x - a**0.5 * (m + gain * (x - a**0.5 * m))) / (1 - a) ** 0.5
        log_variance = -math.log(1 / (prev * s**2 + 1 - prev) + a / (prev - a)) + error
        return (torch.cat((epsilon, torch.full_like(x, log_variance)), dim=1),)

    a = alpha_bar[-2]
    x_T = Normal(a**0.5 * m, (a * s**2 + 1 - a) ** 0.5)
    nats = 0.5 * math.log(2 * math.pi * math.e * s**2) + kl_divergence(x_T, Normal(0.0, 1.0)).item()
    nll = nats / math.log(2) + math.log2(2**16 / 2)
    actual = bits_per_dim(unet, scheduler, x_start, clip_sample=False, generator=generator)
    assert actual.standard_error < 0.02
    assert abs(actual.mean - nll) < 4 * actual.standard_error
    for error in 0.3, -0.3:
        worse = bits_per_dim(partial(unet, error=error), scheduler, x_start, clip_sample=False, generator=generator)
        cost = len(scheduler.chain) * 0.5 * (error + math.exp(-error) - 1) / math.log(2)
        assert abs(worse.mean - nll - cost) < 4 * worse.standard_error and cost > 8 * worse.standard_error


# What it is given, and what it leaves behind


@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
def test_batches_change_nothing(tiny, batch_size):
    noises = {}

    def noise_fn(t, shape):  # the rows of the whole batch's noise, in turn
        start = noises.get(t, 0)
        noises[t] = start + shape[0]
        return fixed_noise(t, (4,))[start : noises[t]]

    labels, scheduler = torch.tensor([3, 1, 4, 1]), short()
    whole = bits_per_dim(tiny, scheduler, images(torch.float32), class_labels=labels, noise_fn=fixed_noise)
    assert tiny.batches == [4] * 5
    batched = bits_per_dim(
        tiny, scheduler, images(torch.float32), class_labels=labels, noise_fn=noise_fn, batch_size=batch_size
    )
    # the decoder's step is a call of its own; the others share one as far as the batch size reaches
    assert max(tiny.batches[5:]) == min(batch_size, 16) and sum(tiny.batches[5:]) == 20
    for a, b in zip(whole, batched):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    unlabelled = bits_per_dim(tiny, scheduler, images(torch.float32), noise_fn=fixed_noise)
    assert (unlabelled.total != whole.total).all()


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_restored(tiny, training):
    tiny.train(training)
    actual = [bits_per_dim(tiny, short(), images(torch.float32), noise_fn=fixed_noise).total for _ in range(2)]
    assert torch.equal(*actual) and not any(tiny.modes)
    assert tiny.training == training == tiny.dropout.training

    def failing(t, shape):
        raise RuntimeError("no noise")

    with pytest.raises(RuntimeError, match="no noise"):
        bits_per_dim(tiny, short(), images(torch.float32), noise_fn=failing)
    assert tiny.training == training == tiny.dropout.training


@pytest.mark.parametrize("training", [True, False])
def test_each_module_keeps_its_own_mode(tiny, training):
    """A frozen part of a network in training, or the other way round, stays as it was."""
    tiny.train(training)
    tiny.dropout.train(not training)
    actual = [bits_per_dim(tiny, short(), images(torch.float32), noise_fn=fixed_noise).total for _ in range(2)]
    assert torch.equal(*actual)
    assert (tiny.training, tiny.dropout.training) == (training, not training)


def test_the_generator_and_the_dtype(tiny):
    x_start, scheduler = images(), short()
    first, repeated, other = (
        bits_per_dim(tiny, scheduler, x_start, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first.terms, repeated.terms) and not torch.equal(first.terms, other.terms)
    assert first.total.dtype == F64 and first.total.shape == (4,)  # float64 images, a float32 network
    assert not first.total.requires_grad
    assert torch.equal(first.total, first.terms.sum(1) + first.prior)


@pytest.mark.parametrize("chain", [[4, 2, 1], [3], [4, 0]])
def test_a_respaced_chain(tiny, chain):
    scheduler, x_start = short(), images(torch.float32)
    scheduler.set_timesteps(timesteps=chain)
    tiny.eval()
    recorded = []

    def noise_fn(t, shape):
        recorded.append(t)
        return fixed_noise(t, shape)

    actual = bits_per_dim(tiny, scheduler, x_start, noise_fn=noise_fn)
    assert recorded == chain[::-1] and actual.terms.shape == (4, len(chain))
    with torch.no_grad():
        for column, t in enumerate(chain[::-1]):
            x_t = scheduler.q_sample(x_start, t, fixed_noise(t, (4,)))
            term = scheduler.vlb_term(tiny(x_t, t, return_dict=False)[0], x_start, x_t, t, clip_sample=True)
            assert torch.equal(actual.terms[:, column], term)
    assert torch.equal(actual.prior, scheduler.prior_bits_per_dim(x_start))
    # the step before the chain's first does not exist: the bound of the respaced process is another
    scheduler.set_timesteps(5)
    assert bits_per_dim(tiny, scheduler, x_start, noise_fn=fixed_noise).prior.max() > 0


def test_clipping_and_levels(tiny):
    x_start, results = images(torch.float32), {}
    for clip in True, False:
        results[clip] = bits_per_dim(tiny, short(clip_sample=not clip), x_start, clip_sample=clip, noise_fn=fixed_noise)
    assert (results[True].x_start_mse < results[False].x_start_mse).any()
    assert torch.equal(bits_per_dim(tiny, short(), x_start, noise_fn=fixed_noise).total, results[True].total)  # default
    binary = torch.where(x_start < 0, -1.0, 1.0)
    few = bits_per_dim(tiny, short(levels=2), binary, noise_fn=fixed_noise)
    many = bits_per_dim(tiny, short(), binary, noise_fn=fixed_noise)
    assert (few.terms[:, 0] < many.terms[:, 0]).all() and torch.equal(few.terms[:, 1:], many.terms[:, 1:])


@pytest.mark.parametrize(
    "x_start, message",
    [
        (torch.zeros(0, 3, 8, 8), "0, 3, 8, 8"),
        (torch.zeros(3, 8, 8), "3, 8, 8"),
        (torch.full((1, 3, 8, 8), 1.01), "1.01"),
        (torch.arange(192.0).view(1, 3, 8, 8), "191"),
    ],
)
def test_refused_images(tiny, x_start, message):
    with pytest.raises(ValueError, match=message):
        bits_per_dim(tiny, short(), x_start)
    assert not tiny.batches


def test_refused_labels(tiny):
    """One label for each image: a single one must not stand for all terms in silence."""
    for batch_size, labels in (1, [1]), (2, [1, 2]), (None, [1, 2, 3]):
        with pytest.raises(ValueError, match="class_labels"):
            bits_per_dim(tiny, short(), images(torch.float32), class_labels=torch.tensor(labels), batch_size=batch_size)


def test_refused_levels(tiny):
    x_start = images(torch.float32)
    for bad, levels in (
        (x_start, 100),
        (x_start + 0.001 * randn(SEED_X, torch.float32).sign(), None),
        (x_start / 2, 256),
    ):
        with pytest.raises(ValueError, match="off the grid of levels="):
            bits_per_dim(tiny, short(), bad.clamp(-1, 1), levels=levels)
    with pytest.raises(ValueError, match="float16"):
        bits_per_dim(tiny, short(), x_start.half())
    assert not tiny.batches
    sixteen_bits = (torch.rand(2, 3, 8, 8, dtype=F64) * 65535).round() * (2 / 65535) - 1
    for x in sixteen_bits, sixteen_bits.float():
        actual = bits_per_dim(tiny, short(), x, levels=2**16, noise_fn=fixed_noise)
        same = bits_per_dim(tiny, short(levels=2**16), x, noise_fn=fixed_noise)
        assert torch.equal(actual.terms, same.terms)


@pytest.mark.parametrize(
    "config, process, message",
    [
        ({"in_channels": 1, "out_channels": 3}, {}, "in_channels=1"),
        ({}, {"variance_type": "learned_range"}, "out_channels=3.*'learned_range' need 6"),
        ({"out_channels": 6}, {}, "out_channels=6.*'fixed_small' need 3"),
    ],
)
def test_a_network_of_other_channels(config, process, message):
    config = {"sample_size": 8, "block_out_channels": (8, 8), "norm_num_groups": 4} | config
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = DDPMUNet(**config, **blocks)
    for measure in bits_per_dim, partial(estimate_bits_per_dim, num_evaluations=8):
        with pytest.raises(ValueError, match=message):
            measure(unet, short(num_train_timesteps=20, **process), images(torch.float32))


@pytest.mark.parametrize("batch_size", [None, 3, 12])
def test_a_term_that_is_not_finite_is_named(tiny, batch_size):
    def broken(x_t, t, class_labels=None, return_dict=True):
        (output,) = tiny(x_t, 0)
        at = torch.as_tensor(t).expand(len(x_t)) == 3
        return (torch.where((at & (torch.arange(len(x_t)) % 3 == 2))[:, None, None, None], math.nan, output),)

    with pytest.raises(ValueError, match="term of image 2 at t=3 is nan"):
        bits_per_dim(broken, short(), images(torch.float32)[:3], batch_size=batch_size)


def test_a_call_of_several_steps_draws_the_same_noise(tiny):
    x_start, labels, scheduler = images(torch.float32), torch.tensor([3, 1, 4, 1]), short(num_train_timesteps=20)
    one, several = (
        bits_per_dim(
            tiny, scheduler, x_start, class_labels=labels, generator=torch.Generator().manual_seed(0), batch_size=size
        )
        for size in (4, 26)
    )
    assert set(tiny.batches) == {4, 24}
    for a, b in zip(one, several):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["weights", "autocast"])
def test_a_network_in_half_precision_has_terms_in_float32(tiny, precision):
    x_start, scheduler = images(torch.float32), short()
    exact = bits_per_dim(tiny, scheduler, x_start, noise_fn=fixed_noise)
    if precision == "weights":
        tiny.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        half = bits_per_dim(tiny, scheduler, x_start, noise_fn=fixed_noise)
    for a, b in zip(exact, half):
        assert b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.05, atol=1e-3)
    assert not torch.equal(exact.terms, half.terms) and torch.equal(exact.prior, half.prior)


# Progressive coding


def test_progressive_coding_costs_the_bound_along_one_trajectory():
    """Marginally each x_t is drawn from q(x_t | x_0): the same expected terms, by other draws."""
    scheduler = VariationalDDPMScheduler(40, beta_schedule="cosine", prediction_type="sample", timestep_spacing="iddpm")
    scheduler.set_timesteps(12)
    abar = scheduler.alphas_cumprod
    unet = LinearUNet(scheduler, 0.36 * abar.sqrt() / (0.36 * abar + 1 - abar))
    x_start = images(F64).repeat(64, 1, 1, 1)
    both = [
        measure(
            unet, scheduler, x_start, clip_sample=False, generator=torch.Generator().manual_seed(seed), batch_size=100
        )
        for seed, measure in enumerate((bits_per_dim, progressive_coding))
    ]
    for name in "terms", "x_start_mse", "epsilon_mse":
        a, b = (getattr(result, name) for result in both)
        assert a.shape == b.shape == (256, 12)
        error = (a.var(0) / 256 + b.var(0) / 256).sqrt()
        assert ((a.mean(0) - b.mean(0)).abs() < 4.5 * error + 1e-12).all(), name
    assert torch.equal(both[0].prior, both[1].prior)
    # of one image the steps go together: neighbouring errors of x_0 agree more than independent draws
    correlation = [torch.corrcoef(result.x_start_mse.view(64, 4, 12)[:, 0, 4:6].T)[0, 1] for result in both]
    assert correlation[1] > 0.3 > abs(correlation[0])


def test_rate_and_distortion(tiny):
    scheduler, x_start = short(), images(torch.float32)
    result = bits_per_dim(tiny, scheduler, x_start, noise_fn=fixed_noise)
    rate, distortion = rate_distortion(result)
    assert rate.shape == distortion.shape == (6,) and rate.dtype == distortion.dtype == F64
    assert rate[0] == pytest.approx(result.prior.double().mean().item())
    assert rate[1] - rate[0] == pytest.approx(result.terms[:, 4].double().mean().item(), rel=1e-6)
    assert rate[-1] == pytest.approx(result.mean, rel=1e-6) and distortion[-1] == 0
    # the first is the error of what x_T tells of x_0, in grey levels of 256
    x_t = scheduler.q_sample(x_start, 4, fixed_noise(4, (4,)))
    tiny.eval()
    with torch.no_grad():
        p = scheduler.p_mean_variance(tiny(x_t, 4)[0], x_t, 4, clip_sample=True)
    rmse = ((p.pred_original_sample - x_start) * 127.5).double().square().mean().sqrt()
    assert distortion[0] == pytest.approx(rmse.item(), rel=1e-5)


# The estimate


class LinearUNet:
    """x_0 predicted as gain(t) * x_t: each term's expectation over the noise has a closed form."""

    def __init__(self, scheduler, gain):
        self.scheduler, self.gain, self.rows = scheduler, gain, 0

    def __call__(self, x_t, t, class_labels=None, return_dict=True):
        self.rows += len(x_t)
        return (x_t * self.gain[torch.as_tensor(t)].view(-1, 1, 1, 1),)

    def expected_kl(self, x_start):
        """(B,) sums of the expected KL terms, by eq. 8."""
        chain = self.scheduler.chain
        abar = self.scheduler.alphas_cumprod[chain]
        prev = torch.cat((torch.ones(1, dtype=F64), abar[:-1]))
        beta, gain = 1 - abar / prev, self.gain[chain]
        x = x_start.double()[..., None]
        error = (x * (1 - gain * abar.sqrt())) ** 2 + gain**2 * (1 - abar)
        kl = error * (prev.sqrt() * beta / (1 - abar)) ** 2 / (2 * beta * (1 - prev) / (1 - abar))
        return kl[..., 1:].sum(-1).flatten(1).mean(1) / math.log(2)


@pytest.mark.parametrize("chain, num_evaluations", [(None, 9), (50, 20)])
def test_the_estimate_is_unbiased(chain, num_evaluations):
    scheduler = VariationalDDPMScheduler(
        200, beta_schedule="cosine", variance_type="fixed_small_log", prediction_type="sample", timestep_spacing="iddpm"
    )
    if chain:
        scheduler.set_timesteps(chain)
    abar = scheduler.alphas_cumprod
    unet = LinearUNet(scheduler, 0.36 * abar.sqrt() / (0.36 * abar + 1 - abar))  # the best for data N(0, 0.6^2)
    x_start, estimates = images(F64), []
    for seed in range(300):
        unet.rows = 0
        estimates.append(
            estimate_bits_per_dim(
                unet, scheduler, x_start, num_evaluations=num_evaluations, clip_sample=False,
                generator=torch.Generator().manual_seed(seed), batch_size=[None, 7, 64][seed % 3],
            )
        )  # fmt: skip
        assert unet.rows == 4 * num_evaluations
    kl = torch.stack([estimate.kl for estimate in estimates])
    error = kl.mean(0) - unet.expected_kl(x_start)
    assert (error.abs() < 4 * kl.std(0) / 300**0.5).all() and (kl.std(0) < 0.5 * kl.mean(0)).all()
    # what it says of its own error: on the safe side, not by far
    reported_error = torch.tensor([estimate.sampling_error for estimate in estimates]).square().mean().sqrt()
    actual = torch.tensor([estimate.mean for estimate in estimates]).std()
    assert 0.9 < reported_error / actual < 2
    assert torch.equal(estimates[0].prior, scheduler.prior_bits_per_dim(x_start))
    assert torch.equal(estimates[0].total, estimates[0].prior + estimates[0].kl + estimates[0].decoder)


def test_the_standard_error_counts_images_and_draws():
    """Over many sets of 4 random images: it has the size of the spread of the means, and is never below the draws' error.

    Without noise between images, whose expected terms are equal, it is the error of the draws alone.
    """
    scheduler = VariationalDDPMScheduler(
        100, beta_schedule="cosine", variance_type="fixed_small_log", prediction_type="sample", timestep_spacing="iddpm"
    )
    abar = scheduler.alphas_cumprod
    unet = LinearUNet(scheduler, 0.36 * abar.sqrt() / (0.36 * abar + 1 - abar))
    for varies in (True, False):
        found, errors = [], []
        for seed in range(150):
            generator = torch.Generator().manual_seed(seed)
            scale = torch.rand(4, 1, 1, 1, generator=generator, dtype=F64) if varies else 0.6
            signs = 2 * torch.randint(2, (4, 1, 2, 2), generator=generator).double() - 1
            x_start = (signs * scale * 127.5 + 127.5).round() / 127.5 - 1
            estimate = estimate_bits_per_dim(
                unet, scheduler, x_start, num_evaluations=20, clip_sample=False, generator=generator
            )
            expected = unet.expected_kl(x_start).mean().item()
            found.append(estimate.mean if varies else estimate.kl.mean().item() - expected)
            errors.append((estimate.standard_error, estimate.sampling_error))
        standard_errors, sampling_errors = torch.tensor(errors).T
        assert (standard_errors >= sampling_errors).all()
        actual = torch.tensor(found).std()
        assert 0.85 < standard_errors.square().mean().sqrt() / actual < 1.5
        assert (standard_errors > 1.2 * sampling_errors).double().mean() > 0.2 or not varies


@pytest.mark.parametrize("count", [1, 6, 40])
def test_the_linear_denoiser_and_its_expectation(count):
    """Against dense matrices, and the mean over many draws of noise."""
    scheduler = VariationalDDPMScheduler(100)
    x_start = torch.rand(count, 3, 2, 2, dtype=F64) * 2 - 1
    flat = x_start.flatten(1)
    centred = flat - flat.mean(0)
    covariance = (centred.T @ centred + flat.var(correction=0) * torch.eye(12, dtype=F64)) / (count + 1)
    linear = _LinearDenoiser(scheduler, x_start)
    for t in 0, 30, 99:
        abar = scheduler.alphas_cumprod[t].double()
        gain = abar.sqrt() * covariance @ torch.linalg.inv(abar * covariance + (1 - abar) * torch.eye(12, dtype=F64))
        noise = torch.randn(200_000, 3, 2, 2, dtype=F64)
        index = torch.arange(count).repeat_interleave(200_000 // count)
        noise = noise[: len(index)]
        x_t = abar.sqrt() * centred[index] + (1 - abar).sqrt() * noise.flatten(1)
        error = (x_t @ gain.T - centred[index]).square().sum(1).view(count, -1)
        excess = linear.excess(index, torch.full_like(index, t), noise).view(count, -1)
        expected = error / (1 + excess)  # of each image, the same for every noise
        torch.testing.assert_close(expected, expected[:, :1].expand_as(expected), rtol=1e-8, atol=0)
        assert (excess.mean(1).abs() < 5 * excess.std(1) / excess.shape[1] ** 0.5).all() and excess.std() > 0.1


def test_the_estimate_and_the_bound_agree(tiny):
    x_start, scheduler = images(torch.float32), short(num_train_timesteps=100)
    whole = bits_per_dim(tiny, scheduler, x_start, batch_size=100)
    some = estimate_bits_per_dim(tiny, scheduler, x_start, num_evaluations=40)
    assert abs(some.mean - whole.mean) < 5 * some.sampling_error + 0.01 * whole.mean
    assert some.standard_error == pytest.approx(max(some.total.double().std().item() / 2, some.sampling_error))
    assert all(tensor.dtype == torch.float32 and tensor.shape == (4,) for tensor in some[:4])
    one = estimate_bits_per_dim(tiny, scheduler, x_start[:1], num_evaluations=8)
    assert math.isfinite(one.mean) and one.sampling_error > 0 and math.isnan(one.standard_error)


@pytest.mark.parametrize("num_evaluations", [0, 7, 100, 1000])
def test_refused_number_of_evaluations(tiny, num_evaluations):
    with pytest.raises(ValueError, match=f"num_evaluations={num_evaluations} must be an integer, 8 to 99"):
        estimate_bits_per_dim(
            tiny, short(num_train_timesteps=100), images(torch.float32), num_evaluations=num_evaluations
        )


def test_one_image(tiny):
    actual = bits_per_dim(tiny, short(), images(torch.float32)[:1])
    assert actual.mean == pytest.approx(actual.total.item()) and math.isnan(actual.standard_error)


def test_other_schedulers_are_named(tiny):
    x_start = torch.zeros(1, 3, 4, 4)
    for measure in (bits_per_dim, partial(estimate_bits_per_dim, num_evaluations=8)):
        with pytest.raises(ValueError, match="scheduler is a DDPMScheduler, which has no bound; .*from_config"):
            measure(tiny, DDPMScheduler(20), x_start, levels=3)


def test_what_the_network_gives_is_looked_at():
    x_start = torch.zeros(4, 3, 4, 4)

    def infinite(x, t, class_labels=None, return_dict=True):
        output = torch.zeros_like(x)
        output[2, 0, 0, 0] = torch.inf  # clipping makes a finite term of it
        return (output,)

    with pytest.raises(ValueError, match="image 2 at t=0 is nan"):
        bits_per_dim(infinite, short(), x_start, levels=3)
    with pytest.raises(ValueError, match=r"the network made \(1, 3, 4, 4\) of \(4, 3, 4, 4\)"):
        bits_per_dim(lambda x, t, **_: (x[:1],), short(), x_start, levels=3)


def test_labels_as_a_list(tiny):
    x_start = torch.zeros(2, 3, 8, 8)
    results = [
        bits_per_dim(tiny, short(), x_start, levels=3, class_labels=labels, noise_fn=fixed_noise)
        for labels in ([3, 7], torch.tensor([3, 7]), torch.tensor([7, 3]))
    ]
    assert torch.equal(results[0].terms, results[1].terms) and not torch.equal(results[0].terms, results[2].terms)


def test_the_estimates_error_counts_the_decoders_noise():
    """A chain whose decoder varies much: the reported errors are of the size of the spread, and alike."""
    scheduler = VariationalDDPMScheduler(num_train_timesteps=30, beta_start=0.3, beta_end=0.6)
    x_start = torch.zeros(16, 1, 2, 2)

    def unet(x, t, class_labels=None, return_dict=True):
        return (0.3 * x,)

    estimates = [
        estimate_bits_per_dim(
            unet, scheduler, x_start, num_evaluations=20, levels=3, generator=torch.Generator().manual_seed(seed)
        )
        for seed in range(200)
    ]
    spread = torch.tensor([estimate.mean for estimate in estimates]).std().item()
    reported_errors = torch.tensor([estimate.sampling_error for estimate in estimates])
    assert spread * 0.8 < reported_errors.square().mean().sqrt() < spread * 1.25
    assert reported_errors.quantile(0.95) < 2 * reported_errors.quantile(0.05)
