"""Diagonal Gaussians: their KL divergence, and the discretized decoder L_0 (Ho, Jain, Abbeel 2020, eq. 13)."""

import math
from typing import NamedTuple

import torch


class Gaussian(NamedTuple):
    """A diagonal Gaussian over images: each field has the shape of the images.

    `pred_original_sample` is the prediction of x_0 behind it, for p(x_{t-1} | x_t) alone.
    """

    mean: torch.Tensor
    variance: torch.Tensor
    log_variance: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


def discretized_gaussian_log_likelihood(
    x: torch.Tensor, mean: torch.Tensor, log_scale: torch.Tensor, levels: int = 256
) -> torch.Tensor:
    """log of the probability that a Gaussian gives to the bin of each grey level: the decoder L_0, eq. 13.

    The grey levels stand at 2 * level / (levels - 1) - 1; bins are as wide as their distance, the outermost two open. The
    bin of x is that of its nearest level. Computed in float64 by exact log-CDFs (no tanh approximation, no floor), so that
    far tails are large finite numbers with finite gradients.

    Args:
        x: the data, values on the grid of the grey levels in [-1, 1], any shape.
        mean: of the Gaussian, broadcastable to x.
        log_scale: log of its standard deviation, broadcastable to x.
        levels: number of grey levels, 2 at least (256 for 8-bit images).

    Returns:
        Nats, elementwise (0 or below), of the dtype of `mean`, float32 at least.

    Raises:
        ValueError: levels below 2.
    """
    if levels < 2:
        raise ValueError(f"levels={levels!r}: the data needs two grey levels at least")
    dtype = torch.promote_types(mean.dtype, torch.float32)
    device = mean.device
    if device.type == "mps":  # Apple's GPUs have no float64, and torch no log_ndtr for them
        x, mean, log_scale = x.cpu(), mean.cpu(), log_scale.cpu()
    x, mean, log_scale = x.double(), mean.double(), log_scale.double()
    half_bin = 1 / (levels - 1)
    centered, inverse_scale = x - mean, torch.exp(-log_scale)
    upper = (centered + half_bin) * inverse_scale
    lower = (centered - half_bin) * inverse_scale
    # By symmetry the bin is taken on the left of the mean, where log Phi does not cancel.
    flip = centered > 0
    left, right = torch.where(flip, -upper, lower), torch.where(flip, -lower, upper)
    log_right = torch.special.log_ndtr(right)
    # log(Phi(right) - Phi(left))
    inner = log_right + torch.log(-torch.expm1(torch.special.log_ndtr(left) - log_right))
    log_likelihood = torch.where(
        x < -1 + half_bin,
        torch.special.log_ndtr(upper),
        torch.where(x > 1 - half_bin, torch.special.log_ndtr(-lower), inner),
    )
    return log_likelihood.to(device, dtype)


def gaussian_kl(mean1, log_variance1, mean2, log_variance2) -> torch.Tensor:
    """KL(N(mean1, exp(log_variance1)) || N(mean2, exp(log_variance2))), elementwise, in nats."""
    ratio = log_variance1 - log_variance2
    # expm1(r) - r in place of exp(r) - 1 - r: nearly equal variances do not cancel
    return 0.5 * (torch.expm1(ratio) - ratio + (mean1 - mean2) ** 2 * torch.exp(-log_variance2))


def nats_to_bits_per_dim(nats):
    return nats.flatten(1).mean(1) / math.log(2)
