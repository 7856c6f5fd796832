import math

import numpy as np
import pytest
import torch

from ddpm_hf.evaluation.metrics import Moments, frechet_at_infinity, frechet_distance, frechet_error
from support import papers


def correlated(count, dimensions, seed, offset=0.0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, dimensions)) @ rng.normal(size=(dimensions, dimensions)) + offset


def normal(count, deviations, offset, generator):
    return torch.randn(count, len(deviations), dtype=torch.float64, generator=generator) * deviations + offset


@pytest.mark.parametrize("dimensions", [1, 5, 64])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_moments_and_distance_are_those_of_numpy_and_scipy(dimensions, offset):
    x, y = correlated(5000, dimensions, 0, offset), correlated(700, dimensions, 1, offset + 0.5)
    moments = Moments.of(torch.tensor(x))
    assert moments.mean.numpy() == pytest.approx(x.mean(0), rel=1e-12)
    assert moments.covariance.numpy() == pytest.approx(np.cov(x.T).reshape(dimensions, -1), rel=1e-9, abs=1e-9)
    if dimensions > 1:
        expected = papers.frechet(x, y)
        assert frechet_distance(torch.tensor(x), torch.tensor(y)) == pytest.approx(expected, rel=1e-8)
        assert frechet_distance(moments, torch.tensor(y)) == pytest.approx(expected, rel=1e-8)
        assert frechet_distance(torch.tensor(x), Moments.of(torch.tensor(y))) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_features_of_lower_precision_are_computed_in_float64(dtype):
    x, y = torch.tensor(correlated(300, 8, 0)).to(dtype), torch.tensor(correlated(300, 8, 1)).to(dtype)
    assert frechet_distance(x, y) == pytest.approx(papers.frechet(x.double().numpy(), y.double().numpy()), rel=1e-8)


def test_distance_is_that_of_torchmetrics():
    torchmetrics = pytest.importorskip("torchmetrics.image.fid", reason="make test-oldest does without")
    x, y = torch.tensor(correlated(400, 16, 0)), torch.tensor(correlated(300, 16, 1))
    metric = torchmetrics.FrechetInceptionDistance(
        feature=_Flat(16), normalize=True, input_img_size=(1, 1, 16)
    ).set_dtype(torch.float64)
    metric.update(x[:, None, None], real=True)
    metric.update(y[:, None, None], real=False)
    assert frechet_distance(x, y) == pytest.approx(metric.compute().item(), rel=1e-8)


class _Flat(torch.nn.Module):
    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features

    def forward(self, x):
        return x.flatten(1).double()


def test_known_gaussians():
    """Equal directions: the sum of the squared differences of the standard deviations; one free choice of the means."""
    rotation = torch.linalg.qr(torch.randn(30, 30, dtype=torch.float64)).Q
    a, b = torch.rand(2, 30, dtype=torch.float64)
    m, n = torch.randn(2, 30, dtype=torch.float64)
    first, second = (Moments(None, mean, rotation * values.square() @ rotation.T) for mean, values in ((m, a), (n, b)))
    expected = ((m - n).square().sum() + (a - b).square().sum()).item()
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-12)


def test_two_dimensions_without_common_directions():
    """tr (C C')^(1/2) of 2 x 2 matrices is the root of tr(C C') + 2 sqrt(det C det C')."""
    c, d = torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double(), torch.tensor([[1.0, -0.7], [-0.7, 3.0]]).double()
    root = ((c @ d).trace() + 2 * (c.det() * d.det()).sqrt()).sqrt()
    mean = torch.zeros(2, dtype=torch.float64)
    expected = (c.trace() + d.trace() - 2 * root).item()
    assert frechet_distance(Moments(9, mean, c), Moments(9, mean, d)) == pytest.approx(expected, rel=1e-12)


def test_singular_covariances_keep_all_digits():
    """The trace of the root is the nuclear norm of X Y^T, which needs no covariance."""
    x, y = correlated(20, 200, 0), correlated(30, 200, 1)
    x[:, :50] = 0  # and features that are always 0
    y[:, 30:80] = 0
    centered, others = (z - z.mean(0) for z in (x, y))
    root = np.linalg.norm(centered @ others.T, "nuc") / math.sqrt(19 * 29)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + (centered**2).sum() / 19 + (others**2).sum() / 29 - 2 * root
    x, y = torch.tensor(x), torch.tensor(y)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert Moments.of(x).is_singular and "20 images for 200 features" in Moments.of(x).advice
    assert not Moments.of(x[:, :19]).is_singular and Moments.of(x[:, :19]).advice is None
    assert not Moments(None, x[0], x.T.cov()).is_singular


def test_constant_images():
    x = torch.ones(10, 4)
    assert frechet_distance(x, x + 1) == 4
    assert frechet_distance(x, torch.randn(50, 4)) > 0
    assert frechet_error(torch.randn(50, 4), torch.ones(40, 4)) == 0


