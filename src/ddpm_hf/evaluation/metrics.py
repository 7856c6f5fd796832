"""Fidelity and diversity of generated images, in the features of whatever network the caller trusts."""

import torch

from ddpm_hf.schedulers.precision import to_float64


def frechet_distance(real: torch.Tensor, generated: torch.Tensor) -> float:
    """Fréchet distance of two normal distributions with the means and covariances of the features (Heusel et al. 2017).

    Args:
        real, generated: features (N, D) and (M, D), N and M 2 or more, better many times D; computed in float64.

    Returns:
        |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)), 0 or more, in the squared unit of the features.

    Raises:
        ValueError: wrong shapes, too few.
    """
    real, generated = _features(real, generated, 2)
    difference = real.mean(0) - generated.mean(0)
    first, second = (features.T.cov().reshape(features.shape[1], -1) for features in (real, generated))
    # of a product of two positive matrices the eigenvalues are real and positive, but for rounding
    root = torch.linalg.eigvals(first @ second).real.clamp(min=0).sqrt().sum()
    return (difference @ difference + first.trace() + second.trace() - 2 * root).clamp(min=0).item()


def precision_recall(real: torch.Tensor, generated: torch.Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Precision and recall of the manifolds of features (Kynkäänniemi et al. 2019, eq. 1 and 2).

    A set's manifold is the union of balls about its features, each as far as its k-th nearest neighbor in the set. Precision
    is the share of generated features within that of the real ones, recall the share of real ones within that of the generated.

    Args:
        real, generated: features (N, D) and (M, D); best as many of each.
        neighbours: k; 3 in the paper.

    Raises:
        ValueError: wrong shapes; no more features than nearest neighbors.
    """
    if neighbours < 1:
        raise ValueError(f"neighbours={neighbours} must be 1 or more")
    real, generated = _features(real, generated, neighbours + 1)
    return _covered(generated, real, neighbours), _covered(real, generated, neighbours)


def _covered(points, manifold, neighbours):
    exact = "donot_use_mm_for_euclid_dist"
    within = torch.cdist(manifold, manifold, compute_mode=exact)
    radius = within.kthvalue(neighbours + 1, dim=1).values  # the first is itself
    return (torch.cdist(points, manifold, compute_mode=exact) <= radius).any(1).double().mean().item()


def _features(real, generated, least):
    for name, features in (("real", real), ("generated", generated)):
        if features.dim() != 2 or features.shape[1] != real.shape[-1] or features.shape[1] == 0:
            raise ValueError(f"{name} has shape {tuple(features.shape)}; give (N, D) of the same D")
        if len(features) < least:
            raise ValueError(f"{name} has {len(features)} features; {least} at least are needed")
        if not features.isfinite().all():
            raise ValueError(f"{name} has features that are not finite")
    return to_float64(real), to_float64(generated)
