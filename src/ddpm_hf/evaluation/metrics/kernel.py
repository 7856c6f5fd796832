"""Kernel distance (KID with Inception features)."""

import math
from typing import NamedTuple

import torch

from ddpm_hf.evaluation.metrics.estimate import Estimate
from ddpm_hf.evaluation.metrics.features import check_pair
from ddpm_hf.schedulers.precision import to_float64


class KernelDistance(NamedTuple):
    """The kernel distance, and how it was computed.

    Attributes:
        estimate: the distance and its standard error.
        subsets, subset_size: the number of subsets, and of images in each.
        note: what was changed because there are few images, in one line; None if nothing.
    """

    estimate: Estimate
    subsets: int
    subset_size: int
    note: str | None


def kernel_distance(
    real: torch.Tensor,
    generated: torch.Tensor,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    generator: torch.Generator | None = None,
) -> KernelDistance:
    """Kernel distance: the squared maximum mean discrepancy with the kernel (x.y/D + 1)^3 (Bińkowski et al. 2018).

    The mean of unbiased estimates from random subsets, so it can be negative. Torch-fidelity and torchmetrics return the same
    mean, beside it the standard deviation of the subsets, which is no error of the mean.

    The standard error is that of the mean over fresh sets of real and generated images. With the terms of Hoeffding's
    decomposition of the kernel, estimated in the subsets, its square is
    4 Var[a(x)]/N + 4 Var[b(y)]/M + 2 E[k_xx^2]/N^2 + 2 E[k_yy^2]/M^2 + 4 E[k_xy^2]/(N M) + Var[subsets]/subsets.
    Here a(x) = E[k(x, x')] - E[k(x, y)], b(y) likewise, and k_xx, k_yy, k_xy are the doubly centered kernels.

    Args:
        real, generated: features (N, D) and (M, D); N and M are at least 4. Computed in float64, on the device of `generated`.
        subsets: number of subsets.
        subset_size: number of images in a subset, lowered to N or M if that is smaller.
        generator: a generator on the CPU, which draws the subsets; by default torch's global one.

    Raises:
        ValueError: wrong shapes, too few features, features that are not finite, or numbers out of range.
    """
    if subsets < 1 or subset_size < 4:
        raise ValueError(f"subsets={subsets} must be 1 or more and subset_size={subset_size} 4 or more")
    check_pair(real, generated, 4)
    counts = len(real), len(generated)
    size = min(subset_size, *counts)
    note = None
    if size < subset_size:
        note = f"subset_size={subset_size} was lowered to {size}; there are {counts[0]} real and {counts[1]} generated images"
    if size == max(counts):
        subsets = 1  # all subsets are the same
    terms = torch.empty(subsets, 6, dtype=torch.float64)
    for subset_terms in terms:
        real_rows, generated_rows = (torch.randperm(count, generator=generator)[:size] for count in counts)
        x, y = to_float64(real[real_rows.to(real.device)]), to_float64(generated[generated_rows.to(generated.device)])
        subset_terms.copy_(_subset_terms(x.to(y.device), y))
    values, first_x, first_y, second_xx, second_yy, second_xy = terms.T
    n, m = counts
    variance = (
        4 * first_x.mean().clamp(min=0) / n
        + 4 * first_y.mean().clamp(min=0) / m
        + 2 * second_xx.mean() / n**2
        + 2 * second_yy.mean() / m**2
        + 4 * second_xy.mean() / (n * m)
        + (values.var() / subsets if subsets > 1 else 0)
    )
    return KernelDistance(Estimate(values.mean().item(), math.sqrt(variance)), subsets, size, note)


def _subset_terms(x, y):
    """The distance of a subset; Var[a(x)], Var[b(y)]; E[k_xx^2], E[k_yy^2], E[k_xy^2]."""
    n = len(x)
    xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    rows_xx, rows_yy = ((k.sum(1) - k.diagonal()) / (n - 1) for k in (xx, yy))
    value = rows_xx.mean() + rows_yy.mean() - 2 * xy.mean()
    second_xx, second_yy = (_within(k, rows) for k, rows in ((xx, rows_xx), (yy, rows_yy)))
    centered = xy - xy.mean(0) - xy.mean(1, keepdim=True) + xy.mean()
    second_xy = centered.square().sum() / (n - 1) ** 2
    # a row's mean over the subset has the noise of the centered kernels, which is no part of a(x)
    noise = second_xy / n
    first_x = (rows_xx - xy.mean(1)).var() - second_xx / (n - 1) - noise
    first_y = (rows_yy - xy.mean(0)).var() - second_yy / (n - 1) - noise
    return torch.stack((value, first_x, first_y, second_xx, second_yy, second_xy))


def _within(kernel, rows):
    """E[k_xx^2] of a symmetric kernel whose rows have these means without the diagonal."""
    n = len(kernel)
    effects = (rows - rows.mean()) * ((n - 1) / (n - 2))
    centered = kernel - effects - effects[:, None] - rows.mean()
    centered.fill_diagonal_(0)
    return centered.square().sum() / (n * (n - 3))
