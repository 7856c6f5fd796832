"""Fréchet distance (FID with Inception features), its error, and its limit for infinitely many generated images."""

import dataclasses
import math

import torch

from ddpm_hf.evaluation.metrics.estimate import Estimate
from ddpm_hf.evaluation.metrics.features import check_features, float64_blocks, mean_of
from ddpm_hf.schedulers.precision import to_float64


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Mean and covariance of features, which is all that the Fréchet distance needs.

    Attributes:
        count: number N of images; None if unknown, as in the statistics files of pytorch-fid.
        mean: (D,), float64.
        covariance: (D, D), float64, divided by N - 1 as by `numpy.cov`, pytorch-fid and ADM; zero if N is 1.
    """

    count: int | None
    mean: torch.Tensor
    covariance: torch.Tensor

    @classmethod
    def of(cls, features: torch.Tensor, name: str = "features") -> "Moments":
        """Compute the moments of features (N, D) on their device, in two passes over blocks of rows.

        Raises:
            ValueError: wrong shape, no rows, or features that are not finite; the message calls them `name`.
        """
        check_features(name, features, 1)
        mean = mean_of(features)
        scatter = torch.zeros(len(mean), len(mean), dtype=mean.dtype, device=mean.device)
        for rows in float64_blocks(features):
            centered = rows - mean
            scatter.addmm_(centered.T, centered)
        return cls(len(features), mean, scatter / max(len(features) - 1, 1))

    def merge(self, other: "Moments") -> "Moments":
        """Return the moments of the union of two sets of images (Chan, Golub and LeVeque 1979).

        Only differences of means are squared, so large means cost no digits.

        Raises:
            ValueError: a count is unknown.
        """
        if self.count is None or other.count is None:
            raise ValueError("moments of an unknown number of images cannot be merged; compute them from features")
        count = self.count + other.count
        difference = other.mean.to(self.mean.device) - self.mean
        scatter = self.covariance * (self.count - 1)
        scatter += other.covariance.to(scatter.device) * (other.count - 1)
        scatter.addr_(difference, difference, alpha=self.count * other.count / count)
        return Moments(count, self.mean + difference * (other.count / count), scatter / max(count - 1, 1))

    def to(self, device: torch.device) -> "Moments":
        """Return the moments on a device."""
        return Moments(self.count, self.mean.to(device), self.covariance.to(device))

    @property
    def dimensions(self) -> int:
        """D, the number of features of an image."""
        return len(self.mean)

    @property
    def is_singular(self) -> bool:
        """Whether there are too few images for a covariance of full rank."""
        return self.count is not None and self.count <= self.dimensions

    @property
    def advice(self) -> str | None:
        """What to do about a singular covariance, in one line; None if there are enough images."""
        if not self.is_singular:
            return None
        return (
            f"{self.count} images for {self.dimensions} features: the covariance is singular and the Fréchet distance far "
            f"too large; use more than {self.dimensions} images, or an extractor with fewer features"
        )


def frechet_distance(real: torch.Tensor | Moments, generated: torch.Tensor | Moments) -> float:
    """Fréchet distance of two normal distributions with the means and covariances of the features (Heusel et al. 2017).

    Computed in float64, from eigendecompositions of both covariances without regularization. With the square roots
    C = F F^T, C' = F' F'^T, tr (C C')^(1/2) is the sum of the singular values of F^T F'. In contrast to the square roots of
    the eigenvalues of C C', they keep all digits where a covariance is singular.

    Args:
        real, generated: features (N, D) and (M, D), or their moments. N and M are at least 2 and should be many times D.

    Returns:
        |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)), at least 0, in the squared unit of the features.

    Raises:
        ValueError: wrong shapes, too few features, or features that are not finite.
    """
    first, second = _as_moments("real", real), _as_moments("generated", generated)
    _check_dimensions(first.dimensions, second.dimensions)
    first = first.to(second.mean.device)
    root = torch.linalg.svdvals(_square_root(first.covariance).T @ _square_root(second.covariance)).sum()
    return _distance(first, second, root).clamp(min=0).item()


def frechet_error(
    real: torch.Tensor | Moments,
    generated: torch.Tensor,
    *,
    groups: int = 32,
    generator: torch.Generator | None = None,
) -> float:
    """Standard error of the Fréchet distance over fresh sets of generated images; the real moments count as exact.

    The delete-a-group jackknife: the images are divided at random into groups, and the distance is computed without each of
    them in turn. A bootstrap draws images more than once, so fewer different ones, and counts the larger bias of its
    distances as spread: several times the error where there are few images per feature. The jackknife errs on the large
    side only where the distance is hardly more than bias, by less than a factor of 2.

    Args:
        real, generated: as for `frechet_distance`, generated as features.
        groups: number of groups. Each costs an eigendecomposition and the memory of a covariance. The error is itself known
            to a relative 1/sqrt(2 (groups - 1)): 13 % for 32.
        generator: a generator on the CPU, which draws the groups.

    Raises:
        ValueError: as `frechet_distance`; fewer than 2 groups; fewer features than groups.
    """
    parts = _Groups.of(generated, groups, generator)
    return _jackknife(_Reference(real, parts), parts)


def frechet_at_infinity(
    real: torch.Tensor | Moments,
    generated: torch.Tensor,
    *,
    sizes: int = 15,
    groups: int = 32,
    standard_error: float | None = None,
    generator: torch.Generator | None = None,
) -> Estimate:
    """Fréchet distance of infinitely many generated images (Chong and Forsyth 2020); the real moments count as exact.

    The distance of N images is too large by about a constant times 1/N. It is computed of random subsets of different sizes,
    from half of the images to all, and fitted with a line in 1/N, whose intercept is returned. (The paper begins at a tenth,
    where there are so few images per feature that the line is curved.) The subsets are unions of groups, taken in turn from
    a circle of them, so that all images have about the same weight.

    The standard error joins that of the images, which is the error of the distance of all of them times the norm of their
    weights in the intercept, and that of the line, from the residuals.

    Args:
        real, generated, groups, generator: as for `frechet_error`.
        sizes: number of subsets.
        standard_error: what `frechet_error` returned, if it has been called; computed if None.

    Raises:
        ValueError: as `frechet_error`; fewer than 3 sizes or 4 groups.
    """
    if sizes < 3 or groups < 4:
        raise ValueError(f"sizes={sizes} and groups={groups} must be at least 3 and 4 to fit a line")
    parts = _Groups.of(generated, groups, generator)
    reference = _Reference(real, parts)
    if standard_error is None:
        standard_error = _jackknife(reference, parts)
    numbers = torch.linspace(groups // 2, groups, sizes).round().long().unique().tolist()
    members = torch.zeros(len(numbers), groups, dtype=torch.float64)
    first = 0
    for row, number in zip(members, numbers):
        row[torch.arange(first, first + number) % groups] = 1
        first += number
    counts = parts.counts.cpu()
    inverse = 1 / (members @ counts)
    distances = torch.tensor([reference.distance(parts.pool(row)) for row in members], dtype=torch.float64)
    # the intercept of the line as a weighted sum of the distances, and the weight of the images of each group in it
    centered = inverse - inverse.mean()
    weights = 1 / len(inverse) - inverse.mean() * centered / centered.square().sum()
    of_images = (weights * inverse) @ members
    intercept = weights @ distances
    slope = centered @ distances / centered.square().sum()
    residuals = distances - intercept - slope * inverse
    of_line = weights.square().sum() * residuals.square().sum() / (len(inverse) - 2)
    of_sample = standard_error**2 * counts.sum() * (counts * of_images.square()).sum()
    return Estimate(intercept.item(), math.sqrt(of_line + of_sample))


@dataclasses.dataclass(frozen=True, eq=False)
class _Groups:
    """Moments of random groups of images: numbers (G,), means less the mean of all (G, D), scatter matrices (G, D, D)."""

    counts: torch.Tensor
    shift: torch.Tensor
    means: torch.Tensor
    scatters: torch.Tensor

    @classmethod
    def of(cls, features, groups, generator):
        if groups < 2:
            raise ValueError(f"groups={groups} must be 2 or more")
        check_features("generated", features, groups)
        order = torch.randperm(len(features), generator=generator).tensor_split(groups)
        shift = mean_of(features)
        size = len(shift)
        means, scatters = shift.new_zeros(groups, size), shift.new_zeros(groups, size, size)
        for i, rows in enumerate(order):
            moments = Moments.of(features[rows.to(features.device)])
            means[i] = moments.mean - shift
            scatters[i] = moments.covariance * (len(rows) - 1)
        counts = torch.tensor([len(rows) for rows in order], dtype=torch.float64, device=shift.device)
        return cls(counts, shift, means, scatters)

    def pool(self, members):
        """The moments of the groups whose member is 1, and not 0."""
        weights = members.to(self.counts) * self.counts
        count = weights.sum()
        mean = weights @ self.means / count
        centered = self.means - mean
        scatter = torch.tensordot(members.to(self.counts), self.scatters, 1) + centered.T @ (
            weights[:, None] * centered
        )
        return Moments(int(count), self.shift + mean, scatter / (count - 1))


class _Reference:
    """The real moments with the square root of their covariance, for the distances of many sets."""

    def __init__(self, real, generated):
        moments = _as_moments("real", real)
        _check_dimensions(moments.dimensions, len(generated.shift))
        self.moments = moments.to(generated.shift.device)
        self.root = _square_root(self.moments.covariance)

    def distance(self, generated):
        """As `frechet_distance`, up to the root of the rounding of the smallest eigenvalues; 5 times as fast."""
        product = self.root.T @ generated.covariance @ self.root
        return _distance(self.moments, generated, torch.linalg.eigvalsh(product).clamp(min=0).sqrt().sum()).item()


def _jackknife(reference, parts):
    groups = len(parts.counts)
    without = 1 - torch.eye(groups, dtype=torch.float64)
    distances = torch.tensor([reference.distance(parts.pool(row)) for row in without], dtype=torch.float64)
    return math.sqrt((groups - 1) ** 2 / groups * distances.var().item())


def _distance(real, generated, root):
    difference = real.mean - generated.mean
    return difference @ difference + real.covariance.trace() + generated.covariance.trace() - 2 * root


def _square_root(covariance):
    """F (D, r) with F F^T the covariance of rank r, as far as float64 tells the rank."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
    return vectors[:, kept] * values[kept].sqrt()


def _as_moments(name, measured):
    moments = measured if isinstance(measured, Moments) else Moments.of(measured, name)
    size = moments.dimensions
    if moments.mean.dim() != 1 or moments.covariance.shape != (size, size):
        shapes = tuple(moments.mean.shape), tuple(moments.covariance.shape)
        raise ValueError(
            f"{name} has a mean and a covariance of shapes {shapes[0]} and {shapes[1]}; give (D,) and (D, D)"
        )
    if not (moments.mean.isfinite().all() and moments.covariance.isfinite().all()):
        raise ValueError(f"{name} has a mean or a covariance that is not finite; compute the statistics again")
    if moments.count is not None and moments.count < 2:
        raise ValueError(f"{name} has {moments.count} features; give at least 2")
    return Moments(moments.count, to_float64(moments.mean), to_float64(moments.covariance))


def _check_dimensions(real, generated):
    if real != generated:
        raise ValueError(f"generated has {generated} features per image and real has {real}; use the same extractor")
