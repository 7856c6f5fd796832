"""Pictures of the quality of samples: beside the real images nearest to them, and the most and the least typical ones."""

import torch
from PIL import Image

from ddpm_hf.evaluation.features.reference import Reference
from ddpm_hf.evaluation.image_sets import ImageSet
from ddpm_hf.evaluation.metrics.manifold import ManifoldComparison, nearest_neighbors
from ddpm_hf.evaluation.report_folder import PICTURES
from ddpm_hf.evaluation.sheets import as_sheet

SAMPLES, NEIGHBORS = 8, 5  # rows, and real images in each
EXTREMES = 16  # samples of each kind
COLUMNS = 8


def quality_pictures(
    generated: ImageSet,
    real: ImageSet | None,
    reference: Reference,
    features: torch.Tensor,
    comparison: ManifoldComparison | None,
) -> dict[str, Image.Image]:
    """Make the pictures of a report.

    Args:
        generated, real: the images; None if the real ones are not at hand.
        reference, features: features of the real images, and (N, D) of the generated ones.
        comparison: their manifolds; None without precision.

    Returns:
        File name -> picture. Samples that are much nearer to a real image than real images are to each other are copies.
    """
    pictures = {}
    if real is not None and reference.features is not None and reference.count == len(real):
        count, nearest = min(SAMPLES, len(generated)), min(NEIGHBORS, len(real))
        rows = torch.linspace(0, len(generated) - 1, count).long().tolist()
        _, indices = nearest_neighbors(features[rows], reference.features, nearest)
        images = [
            image
            for row, neighbors in zip(rows, indices.tolist())
            for image in (_image(generated, row), *(_image(real, neighbor) for neighbor in neighbors))
        ]
        captions = ["generated", "nearest real", *[""] * (nearest - 1)] * count
        pictures[PICTURES[0]] = as_sheet(images, 1 + nearest, captions)
    if comparison is not None:
        order = comparison.distance_ratio.argsort().tolist()
        best, worst = order[:EXTREMES], order[-EXTREMES:][::-1]
        images = [_image(generated, row) for row in (*best, *worst)]
        captions = _block("most typical", len(best)) + _block("least typical", len(worst))
        pictures[PICTURES[1]] = as_sheet(images, COLUMNS, captions)
    return pictures


def _block(caption, count):
    """One caption above rows of `COLUMNS` images."""
    return [caption if i % COLUMNS == 0 else "" for i in range(count)]


def _image(images: ImageSet, row: int) -> Image.Image:
    pixels = images.read(range(row, row + 1))[0].permute(1, 2, 0).squeeze(-1).numpy()
    return Image.fromarray(pixels)
