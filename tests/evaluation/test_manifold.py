import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from ddpm_hf.evaluation.metrics import compare_manifolds, manifold, nearest_neighbors, precision_recall
from ddpm_hf.evaluation.processes import Processes
from support import papers

NAMES = ("precision", "recall", "density", "coverage")


@pytest.fixture(params=[None, (7, 5)], ids=["one block", "small blocks"])
def tile(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(manifold, "_CPU_TILE", request.param)


def overlapping(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(90, 3, generator=generator, dtype=dtype)
    return real, 1.3 * torch.randn(70, 3, generator=generator, dtype=dtype) + 0.8


@pytest.mark.parametrize("k, density_k", [(3, 5), (4, 2), (1, 1)])
def test_all_four_are_those_of_the_papers(tile, k, density_k):
    real, generated = overlapping()
    result = compare_manifolds(real, generated, neighbors=k, density_neighbors=density_k)
    expected = papers.manifolds(real.double().numpy(), generated.double().numpy(), k, density_k)
    for name in NAMES:
        value, error = getattr(result, name)
        shares = expected[name].astype(float)
        assert value == pytest.approx(shares.mean(), rel=1e-12), name
        assert error == pytest.approx(shares.std(ddof=1) / np.sqrt(len(shares)), rel=1e-12), name
    assert 0.1 < result.precision.value < 0.95 and 0.1 < result.recall.value < 1
    assert (result.in_real_manifold.numpy() == expected["precision"]).all()
    assert (result.nearest_real.numpy() == expected["nearest"]).all()
    assert result.distance_ratio.numpy() == pytest.approx(expected["ratio"], rel=1e-10)
    assert ((result.distance_ratio <= 1) == result.in_real_manifold).all()


def test_nearest_neighbors_are_those_of_all_distances(tile):
    real, generated = overlapping()
    distances, indices = nearest_neighbors(generated, real, 4)
    expected = cdist(generated.double().numpy(), real.double().numpy())
    order = expected.argsort(1)[:, :4]
    assert (indices.numpy() == order).all()
    assert distances.numpy() == pytest.approx(np.take_along_axis(expected, order, 1), rel=1e-12)
    assert nearest_neighbors(real, real)[0].abs().max() == 0


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
def test_surfaces_of_balls_and_duplicates_are_counted_right(tile, offset):
    """On a grid, where most distances equal a radius, far from the origin, where the products round."""
    rng = np.random.default_rng(4)
    real, generated = (rng.integers(0, 4, (60, 3)) + np.array([offset, -offset, 0]) for _ in range(2))
    result = compare_manifolds(torch.tensor(real), torch.tensor(generated))
    expected = papers.manifolds(real - real[0], generated - real[0], 3, 5)
    for name in NAMES:
        assert getattr(result, name).value == pytest.approx(expected[name].mean(), rel=1e-12), name
    assert (result.in_real_manifold.numpy() == expected["precision"]).all()


@pytest.mark.parametrize("dimensions", [1, 5, 2048])
def test_products_round_within_their_bound(dimensions):
    x, y = torch.randn(2, 100, dimensions, dtype=torch.float64) + 3
    quick, bound = manifold._quick_squares(x, y)
    differences = (quick - torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()).abs().max()
    assert 0 < differences < bound


def test_copies_of_real_images():
    """All are within, at distance 0 from themselves, also where the real ones have duplicates and balls of radius 0."""
    real = torch.randn(40, 6)
    real[1:5] = real[0]
    result = compare_manifolds(real, real)
    assert result.precision == result.recall == result.coverage == (1, 0)
    assert (result.distance_ratio == 0).all() and (result.distance_ratio.isfinite()).all()
    assert result.nearest_real[10:].tolist() == list(range(10, 40))
    constant = compare_manifolds(torch.randn(30, 6), torch.zeros(20, 6))
    assert constant.recall.value == 0


def test_shifted_uniform_intervals():
    """Uniform on [0, 1] and on [s, 1 + s]: for many images the share 1 - s of each is in the other's manifold.

    Density: a real ball holds k of N real images, so as many generated ones: 1 within the overlap.
    """
    generator, shift, count = torch.Generator().manual_seed(0), 0.3, 6000
    real, generated = torch.rand(2, count, 1, generator=generator, dtype=torch.float64)
    result = compare_manifolds(real, generated + shift)
    for name in ("precision", "recall", "density"):
        value, error = getattr(result, name)
        assert abs(value - (1 - shift)) < 4 * error + 0.02 * (name != "density"), name
    assert (result.in_real_manifold == (generated[:, 0] + shift < 1)).double().mean() > 0.98
    # Naeem et al. 2020, section 3.3: of equal distributions 1 - (N - 1) ... (N - k) / ((2 N - 1) ... (2 N - k))
    limit = (1 - shift) * (1 - 2.0**-5)
    assert abs(result.coverage.value - limit) < 4 * result.coverage.standard_error + 1e-3


def test_shifted_balls_in_three_dimensions():
    """The share of a ball of radius 1 in another one, shifted by s: 1 - 3 s / 4 + s^3 / 16."""
    generator, shift, count = torch.Generator().manual_seed(0), 0.5, 8000

    def ball():
        x = torch.randn(count, 3, generator=generator, dtype=torch.float64)
        return (
            x / x.norm(dim=1, keepdim=True) * torch.rand(count, 1, generator=generator, dtype=torch.float64) ** (1 / 3)
        )

    result = compare_manifolds(ball(), ball() + torch.tensor([shift, 0, 0]))
    share = 1 - 0.75 * shift + shift**3 / 16
    # balls of a volume of k / N reach beyond the surface: by about their radius of (k / N)^(1/3), 0.07 here
    for value in (result.precision.value, result.recall.value, result.density.value):
        assert share < value < share + 0.75 * 1.2 * (3 / count) ** (1 / 3)


class Shared(Processes):
    """A process of several, each a thread here: they meet when they gather."""

    def meet(self, rows):
        self.parts[self.rank] = rows.cpu()
        self.barrier.wait()
        joined = torch.cat([self.parts[rank] for rank in range(self.world_size)])
        self.barrier.wait()
        return joined

    def gather(self, rows):
        return self.meet(rows)


def in_processes(number, function):
    """What the function returns in each of the processes."""
    Shared.parts, Shared.barrier, results = {}, threading.Barrier(number), {}

    def work(rank):
        results[rank] = function(Shared(rank, number))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[rank] for rank in range(number)]


@pytest.mark.parametrize("number", [2, 3, 100])
def test_several_processes_agree_with_one(number):
    real, generated = overlapping()
    alone = compare_manifolds(real, generated)
    for shared in in_processes(number, lambda processes: compare_manifolds(real, generated, processes=processes)):
        for name in NAMES:
            assert getattr(shared, name) == getattr(alone, name), name
        for name in ("in_real_manifold", "distance_ratio", "nearest_real"):
            assert torch.equal(getattr(shared, name), getattr(alone, name)), name
    found = nearest_neighbors(generated, real, 2)
    for shared in in_processes(number, lambda processes: nearest_neighbors(generated, real, 2, processes=processes)):
        assert torch.equal(shared[0], found[0]) and torch.equal(shared[1], found[1])


def test_half_precision_and_integers():
    real, generated = overlapping()
    for dtype in (torch.float16, torch.bfloat16, torch.int32):
        x, y = (10 * real).to(dtype), (10 * generated).to(dtype)
        assert precision_recall(x, y) == precision_recall(x.double(), y.double())


def test_wrong_arguments():
    x = torch.randn(10, 3)
    with pytest.raises(ValueError, match="generated has 5 features; give at least 6"):
        compare_manifolds(x, x[:5])
    with pytest.raises(ValueError, match="density_neighbors=0"):
        compare_manifolds(x, x, density_neighbors=0)
    with pytest.raises(ValueError, match="references has 10 features; give at least 11"):
        nearest_neighbors(x, x, 11)
    with pytest.raises(ValueError, match="k=0"):
        nearest_neighbors(x, x, 0)
    with pytest.raises(ValueError, match=r"queries has shape \(10, 2\)"):
        nearest_neighbors(x[:, :2], x)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_square_of_the_number_of_images():
    """20,000 x 20,000 distances take 3.2 GB in float64; the peak grows by less than a tenth of it."""
    lines = [
        "import resource, torch; from ddpm_hf.evaluation.metrics import compare_manifolds",
        "real, generated = torch.randn(2, 20000, 32)",
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss",
        "compare_manifolds(real[:100], generated[:100])",
        "before = peak(); compare_manifolds(real, generated); print(peak() - before)",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * unit < 0.3e9
