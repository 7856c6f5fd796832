"""The variational bound estimated from few network calls, with its standard error."""

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
    """An unbiased estimate of the bound of each of B images, in bits per dimension."""

    total: torch.Tensor  # (B,), prior + kl + decoder
    prior: torch.Tensor  # (B,), L_T, exact
    kl: torch.Tensor  # (B,), L_1 + ... + L_{T-1}, estimated
    decoder: torch.Tensor  # (B,), L_0
    # the standard error of `mean` by the draws of timesteps and noise, for the bound of these B images; rough for a few
    sampling_error: float

    @property
    def mean(self) -> float:
        """The mean of `total` over the images, bits per dimension."""
        return to_float64(self.total).mean().item()

    @property
    def standard_error(self) -> float:
        """The standard error of `mean` over images and draws together; NaN for a single image."""
        return standard_error(self.total)


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
    """An unbiased estimate of `bits_per_dim` from few network evaluations.

    L_T is exact and L_0 is always evaluated (twice). Of the KL terms each image draws one timestep in each of K strata; the
    images' draws in a stratum are spread evenly over it. The error that the same noise costs the best linear denoiser has a
    known expectation: what the terms owe to it is taken off (a control variate). The strata hold equal shares of the spread
    that then is left, as a pilot run finds it.

    Args:
        num_evaluations: network evaluations an image, pilot and decoder included: 8 to below the length of the chain.
        unet, scheduler, x_start, class_labels, generator, clip_sample, batch_size, levels, progress_bar: as in `bits_per_dim`;
            batch_size None stands for as many rows a call as there are images.

    Returns:
        `BitsPerDimEstimate` on the device of x_start.

    Raises:
        ValueError: as `bits_per_dim`; num_evaluations out of its range.
    """
    evaluate = BoundEvaluator(unet, scheduler, x_start, class_labels, clip_sample, levels, batch_size)
    N, B = len(scheduler.chain), len(x_start)
    if N <= 8:
        raise ValueError(f"a chain of {N} steps needs no estimate; bits_per_dim evaluates all of them")
    if not (isinstance(num_evaluations, Integral) and 8 <= num_evaluations < N):
        raise ValueError(
            f"num_evaluations={num_evaluations} must be an integer, 8 to {N - 1}; to evaluate all {N} steps use bits_per_dim"
        )
    chain = torch.tensor(scheduler.chain)
    linear = _LinearDenoiser(scheduler, x_start)
    pilot = max(1, min(num_evaluations // 10, -(-256 // B)))
    strata = num_evaluations - pilot - 2

    def uniform(*shape):
        device = torch.device("cpu") if generator is None else generator.device
        return torch.rand(shape, generator=generator, device=device, dtype=finest_dtype(device)).cpu().double()

    def terms(positions):
        """Each image's term at its (B, n) positions in the chain, 0 alone or not at all, and the excess their noise costs."""
        index = torch.arange(B).repeat_interleave(positions.shape[1])
        found = []
        for rows, at in zip(index.split(batch_size or B), positions.flatten().split(batch_size or B)):
            rows, noise = rows.to(x_start.device), evaluate.noise((len(rows), *x_start.shape[1:]), generator)
            t = chain[at] if at.any() else int(chain[0])
            term, *_ = evaluate.at_noise(rows, t, noise)
            found.append(torch.stack((to_float64(term), linear.excess(rows, chain[at], noise))))
            bar.update(len(rows))
        evaluate.check_terms()
        return torch.cat(found, dim=1).cpu().view(2, B, -1)

    with evaluate, tqdm(total=B * num_evaluations, desc="bits/dim", disable=not progress_bar or None) as bar:
        first, _ = terms(torch.zeros(B, 2, dtype=torch.int64))
        # the pilot: positions spread evenly in their logarithm, over which the terms change evenly
        u = (uniform(B * pilot).argsort() + uniform(B * pilot)) / (B * pilot)
        at = torch.exp(u * math.log(N)).long().clamp(1, N - 1).view(B, pilot)
        spread, slope = _fit_pilot(at, *terms(at), N - 1)
        step = torch.arange(1, N)
        # 1 / step is what the terms are like before anything is known; no step is left without a chance
        trust = 0.94 * at.numel() / (at.numel() + 8)
        parts = ((trust, spread), (0.97 - trust, 1 / step), (0.03, step**0))
        share = sum(weight * part / part.sum() for weight, part in parts)
        # each stratum has 1 / strata of the probability, each image a cell of its own in it
        u = (uniform(B, strata).argsort(dim=0) + uniform(B, strata)) / B
        u = (torch.arange(strata) + u) / strata
        at = torch.searchsorted(share.cumsum(0), u).clamp(max=N - 2) + 1
        term, excess = terms(at)
        drawn = (term - slope[at - 1] * excess) / (strata * share[at - 1])
    prior = scheduler.prior_bits_per_dim(x_start)
    kl, decoder = (part.to(prior) for part in (drawn.sum(1), first.mean(1)))
    if B > 1:  # the images' draws in a stratum stand for repeated ones, but for what an image costs on the whole
        rest = drawn - drawn.mean(1, keepdim=True)
        variance = strata / (strata - 1) * rest.var(0).sum() / B
    else:  # a stratum's draw for the line between its neighbors', too much where that is curved
        off = drawn[:, 1:-1] - (drawn[:, :-2] + drawn[:, 2:]) / 2
        variance = strata * off.square().mean() / 1.5
    variance = variance + (first[:, 0] - first[:, 1]).square().mean() / (4 * B)
    return BitsPerDimEstimate(prior + kl + decoder, prior, kl, decoder, variance.sqrt().item())


def _fit_pilot(positions, terms, excess, steps):
    """At positions 1 .. steps the spread of the terms and what they gain with excess, both by log(position)."""
    order = positions.flatten().argsort()
    x, y, excess = (values.flatten()[order] for values in (positions.log(), terms, excess))
    grid = torch.arange(1, steps + 1).log()

    def root_mean_square(values, parts):
        """Of values sorted by x: a function of x."""
        centers = torch.stack([part.mean() for part in x.tensor_split(parts)])
        sizes = torch.stack([part.square().mean() for part in values.tensor_split(parts)]).clamp(min=1e-30).sqrt().log()
        return lambda at: torch.from_numpy(np.exp(np.interp(at.numpy(), centers.numpy(), sizes.numpy())))

    size = root_mean_square(y, max(1, min(20, len(x) // 2)))
    if len(x) < 32:  # too few for a spread: take it in proportion to the size
        return size(grid), torch.zeros(steps, dtype=torch.float64)
    # term / size = 1 + (a + b log(position)) excess + rest
    relative = y / size(x)
    controls = torch.stack((excess, excess * x), dim=1)
    gain = torch.linalg.lstsq(controls, (relative - relative.mean())[:, None]).solution
    rest = root_mean_square(relative - relative.mean() - (controls @ gain).flatten(), max(4, min(10, len(x) // 16)))
    return size(grid) * rest(grid).clamp(min=0.02), size(grid) * (gain[0] + gain[1] * grid)


class _LinearDenoiser:
    """The linear denoiser of least squared error for Gaussian data with the images' mean and (shrunk) covariance."""

    def __init__(self, scheduler, x_start):
        self.alphas_cumprod = scheduler.alphas_cumprod.double()
        images = to_float64(x_start[:512].flatten(1))  # enough for a covariance
        _, values, self.directions = torch.linalg.svd(images - images.mean(0), full_matrices=False)
        self.x_start = (to_float64(x_start.flatten(1)) - images.mean(0)) @ self.directions.T
        # the rest of the space has the weight of one image whose pixels vary alike
        self.rest = images.var(correction=0) / (len(images) + 1)
        self.variances = values.square() / (len(images) + 1) + self.rest

    def excess(self, index, t, noise):
        """(rows,): its squared error with this noise, relative to the expectation over noise, less 1.

        Of images beyond the first 512 it is the error in the plane of those: as good for a control variate.
        """
        noise = to_float64(noise.flatten(1))
        alpha, index = self.alphas_cumprod[t][:, None].to(noise.device), index.to(noise.device)
        keep, add = alpha.sqrt(), (1 - alpha).sqrt()
        along = noise @ self.directions.T
        beyond = noise.square().sum(1, keepdim=True) - along.square().sum(1, keepdim=True)
        dimensions = noise.shape[1] - len(self.variances)
        gain, rest = (keep * v / (alpha * v + 1 - alpha) for v in (self.variances, self.rest))
        bias, scale = (gain * keep - 1) * self.x_start[index], gain * add
        expected = (bias.square() + scale.square()).sum(1) + dimensions * (rest * add).square()[:, 0]
        error = (bias + scale * along).square().sum(1) + (beyond * (rest * add).square())[:, 0]
        return (error - expected) / expected.clamp(min=1e-30)
