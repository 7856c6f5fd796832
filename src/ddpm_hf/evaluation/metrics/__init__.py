"""Fidelity and diversity of generated images, computed from the features of any network."""

from ddpm_hf.evaluation.metrics.estimate import Estimate
from ddpm_hf.evaluation.metrics.frechet import Moments, frechet_at_infinity, frechet_distance, frechet_error
from ddpm_hf.evaluation.metrics.inception_score import inception_score
from ddpm_hf.evaluation.metrics.kernel import KernelDistance, kernel_distance
from ddpm_hf.evaluation.metrics.manifold import (
    ManifoldComparison,
    compare_manifolds,
    nearest_neighbors,
    precision_recall,
)

__all__ = [
    "Estimate",
    "KernelDistance",
    "ManifoldComparison",
    "Moments",
    "compare_manifolds",
    "frechet_at_infinity",
    "frechet_distance",
    "frechet_error",
    "inception_score",
    "kernel_distance",
    "nearest_neighbors",
    "precision_recall",
]