def test_merged_moments_are_those_of_the_union():
    """Exactly, also where the means are far larger than the deviations, and of single images."""
    x = torch.tensor(correlated(500, 6, 0, 1e6))
    union = Moments.of(x)
    merged = Moments.of(x[:1])
    for rows in (x[1:2], x[2:100], x[100:]):
        merged = merged.merge(Moments.of(rows))
    assert merged.count == 500
    torch.testing.assert_close(merged.mean, union.mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(merged.covariance, union.covariance, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="unknown number of images"):
        merged.merge(Moments(None, union.mean, union.covariance))


def test_bias_and_its_extrapolation():
    """Equal Gaussians with the reference known: E[FID] = (D + D (D + 1) / 4) / N to first order, as derived below.

    The mean contributes tr C / N. With C = 1 and the sample covariance 1 + E, tr(1 + (1 + E) - 2 (1 + E)^(1/2)) is
    tr E^2 / 4 to second order, and E[tr E^2] = D (D + 1) / (N - 1).
    """
    dimensions, generator = 12, torch.Generator().manual_seed(0)
    mean, one = torch.zeros(dimensions, dtype=torch.float64), torch.eye(dimensions, dtype=torch.float64)
    reference = Moments(None, mean, one)
    for count in (1000, 4000):
        distances = torch.tensor(
            [frechet_distance(reference, normal(count, one.diag(), 0, generator)) for _ in range(100)]
        )
        error = distances.std() / 10
        bias = (dimensions + dimensions * (dimensions + 1) / 4) / count
        assert abs(distances.mean() - bias) < 4 * error + 0.02 * bias
        assert distances.mean() > 20 * error
    limits = [
        frechet_at_infinity(reference, normal(1000, one.diag(), 0, generator), generator=generator) for _ in range(60)
    ]
    values, errors = torch.tensor(limits).double().T
    assert abs(values.mean()) < 0.1 * bias * 4  # a tenth of the bias of 1,000 images
    assert abs(values.mean()) < 4 * values.std() / math.sqrt(60) + 0.05 * 4 * bias
    assert (values.abs() < 3 * errors).double().mean() > 0.9


@pytest.mark.parametrize(
    "dimensions, offset, scale, bias_dominates", [(16, 0.3, 1.0, False), (32, 0.3, 1.2, False), (32, 0.0, 1.0, True)]
)
def test_errors_are_the_spread_over_fresh_images(dimensions, offset, scale, bias_dominates):
    generator = torch.Generator().manual_seed(1)
    deviations = torch.linspace(0.4, 1.4, dimensions, dtype=torch.float64)
    reference = Moments(None, torch.zeros_like(deviations), deviations.square().diag())
    distances, errors, limits, limit_errors = [], [], [], []
    for _ in range(60):
        generated = normal(1500, deviations * scale, offset, generator)
        distances.append(frechet_distance(reference, generated))
        errors.append(frechet_error(reference, generated, generator=generator))
        limit = frechet_at_infinity(reference, generated, standard_error=errors[-1], generator=generator)
        limits.append(limit.value)
        limit_errors.append(limit.standard_error)
    for values, estimated in ((distances, errors), (limits, limit_errors)):
        ratio = np.mean(estimated) / np.std(values, ddof=1)
        assert 0.75 < ratio < (2 if bias_dominates else 1.5), ratio
    expected = dimensions * offset**2 + ((scale - 1) * deviations).square().sum().item()
    assert abs(np.mean(limits) - expected) < 4 * np.std(limits) / math.sqrt(60)
    if not bias_dominates:
        inside = np.abs(np.array(limits) - expected) < 1.96 * np.array(limit_errors)
        assert inside.mean() > 0.88


def test_limit_computes_its_error_itself_and_repeats_with_its_generator():
    x, y = torch.tensor(correlated(300, 4, 0)), torch.tensor(correlated(300, 4, 1))
    first, second = (frechet_at_infinity(x, y, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert first == second and first.standard_error > 0
    error = frechet_error(Moments.of(x), y, generator=torch.Generator().manual_seed(3))
    again = frechet_at_infinity(x, y, standard_error=error, generator=torch.Generator().manual_seed(3))
    assert again == first


def test_wrong_arguments():
    x = torch.randn(40, 4)
    with pytest.raises(ValueError, match="generated has 3 features per image and real has 4; use the same extractor"):
        frechet_distance(x, torch.randn(40, 3))
    with pytest.raises(ValueError, match="generated has 3 features per image"):
        frechet_error(x, torch.randn(40, 3))
    with pytest.raises(ValueError, match="generated has 5 features; give at least 32"):
        frechet_error(x, x[:5])
    with pytest.raises(ValueError, match="groups=1"):
        frechet_error(x, x, groups=1)
    with pytest.raises(ValueError, match="sizes=2"):
        frechet_at_infinity(x, x, sizes=2)
    with pytest.raises(ValueError, match="real has 1 features"):
        frechet_distance(Moments.of(x[:1]), x)
    moments = Moments.of(x)
    with pytest.raises(ValueError, match=r"real has a mean and a covariance of shapes \(4,\) and \(3, 3\)"):
        frechet_distance(Moments(40, moments.mean, moments.covariance[:3, :3]), x)
    with pytest.raises(ValueError, match="generated has a mean or a covariance that is not finite"):
        frechet_distance(x, Moments(40, moments.mean, moments.covariance * torch.nan))
    single = Moments(40, moments.mean.float(), moments.covariance.float())  # of a statistics file
    assert frechet_distance(single, x + 1) == pytest.approx(4, rel=1e-6)
    x[3, 1], x[5] = torch.nan, torch.inf
    with pytest.raises(ValueError, match="not finite in 2 of 40 images, first in image 3; leave out"):
        frechet_error(torch.randn(40, 4), x)
