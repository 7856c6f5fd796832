"""The variational bound estimated from few network calls, with its standard error."""

import dataclasses
import math
from collections.abc import Callable
from numbers import Integral
from typing import NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from ddpm_hf.likelihood.bound import BoundEvaluator, standard_error
from ddpm_hf.schedulers.ddpm import VariationalDDPMScheduler
from ddpm_hf.schedulers.precision import finest_dtype, to_float64


class BitsPerDimEstimate(NamedTuple):
    """An unbiased estimate of the variational bound of each of B images, in bits per dimension."""

    total: torch.Tensor  # (B,), prior + kl + decoder
    prior: torch.Tensor  # (B,), L_T, exact
    kl: torch.Tensor  # (B,), L_1 + ... + L_{T-1}, estimated
    decoder: torch.Tensor  # (B,), L_0
    # the standard error of `mean` due to the draws of timesteps and noise alone; rough for few images
    sampling_error: float

    @property
    def mean(self) -> float:
        """The mean of `total` over the images, bits per dimension."""
        return to_float64(self.total).mean().item()

    @property
    def standard_error(self) -> float:
        """The standard error of `mean` due to images and draws together; NaN for a single image.

        The spread of `total` over the images contains both variances, but is rough for few images; it is taken to be no less
        than `sampling_error`, which all timesteps of all images determine (a variance between images is never negative).
        """
        return with_sampling_error(standard_error(self.total), self.sampling_error)


def with_sampling_error(over_images: float, sampling_error: float) -> float:
    """The standard error over images, which contains the error of the draws, at least as large as that; NaN stays NaN."""
    return over_images if math.isnan(over_images) or math.isnan(sampling_error) else max(over_images, sampling_error)


