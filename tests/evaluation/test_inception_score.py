import math

import numpy as np
import pytest
import torch

from ddpm_hf.evaluation.metrics import inception_score
from support import papers


@pytest.mark.parametrize("count, splits", [(1000, 10), (103, 7), (20, 1)])
def test_score_is_that_of_the_paper(count, splits):
    logits = 3 * torch.randn(count, 12)
    result = inception_score(logits, splits=splits)
    if count % splits == 0:
        scores = list(papers.inception_scores(logits.double().numpy(), splits))
        assert result.value == pytest.approx(np.mean(scores), rel=1e-10)
        if splits > 1:
            assert result.standard_error == pytest.approx(np.std(scores, ddof=1) / math.sqrt(splits), rel=1e-8)
    assert math.isnan(result.standard_error) == (splits == 1)


def test_score_is_that_of_torchmetrics(monkeypatch):
    torchmetrics = pytest.importorskip("torchmetrics.image.inception", reason="make test-oldest does without")
    logits = 2 * torch.randn(500, 1, 1, 10).double()
    metric = torchmetrics.InceptionScore(torch.nn.Flatten(), splits=10).set_dtype(torch.float64)
    metric.update(logits)
    monkeypatch.setattr(torch, "randperm", torch.arange)  # it shuffles the images
    mean, deviation = (x.item() for x in metric.compute())
    result = inception_score(logits.flatten(1))
    assert result.value == pytest.approx(mean, rel=1e-8)
    assert result.standard_error == pytest.approx(deviation / math.sqrt(10), rel=1e-8)


def test_closed_forms():
    certain = torch.full((30, 3), -torch.tensor(1e4)).index_put(
        (torch.arange(30), torch.arange(30) % 3), torch.tensor(0.0)
    )
    assert inception_score(certain) == pytest.approx((3, 0))  # all classes, each with certainty
    assert inception_score(torch.zeros(30, 3)) == pytest.approx((1, 0))
    assert inception_score(certain[:1].repeat(30, 1)) == pytest.approx((1, 0))


def test_wrong_arguments():
    with pytest.raises(ValueError, match="logits has 5 features; give at least 10"):
        inception_score(torch.randn(5, 3))
    with pytest.raises(ValueError, match="splits=0"):
        inception_score(torch.randn(5, 3), splits=0)
    with pytest.raises(ValueError, match="logits has features that are not finite"):
        inception_score(torch.full((20, 3), torch.nan))
