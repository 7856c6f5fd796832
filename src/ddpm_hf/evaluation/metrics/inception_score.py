"""Inception score."""

import math

import torch

from ddpm_hf.evaluation.metrics.estimate import Estimate
from ddpm_hf.evaluation.metrics.features import check_features
from ddpm_hf.schedulers.precision import to_float64


def inception_score(logits: torch.Tensor, *, splits: int = 10) -> Estimate:
    """Inception score of generated images (Salimans et al. 2016), in float64.

    The images are divided into `splits` neighboring parts, as in the paper's code and ADM's, so their order must not depend
    on their classes. The value is the mean over the parts of exp(E[KL(p(y|x) || p(y))]). The standard error is that of this
    mean, the standard deviation of the parts / sqrt(splits); papers print the standard deviation itself, which is
    sqrt(splits) times as large. The score of a part is too low by the finite number of its images.

    Args:
        logits: (N, classes), the classifier's output before its softmax. N is at least `splits`.
        splits: number of parts.

    Returns:
        The score, from 1 to the number of classes. The error is NaN for one part.

    Raises:
        ValueError: wrong shape, too few rows, logits that are not finite, or no parts.
    """
    if splits < 1:
        raise ValueError(f"splits={splits} must be 1 or more")
    check_features("logits", logits, splits)
    bounds = [len(logits) * i // splits for i in range(splits + 1)]
    scores = torch.stack([_score(logits[start:stop]) for start, stop in zip(bounds, bounds[1:])]).cpu()
    error = scores.std().item() / math.sqrt(splits) if splits > 1 else math.nan
    return Estimate(scores.mean().item(), error)


def _score(logits):
    log_p = to_float64(logits).log_softmax(1)
    log_marginal = log_p.logsumexp(0) - math.log(len(log_p))
    terms = torch.where(log_p.isneginf(), 0, log_p.exp() * (log_p - log_marginal))
    return terms.sum(1).mean().exp()