@torch.no_grad()
def estimate_bits_per_dim(
    unet: Callable,
    scheduler: VariationalDDPMScheduler,
    x_start: torch.Tensor,
    *,
    num_evaluations: int,
    class_labels: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    clip_sample: bool = True,
    batch_size: int | None = None,
    levels: int | None = None,
    progress_bar: bool = False,
) -> BitsPerDimEstimate:
    """Estimate `bits_per_dim` without bias from few network evaluations.

    L_T is exact, and L_0 is evaluated twice for each image. For the KL terms, the chain is divided into K strata, and each
    image draws one timestep in each; the draws of all images are spread evenly over a stratum. The error of the best linear
    denoiser with the same noise, whose expectation is known, serves as a control variate. A pilot run measures the spread of
    the terms that then remains; each stratum has an equal share of it.

    Args:
        num_evaluations: network evaluations per image, including the pilot run and the decoder: at least 8, and fewer than
            the chain has steps.
        unet, scheduler, x_start, class_labels, generator, clip_sample, batch_size, levels, progress_bar: as in `bits_per_dim`,
            but with batch_size=None a network call has as many rows as there are images.

    Returns:
        `BitsPerDimEstimate` on the device of x_start.

    Raises:
        ValueError: as `bits_per_dim`; num_evaluations is out of range.
    """
    evaluate = BoundEvaluator(
        unet,
        scheduler,
        x_start,
        class_labels=class_labels,
        clip_sample=clip_sample,
        levels=levels,
        batch_size=batch_size,
    )
    N, B = len(scheduler.chain), len(x_start)
    if N <= 8:
        raise ValueError(f"a chain of {N} steps needs no estimate; bits_per_dim evaluates all of them")
    if not (isinstance(num_evaluations, Integral) and 8 <= num_evaluations < N):
        raise ValueError(
            f"num_evaluations={num_evaluations} must be an integer, 8 to {N - 1}; to evaluate all {N} steps use bits_per_dim"
        )
    pilot = max(1, min(num_evaluations // 10, -(-256 // B)))
    strata = num_evaluations - pilot - 2

    def uniform(*shape):
        device = torch.device("cpu") if generator is None else generator.device
        return torch.rand(shape, generator=generator, device=device, dtype=finest_dtype(device)).cpu().double()

    with evaluate, tqdm(total=B * num_evaluations, desc="bits/dim", disable=not progress_bar or None) as bar:
        terms = _Terms(evaluate, scheduler, x_start, generator, batch_size or B, bar)
        first, _ = terms(torch.zeros(B, 2, dtype=torch.int64))
        # pilot run: positions spread evenly in their logarithm
        u = (uniform(B * pilot).argsort() + uniform(B * pilot)) / (B * pilot)
        positions = torch.exp(u * math.log(N)).long().clamp(1, N - 1).view(B, pilot)
        spread, slope = _fit_pilot(positions, *terms(positions), N - 1)
        share = _step_probabilities(spread, positions.numel())
        # each stratum has probability 1 / strata; within it, each image has a cell of its own
        u = (uniform(B, strata).argsort(dim=0) + uniform(B, strata)) / B
        u = (torch.arange(strata) + u) / strata
        positions = torch.searchsorted(share.cumsum(0), u).clamp(max=N - 2) + 1
        term, excess = terms(positions)
        estimates = (term - slope[positions - 1] * excess) / (strata * share[positions - 1])
    prior = scheduler.prior_bits_per_dim(x_start)
    kl, decoder = (bits.to(prior) for bits in (estimates.sum(1), first.mean(1)))
    variance = _variance_of_mean(estimates) + (first[:, 0] - first[:, 1]).square().mean() / (4 * B)
    return BitsPerDimEstimate(prior + kl + decoder, prior, kl, decoder, variance.sqrt().item())


@dataclasses.dataclass
class _Terms:
    """Evaluates terms of the bound at positions (B, n) in the chain: all 0, the decoder's, or none 0."""

    evaluate: BoundEvaluator
    scheduler: VariationalDDPMScheduler
    x_start: torch.Tensor
    generator: torch.Generator | None
    batch_size: int
    bar: tqdm

    def __post_init__(self):
        self.chain, self.linear = torch.tensor(self.scheduler.chain), _LinearDenoiser(self.scheduler, self.x_start)

    def __call__(self, positions):
        """The images' terms and the linear denoiser's excess errors there: (2, B, n) float64 on the CPU."""
        count, device = len(self.x_start), self.x_start.device
        index = torch.arange(count).repeat_interleave(positions.shape[1])
        results = []
        for rows, position in zip(index.split(self.batch_size), positions.flatten().split(self.batch_size)):
            rows, noise = rows.to(device), self.evaluate.noise((len(rows), *self.x_start.shape[1:]), self.generator)
            t = self.chain[position] if position.any() else int(self.chain[0])
            term, *_ = self.evaluate.at_noise(rows, t, noise)
            results.append(torch.stack((to_float64(term), self.linear.excess(rows, self.chain[position], noise))))
            self.bar.update(len(rows))
        self.evaluate.check_terms()
        return torch.cat(results, dim=1).cpu().view(2, count, -1)


def _step_probabilities(spread, pilot_count):
    """The probability with which each step after the decoder's is drawn, (steps,), from the spread of its terms.

    It is mixed with 1 / step, the shape that terms have on the whole, and with a constant, so that none is 0.
    """
    step = torch.arange(1, len(spread) + 1)
    trust = 0.94 * pilot_count / (pilot_count + 8)
    mixture = ((trust, spread), (0.97 - trust, 1 / step), (0.03, step**0))
    return sum(weight * shape / shape.sum() for weight, shape in mixture)


def _variance_of_mean(estimates):
    """The variance of the mean over images of the summed estimates (B, strata)."""
    B, strata = estimates.shape
    if B > 1:  # the draws of different images, less each image's mean, serve as repeated draws
        residual = estimates - estimates.mean(1, keepdim=True)
        return strata / (strata - 1) * residual.var(0).sum() / B
    # deviations from the line between neighboring strata, too large where the terms are curved
    deviation = estimates[:, 1:-1] - (estimates[:, :-2] + estimates[:, 2:]) / 2
    return strata * deviation.square().mean() / 1.5


def _fit_pilot(positions, terms, excess, steps):
    """The spread of the terms and their slope in the excess error, each (steps,), at positions 1 to steps."""
    order = positions.flatten().argsort()
    x, y, excess = (values.flatten()[order] for values in (positions.log(), terms, excess))
    grid = torch.arange(1, steps + 1).log()

    def root_mean_square(values, sections):
        """The root mean square of values, which are sorted by x, as a function of x."""
        centers = torch.stack([part.mean() for part in x.tensor_split(sections)])
        sizes = (
            torch.stack([part.square().mean() for part in values.tensor_split(sections)]).clamp(min=1e-30).sqrt().log()
        )
        return lambda log_position: torch.from_numpy(
            np.exp(np.interp(log_position.numpy(), centers.numpy(), sizes.numpy()))
        )

    size = root_mean_square(y, max(1, min(20, len(x) // 2)))
    if len(x) < 32:  # too few for a spread, which is taken to be proportional to the terms
        return size(grid), torch.zeros(steps, dtype=torch.float64)
    # term / size = 1 + (a + b log(position)) excess + residual
    relative = y / size(x)
    controls = torch.stack((excess, excess * x), dim=1)
    gain = torch.linalg.lstsq(controls, (relative - relative.mean())[:, None]).solution
    residual = root_mean_square(relative - relative.mean() - (controls @ gain).flatten(), max(4, min(10, len(x) // 16)))
    return size(grid) * residual(grid).clamp(min=0.02), size(grid) * (gain[0] + gain[1] * grid)


class _LinearDenoiser:
    """The linear denoiser with the least squared error for Gaussian data with the images' mean and (shrunk) covariance."""

    def __init__(self, scheduler, x_start):
        self.alphas_cumprod = scheduler.alphas_cumprod.double()
        images = to_float64(x_start[:512].flatten(1))  # enough to estimate a covariance
        _, values, self.directions = torch.linalg.svd(images - images.mean(0), full_matrices=False)
        self.x_start = (to_float64(x_start.flatten(1)) - images.mean(0)) @ self.directions.T
        # shrinkage: one more image, whose variance is the same in all directions
        self.residual_variance = images.var(correction=0) / (len(images) + 1)
        self.variances = values.square() / (len(images) + 1) + self.residual_variance

    def excess(self, index, t, noise):
        """Its squared error with this noise, divided by the expectation over noise, minus 1: (rows,).

        For images after the first 512 only the error in the span of those is counted, which serves as a control variate too.
        """
        noise = to_float64(noise.flatten(1))
        alpha, index = self.alphas_cumprod[t][:, None].to(noise.device), index.to(noise.device)
        keep, add = alpha.sqrt(), (1 - alpha).sqrt()
        along = noise @ self.directions.T
        beyond = noise.square().sum(1, keepdim=True) - along.square().sum(1, keepdim=True)
        dimensions = noise.shape[1] - len(self.variances)
        gain, residual_gain = (keep * v / (alpha * v + 1 - alpha) for v in (self.variances, self.residual_variance))
        bias, scale = (gain * keep - 1) * self.x_start[index], gain * add
        expected = (bias.square() + scale.square()).sum(1) + dimensions * (residual_gain * add).square()[:, 0]
        error = (bias + scale * along).square().sum(1) + (beyond * (residual_gain * add).square())[:, 0]
        return (error - expected) / expected.clamp(min=1e-30)
