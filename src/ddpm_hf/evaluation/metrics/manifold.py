"""Precision, recall, density, coverage and nearest neighbors, in blocks of distances."""

import dataclasses

import torch

from ddpm_hf.evaluation.metrics.estimate import Estimate
from ddpm_hf.evaluation.metrics.features import check_features, check_pair, mean_of
from ddpm_hf.evaluation.processes import Processes
from ddpm_hf.schedulers.precision import to_float64

# rows and columns of a block of distances: 16 MB fit the caches of a CPU; an accelerator takes 256 MB
_CPU_TILE, _ACCELERATOR_TILE = (512, 4096), (4096, 8192)
# neighbors that are compared exactly beside those asked for
_SPARE = 4


@dataclasses.dataclass(frozen=True, eq=False)
class ManifoldComparison:
    """How the manifolds of the real and of the generated features overlap. All tensors are on the CPU.

    The standard errors are over the images whose share or mean it is: generated ones for precision and density, real ones for
    recall and coverage. The balls around the other images count as exact.

    Attributes:
        precision, recall: shares of images in the other manifold (Kynkäänniemi et al. 2019).
        density, coverage: Naeem et al. 2020; density can exceed 1.
        in_real_manifold: (M,) bool, which generated images precision counts.
        distance_ratio: (M,) float64, the least distance / radius over the real balls; at most 1 in the manifold. Its inverse
            is the realism score of Kynkäänniemi et al. (without their pruning of large balls).
        nearest_real: (M,) int64, index of the real image that is nearest to each generated one; of equally near ones, any.
    """

    precision: Estimate
    recall: Estimate
    density: Estimate
    coverage: Estimate
    in_real_manifold: torch.Tensor
    distance_ratio: torch.Tensor
    nearest_real: torch.Tensor


def compare_manifolds(
    real: torch.Tensor,
    generated: torch.Tensor,
    *,
    neighbors: int = 3,
    density_neighbors: int = 5,
    processes: Processes | None = None,
) -> ManifoldComparison:
    """Compute precision, recall, density and coverage of generated features, without an N x M matrix.

    The manifold of a set of features is the union of balls around its members, each reaching to the k-th nearest other
    member, its surface included. Precision is the share of generated features in the manifold of the real ones, recall the
    share of real features in the manifold of the generated ones. Density is the mean number of real balls around a generated
    feature, divided by k; coverage is the share of real balls that contain a generated feature.

    Every decision is that of exact float64 distances, from the sum of squared differences. Products |x|^2 + |y|^2 - 2 x.y
    are 10 times as fast and decide alone wherever the bound of their rounding error allows; the few pairs within it are
    computed again. So duplicates, and images on the surface of a ball, are counted right.

    Args:
        real, generated: features (N, D) and (M, D) on one device, ideally with N = M; the same in all processes.
        neighbors: k of precision and recall; 3 in the paper.
        density_neighbors: k of density and coverage; 5 in the paper.
        processes: the processes that share the work, and all get the result; by default this one alone.

    Raises:
        ValueError: wrong shapes, features that are not finite, a set with no more than k features, or k below 1.
    """
    for name, k in (("neighbors", neighbors), ("density_neighbors", density_neighbors)):
        if k < 1:
            raise ValueError(f"{name}={k} must be 1 or more")
    most = max(neighbors, density_neighbors)
    check_pair(real, generated, most + 1)
    processes = processes or Processes()
    shift = mean_of(real)
    real_radii = _squared_radii(real, most, shift, processes)
    small, large = real_radii[:, neighbors - 1], real_radii[:, density_neighbors - 1]
    generated_radii = _squared_radii(generated, neighbors, shift, processes)[:, -1]
    rows = processes.share(len(generated))
    mine = _Overlap(generated[rows], real, generated_radii[rows], small, large, shift)
    inside, ratio = processes.gather(mine.inside), processes.gather(mine.ratio)
    balls, nearest = processes.gather(mine.balls), processes.gather(mine.nearest)
    recalled, covered = (processes.gather(flags[None]).any(0) for flags in (mine.recalled, mine.covered))
    return ManifoldComparison(
        precision=_mean(inside),
        recall=_mean(recalled),
        density=_mean(balls / density_neighbors),
        coverage=_mean(covered),
        in_real_manifold=inside,
        distance_ratio=ratio.sqrt(),
        nearest_real=nearest,
    )


def precision_recall(real: torch.Tensor, generated: torch.Tensor, neighbors: int = 3) -> tuple[float, float]:
    """Precision and recall of generated features, as `compare_manifolds` computes them."""
    overlap = compare_manifolds(real, generated, neighbors=neighbors, density_neighbors=neighbors)
    return overlap.precision.value, overlap.recall.value


