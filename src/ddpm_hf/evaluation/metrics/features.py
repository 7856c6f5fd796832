"""The check of features that all metrics share, and their float64 form."""

from collections.abc import Iterator

import torch

from ddpm_hf.schedulers.precision import to_float64

# rows of a block
_ROWS = 4096


def check_features(name: str, features: torch.Tensor, fewest: int, dimensions: int | None = None) -> None:
    """Check that features can be measured.

    Args:
        name: what the caller calls the features, for the message.
        features: (N, D), a row per image.
        fewest: the least N.
        dimensions: D, if other features decide it.

    Raises:
        ValueError: wrong shape, too few rows, or rows that are not finite.
    """
    if features.dim() != 2 or features.shape[1] == 0 or dimensions not in (None, features.shape[1]):
        columns = "D" if dimensions is None else f"D={dimensions}"
        raise ValueError(
            f"{name} has shape {tuple(features.shape)}; give features of shape (N, {columns}), of the same extractor"
        )
    if len(features) < fewest:
        raise ValueError(f"{name} has {len(features)} features; give at least {fewest}")
    is_finite = torch.cat([rows.isfinite().all(1) for rows in features.split(_ROWS)])
    if not is_finite.all():
        bad = (~is_finite).nonzero().flatten()
        raise ValueError(
            f"{name} has features that are not finite in {len(bad)} of {len(features)} images, first in image {bad[0]};"
            " leave out images with NaN, or extract in float32"
        )


def check_pair(real: torch.Tensor, generated: torch.Tensor, fewest: int = 2) -> None:
    """Check two sets of features, which must have the same D."""
    check_features("real", real, fewest)
    check_features("generated", generated, fewest, real.shape[1])


def float64_device(device: torch.device) -> torch.device:
    """Return the device on which metrics of features on `device` are computed: not Apple's GPUs, which have no float64."""
    return device if device.type == "cuda" else torch.device("cpu")


def float64_blocks(features: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the features in float64, a block of rows at a time."""
    return (to_float64(rows) for rows in features.split(_ROWS))


def mean_of(features: torch.Tensor) -> torch.Tensor:
    """Return the mean (D,) of features (N, D), in float64."""
    return torch.stack([rows.sum(0) for rows in float64_blocks(features)]).sum(0) / len(features)
