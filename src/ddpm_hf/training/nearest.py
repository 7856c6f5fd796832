"""The training images that are nearest to samples: much smaller distances than among images mean memorized samples."""

import math

import torch

from ddpm_hf.data.pixels import pixels_to_batch

MAX_PAIRS = 32
VALUES_AT_ONCE = 2**24  # of the data, as float32


class NearestImages:
    """Finds nearest neighbors by the root mean square distance of pixels in [-1, 1].

    Args:
        pixels: (N, C, H, W), grey levels of the data.
        flips: whether an image and its mirror image are the same, as in training with random_flip.
    """

    def __init__(self, pixels: torch.Tensor, levels: int, device: torch.device, flips: bool):
        self.pixels, self.levels, self.device, self.flips = pixels, levels, device, flips
        self._distance_of_data: float | None = None

    def search(self, x_start: torch.Tensor, exclude: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Distances (B,) to the nearest images, and their indices (B,); `exclude` is an index for each that is left out."""
        count, views = len(x_start), (x_start, x_start.flip(-1)) if self.flips else (x_start,)
        queries, best, indices = torch.cat(views).flatten(1).to(self.device), [], []
        count_at_once = max(1, VALUES_AT_ONCE // queries.shape[1])
        for start in range(0, len(self.pixels), count_at_once):
            part = self.pixels[start : start + count_at_once].to(self.device)
            part = pixels_to_batch(part, self.levels).flatten(1)
            distances = torch.cdist(queries, part).view(len(views), count, -1).amin(0)
            if exclude is not None:
                rows = ((exclude >= start) & (exclude < start + len(part))).nonzero()[:, 0]
                distances[rows, exclude[rows] - start] = math.inf
            smallest, index = distances.min(1)
            best.append(smallest.cpu())
            indices.append(index.cpu() + start)
        smallest, part = torch.stack(best).min(0)
        return smallest / queries.shape[1] ** 0.5, torch.stack(indices).gather(0, part[None])[0]

    def compare(self, x_start: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Samples beside their nearest images (P, C, H, 2 W), the most alike first, and the median of all distances."""
        distances, indices = self.search(x_start)
        first = distances.argsort()[:MAX_PAIRS]
        images = pixels_to_batch(self.pixels[indices[first]], self.levels)
        return torch.cat((x_start[first], images), dim=-1), distances.median().item()

    def distance_of_data(self, count: int) -> float:
        """The median distance of `count` images of the data to the nearest other ones; computed once."""
        if self._distance_of_data is None:
            few = torch.randperm(len(self.pixels), generator=torch.Generator().manual_seed(0))[:count]
            distances, _ = self.search(pixels_to_batch(self.pixels[few], self.levels), exclude=few)
            self._distance_of_data = distances.median().item()
        return self._distance_of_data