def nearest_neighbors(
    queries: torch.Tensor, references: torch.Tensor, k: int = 1, *, processes: Processes | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the k nearest references of each query, in blocks.

    Args:
        queries, references: features (N, D) and (M, D) on one device; the same in all processes.
        k: number of neighbors.
        processes: the processes that share the queries, and all get the result; by default this one alone.

    Returns:
        Euclidean distances (N, k), float64, ascending, and indices (N, k), int64, of the references; on the CPU.

    Raises:
        ValueError: wrong shapes, features that are not finite, fewer than k references, or k below 1.
    """
    if k < 1:
        raise ValueError(f"k={k} must be 1 or more")
    check_features("references", references, k)
    check_features("queries", queries, 1, references.shape[1])
    processes = processes or Processes()
    rows = processes.share(len(queries))
    squared, indices = _nearest(queries[rows], references, k, mean_of(references))
    return processes.gather(squared).sqrt(), processes.gather(indices)


def _squared_radii(features, k, shift, processes):
    """Squared distances (N, k) to the k nearest others, ascending, on the features' device."""
    rows = processes.share(len(features))
    squared, _ = _nearest(features[rows], features, k, shift, first=rows.start)
    return processes.gather(squared).to(shift.device)


def _nearest(queries, references, k, shift, first=None):
    """Squared distances and indices (N, k) of the nearest references, ascending.

    Args:
        first: the queries are the references from this index on, and none is its own neighbor; None for other queries.
    """
    height, width = _tile(shift.device)
    found = [(shift.new_empty(0, k), torch.empty(0, k, dtype=torch.int64, device=shift.device))]
    for start in range(0, len(queries), height):
        block = queries[start : start + height]
        x = to_float64(block) - shift
        best, indices = x.new_empty(len(x), 0), torch.empty(len(x), 0, dtype=torch.int64, device=x.device)
        for column in range(0, len(references), width):
            y = to_float64(references[column : column + width]) - shift
            squared, _ = _quick_squares(x, y)
            if first is not None:
                own = torch.arange(len(x), device=x.device) + (first + start - column)
                here = (own >= 0) & (own < len(y))
                squared[here.nonzero().flatten(), own[here]] = torch.inf
            values, positions = squared.topk(min(k + _SPARE, len(y)), largest=False)
            best, indices = torch.cat((best, values), 1), torch.cat((indices, positions + column), 1)
            best, chosen = best.topk(min(k + _SPARE, best.shape[1]), largest=False)
            indices = indices.gather(1, chosen)
        exact = torch.stack([_squares(block, references[column]) for column in indices.T], 1)
        exact = exact.where(best.isfinite(), best)  # not itself
        exact, order = exact.sort(dim=1, stable=True)
        found.append((exact[:, :k], indices.gather(1, order)[:, :k]))
    squared, indices = zip(*found)
    return torch.cat(squared), torch.cat(indices)


class _Overlap:
    """What the distances of some generated features to all real ones tell.

    Attributes:
        inside, balls, ratio, nearest: per generated feature, whether it is in a small real ball, the number of large balls
            around it, the least squared ratio of distance and radius of the small ones, the index of the nearest real feature.
        recalled, covered: per real feature, whether it is in one of these features' balls, and whether its large ball
            contains one of these features.
    """

    def __init__(self, generated, real, generated_radii, small, large, shift):
        height, width = _tile(shift.device)
        device = shift.device
        self.recalled, self.covered = torch.zeros(2, len(real), dtype=torch.bool, device=device)
        self.inside = torch.zeros(len(generated), dtype=torch.bool, device=device)
        self.balls = torch.zeros(len(generated), dtype=torch.float64, device=device)
        self.nearest = torch.zeros(len(generated), dtype=torch.int64, device=device)
        self.ratio = torch.zeros_like(self.balls)
        for start in range(0, len(generated), height):
            rows = slice(start, start + height)
            block = generated[rows]
            x = to_float64(block) - shift
            least = [torch.full((len(x),), torch.inf, dtype=x.dtype, device=device) for _ in range(2)]
            where = [torch.zeros(len(x), dtype=torch.int64, device=device) for _ in range(2)]
            for column in range(0, len(real), width):
                columns = slice(column, column + width)
                others = real[columns]
                squared, error = _quick_squares(x, to_float64(others) - shift)
                within = _within(squared, error, small[columns], block, others)
                self.inside[rows] |= within.any(1)
                within = _within(squared, error, large[columns], block, others)
                self.balls[rows] += within.sum(1)
                self.covered[columns] |= within.any(0)
                within = _within(squared, error, generated_radii[rows, None], block, others)
                self.recalled[columns] |= within.any(0)
                for i, measure in enumerate((squared, squared / small[columns].clamp(min=error))):
                    values, positions = measure.min(1)
                    smaller = values < least[i]
                    least[i] = torch.where(smaller, values, least[i])
                    where[i] = torch.where(smaller, positions + column, where[i])
            self.nearest[rows] = where[0]
            ratios = torch.stack([_squares(block, real[index]) / small[index] for index in where])
            self.ratio[rows] = ratios.nan_to_num(nan=0.0, posinf=torch.inf).min(0).values  # 0 / 0: a duplicate


def _quick_squares(x, y):
    """Squared distances by products, and a bound of their rounding errors, of dot products and of what x and y have."""
    x_squares, y_squares = x.square().sum(1), y.square().sum(1)
    squared = torch.addmm(y_squares, x, y.T, alpha=-2).add_(x_squares[:, None])
    bound = (x.shape[1] + 10) * torch.finfo(x.dtype).eps * (x_squares.max() + y_squares.max())
    return squared, bound.item()


def _squares(x, y):
    """Squared distances of pairs of rows, by differences."""
    return (to_float64(x) - to_float64(y)).square().sum(1)


def _within(squared, error, squared_radii, x, y):
    """Whether distances are at most the radii, by exact distances where quick ones cannot tell."""
    within = squared <= squared_radii + error
    surely = squared <= squared_radii - error
    for pairs in (within ^ surely).nonzero().split(2**22 // x.shape[1] + 1):
        i, j = pairs.T
        radii = squared_radii.expand_as(squared)[i, j]
        within[i, j] = _squares(x[i], y[j]) <= radii
    return within


def _tile(device):
    return _CPU_TILE if device.type == "cpu" else _ACCELERATOR_TILE


def _mean(values):
    values = values.double()
    return Estimate(values.mean().item(), (values.std() / len(values) ** 0.5).item())
