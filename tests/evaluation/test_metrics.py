import numpy as np
import pytest
import scipy.linalg
import torch

from ddpm_hf.evaluation.metrics import frechet_distance, precision_recall


def test_frechet_distance_is_that_of_the_formula():
    rng = np.random.default_rng(0)
    a, b = (
        rng.normal(size=(500, 6)) @ rng.normal(size=(6, 6)),
        rng.normal(size=(300, 6)) @ rng.normal(size=(6, 6)) + 0.5,
    )
    c, d = np.cov(a.T), np.cov(b.T)
    root = scipy.linalg.sqrtm(c @ d).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c + d - 2 * root)
    assert frechet_distance(torch.tensor(a), torch.tensor(b)) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(torch.tensor(a), torch.tensor(a)) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_one_feature():
    a, b = torch.randn(2000, 1, dtype=torch.float64), 3 + 2 * torch.randn(2000, 1, dtype=torch.float64)
    expected = (a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2
    assert frechet_distance(a, b) == pytest.approx(expected.item())


def test_singular_covariances():
    a, b = torch.randn(3, 10), torch.randn(4, 10)  # fewer features than dimensions
    assert np.isfinite(frechet_distance(a, b))


def test_precision_and_recall_of_what_is_counted_by_hand():
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0], [12.0]])
    # with k = 1 every radius is 1: the manifold is [-1, 3] and [9, 13]
    generated = torch.tensor([[0.5], [2.9], [3.1], [50.0]])
    precision, recall = precision_recall(real, generated, neighbors=1)
    assert precision == 0.5
    # radii 2.4, 0.2, 0.2, 46.9: of the real ones all within [3.1, 96.9] or [-1.9, 2.9]
    assert recall == 1.0
    assert precision_recall(real, generated[:2], neighbors=1)[1] == 0.5  # [-1.9, 2.9], [0.5, 5.3]


def test_few_modes_lose_recall_and_noise_loses_precision():
    real = torch.cat((torch.randn(200, 4), torch.randn(200, 4) + 20))
    few, noisy = real[:200] + 0.01 * torch.randn(200, 4), 30 * torch.randn(400, 4)
    precision, recall = precision_recall(real, few)
    assert precision > 0.95 and recall < 0.6
    assert precision_recall(real, noisy)[0] < 0.1
    assert precision_recall(real, real) == (1.0, 1.0)


@pytest.mark.parametrize("real, generated", [((5,), (5, 2)), ((5, 2), (5, 3)), ((3, 2), (5, 2)), ((5, 2), (0, 2))])
def test_bad_features(real, generated):
    with pytest.raises(ValueError, match="real|generated"):
        precision_recall(torch.randn(real), torch.randn(generated))
    with pytest.raises(ValueError, match="neighbors=0"):
        precision_recall(torch.randn(5, 2), torch.randn(5, 2), neighbors=0)
    with pytest.raises(ValueError, match="features; give at least 2"):
        frechet_distance(torch.randn(1, 2), torch.randn(5, 2))


def test_features_that_are_not_finite():
    bad = torch.randn(5, 2)
    bad[0, 0] = torch.nan
    for call in frechet_distance, precision_recall:
        with pytest.raises(ValueError, match="generated has features that are not finite"):
            call(torch.randn(5, 2), bad)
        with pytest.raises(ValueError, match="shape"):
            call(torch.zeros(5, 0), torch.zeros(5, 0))
