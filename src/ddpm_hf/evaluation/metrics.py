"""Fidelity and diversity of generated images, computed from the features of any network."""

import torch

from ddpm_hf.schedulers.precision import to_float64


def frechet_distance(real: torch.Tensor, generated: torch.Tensor) -> float:
    """Fréchet distance of two normal distributions with the means and covariances of the features (Heusel et al. 2017).

    Args:
        real, generated: features (N, D) and (M, D). N and M are at least 2 and should be many times D. Computed in float64.

    Returns:
        |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)), at least 0, in the squared unit of the features.

    Raises:
        ValueError: wrong shapes, too few features, or features that are not finite.
    """
    real, generated = _features(real, generated, 2)
    difference = real.mean(0) - generated.mean(0)
    first, second = (features.T.cov().reshape(features.shape[1], -1) for features in (real, generated))
    # up to rounding, the eigenvalues of a product of two positive matrices are real and positive
    root = torch.linalg.eigvals(first @ second).real.clamp(min=0).sqrt().sum()
    return (difference @ difference + first.trace() + second.trace() - 2 * root).clamp(min=0).item()


def precision_recall(real: torch.Tensor, generated: torch.Tensor, neighbors: int = 3) -> tuple[float, float]:
    """Precision and recall of generated features (Kynkäänniemi et al. 2019, eq. 1 and 2).

    The manifold of a set of features is the union of balls around its members, each reaching to the k-th nearest neighbor in
    the set. Precision is the share of generated features in the manifold of the real ones, recall the share of real features
    in the manifold of the generated ones.

    Args:
        real, generated: features (N, D) and (M, D), ideally with N = M.
        neighbors: k; 3 in the paper.

    Returns:
        Precision and recall, each in [0, 1].

    Raises:
        ValueError: wrong shapes, features that are not finite, or a set with no more than k features.
    """
    if neighbors < 1:
        raise ValueError(f"neighbors={neighbors} must be 1 or more")
    real, generated = _features(real, generated, neighbors + 1)
    return _covered(generated, real, neighbors), _covered(real, generated, neighbors)


def _covered(points, manifold, neighbors):
    exact = "donot_use_mm_for_euclid_dist"
    within = torch.cdist(manifold, manifold, compute_mode=exact)
    radius = within.kthvalue(neighbors + 1, dim=1).values  # the nearest is the feature itself
    return (torch.cdist(points, manifold, compute_mode=exact) <= radius).any(1).double().mean().item()


def _features(real, generated, fewest):
    for name, features in (("real", real), ("generated", generated)):
        if features.dim() != 2 or features.shape[1] != real.shape[-1] or features.shape[1] == 0:
            raise ValueError(f"{name} has shape {tuple(features.shape)}; give (N, D) of the same D")
        if len(features) < fewest:
            raise ValueError(f"{name} has {len(features)} features; give at least {fewest}")
        if not features.isfinite().all():
            raise ValueError(f"{name} has features that are not finite")
    return to_float64(real), to_float64(generated)
