import numpy as np
import pytest
import torch

from ddpm_hf.evaluation.metrics import kernel_distance
from support import papers


def test_distance_of_all_images_is_that_of_the_paper():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 7, generator=generator), 1.2 * torch.randn(200, 7, generator=generator) + 0.3
    result = kernel_distance(x, y)
    assert result.estimate.value == pytest.approx(papers.kernel(x.double().numpy(), y.double().numpy()), rel=1e-8)
    assert (result.subsets, result.subset_size) == (1, 200)
    assert result.note == "subset_size=1000 was lowered to 200; there are 200 real and 200 generated images"


def test_mean_of_subsets_is_that_of_torchmetrics():
    torchmetrics = pytest.importorskip("torchmetrics.image.kid", reason="make test-oldest does without")
    x, y = torch.randn(300, 1, 1, 9).double(), torch.randn(400, 1, 1, 9).double() * 1.5
    metric = torchmetrics.KernelInceptionDistance(
        torch.nn.Flatten(), subsets=20, subset_size=50, normalize=True
    ).set_dtype(torch.float64)
    metric.update(x, real=True)
    metric.update(y, real=False)
    torch.manual_seed(5)
    expected = metric.compute()[0].item()
    result = kernel_distance(
        x.flatten(1), y.flatten(1), subsets=20, subset_size=50, generator=torch.Generator().manual_seed(5)
    )
    assert result.estimate.value == pytest.approx(expected, rel=1e-10)
    assert result.note is None


@pytest.mark.parametrize("counts, size, subsets", [((500, 500), 100, 50), ((300, 900), 100, 20), ((150, 150), 150, 1)])
@pytest.mark.parametrize("offset", [0.0, 0.2])
def test_error_is_the_spread_over_fresh_images(counts, size, subsets, offset):
    generator = torch.Generator().manual_seed(2)
    results = []
    for _ in range(100):
        x, y = (torch.randn(count, 6, generator=generator) + shift for count, shift in zip(counts, (0, offset)))
        results.append(kernel_distance(x, y, subsets=subsets, subset_size=size, generator=generator).estimate)
    values, errors = np.array(results).T
    assert 0.8 < np.sqrt((errors**2).mean()) / values.std(ddof=1) < 1.25


def test_no_bias_where_both_sets_are_of_one_distribution():
    generator = torch.Generator().manual_seed(3)
    values = []
    for _ in range(200):
        x, y = torch.randn(60, 5, generator=generator), torch.randn(50, 5, generator=generator)
        values.append(kernel_distance(x, y, subsets=5, generator=generator).estimate.value)
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(200)
    assert min(values) < 0


def test_closed_form():
    """Of constant images: k(0, 0) = 1, k(x, x) = 8 where x.x = D, k(0, x) = 1, so 1 + 8 - 2."""
    assert kernel_distance(torch.zeros(10, 3), torch.ones(12, 3)).estimate == (7, 0)


def test_wrong_arguments():
    x = torch.randn(10, 3)
    with pytest.raises(ValueError, match="subset_size=3"):
        kernel_distance(x, x, subset_size=3)
    with pytest.raises(ValueError, match="real has 3 features; give at least 4"):
        kernel_distance(x[:3], x)
    with pytest.raises(ValueError, match=r"generated has shape \(10, 2\); give features of shape \(N, D=3\)"):
        kernel_distance(x, x[:, :2])
