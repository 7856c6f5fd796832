"""Diagonal Gaussians: their KL divergence, and the discretized decoder L_0 (Ho, Jain, Abbeel 2020, eq. 13)."""

import math
from typing import NamedTuple

import torch

from ddpm_hf.schedulers.precision import in_working_precision, to_float64


class Gaussian(NamedTuple):
    """A diagonal Gaussian over images; each field has the shape of the images.

    p(x_{t-1} | x_t) also holds the predicted x_0 that its mean was computed from, `pred_original_sample`.
    """

    mean: torch.Tensor
    variance: torch.Tensor
    log_variance: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


def discretized_gaussian_log_likelihood(
    x: torch.Tensor, mean: torch.Tensor, log_scale: torch.Tensor, levels: int = 256
) -> torch.Tensor:
    """Log-probability that a Gaussian assigns to the bin of each grey level: the decoder L_0, eq. 13.

    The grey levels lie at 2 * level / (levels - 1) - 1. Each bin is as wide as the distance of two levels; the first bin
    extends to minus infinity, the last to infinity. A value belongs to the bin of its nearest level. Exact log-CDFs in float64
    (no tanh approximation, no floor) keep far tails finite, with finite gradients.

    Args:
        x: the data, any shape, on the grid of the grey levels in [-1, 1].
        mean: mean of the Gaussian, broadcastable to x.
        log_scale: logarithm of its standard deviation, broadcastable to x.
        levels: number of grey levels, at least 2 (256 for 8-bit images).

    Returns:
        Nats, elementwise, at most 0, in the dtype of `mean` or in float32 if that is of half precision.

    Raises:
        ValueError: levels is below 2.
    """
    if levels < 2:
        raise ValueError(f"levels={levels!r} must be 2 or more: the number of grey levels of the data")
    dtype, device = in_working_precision(mean).dtype, mean.device
    x, mean, log_scale = to_float64(x), to_float64(mean), to_float64(log_scale)
    half_bin = 1 / (levels - 1)
    centered, inverse_scale = x - mean, torch.exp(-log_scale)
    upper = (centered + half_bin) * inverse_scale
    lower = (centered - half_bin) * inverse_scale
    # By symmetry each bin is taken to the left of the mean, where the difference of two log Phi does not cancel.
    flip = centered > 0
    bin_start, bin_end = torch.where(flip, -upper, lower), torch.where(flip, -lower, upper)
    log_cdf_end = torch.special.log_ndtr(bin_end)
    # log(Phi(bin_end) - Phi(bin_start))
    inner = log_cdf_end + torch.log(-torch.expm1(torch.special.log_ndtr(bin_start) - log_cdf_end))
    log_likelihood = torch.where(
        x < -1 + half_bin,
        torch.special.log_ndtr(upper),
        torch.where(x > 1 - half_bin, torch.special.log_ndtr(-lower), inner),
    )
    return log_likelihood.to(device, dtype)


def gaussian_kl(
    mean1: torch.Tensor, log_variance1: torch.Tensor, mean2: torch.Tensor, log_variance2: torch.Tensor
) -> torch.Tensor:
    """KL divergence of N(mean1, exp(log_variance1)) from N(mean2, exp(log_variance2)), elementwise, in nats."""
    ratio = log_variance1 - log_variance2
    # expm1(r) - r equals exp(r) - 1 - r, but does not cancel for nearly equal variances
    return 0.5 * (torch.expm1(ratio) - ratio + (mean1 - mean2) ** 2 * torch.exp(-log_variance2))


def nats_to_bits_per_dim(nats: torch.Tensor) -> torch.Tensor:
    """Bits per dimension (B,) of nats (B, C, H, W)."""
    return nats.flatten(1).mean(1) / math.log(2)
