"""The metrics as their papers define them, in float64 NumPy and SciPy, with all N x M distances."""

import numpy as np
import scipy.linalg
import scipy.special
from scipy.spatial.distance import cdist


def frechet(x, y):
    """Heusel et al. 2017, eq. 6."""
    c, d = np.cov(x.T), np.cov(y.T)
    root = scipy.linalg.sqrtm(c @ d).real
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(c + d - 2 * root)


def kernel(x, y):
    """Bińkowski et al. 2018, eq. 4: the unbiased estimate from all images."""
    xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    n, m = len(x), len(y)
    within = (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1))
    return within - 2 * xy.mean()


def inception_scores(logits, splits):
    """Salimans et al. 2016, section 4, of each part."""
    for part in np.array_split(logits, splits):
        p = scipy.special.softmax(part, 1)
        yield np.exp(scipy.special.rel_entr(p, p.mean(0)).sum(1).mean())


def manifolds(real, generated, k, density_k):
    """Kynkäänniemi et al. 2019, eq. 1 to 3, and Naeem et al. 2020, eq. 3 and 4, as arrays of the images' shares."""

    def radii(x, k):
        return np.sort(cdist(x, x), 1)[:, k]

    d = cdist(generated, real)
    small, large = radii(real, k), radii(real, density_k)
    return {
        "precision": (d <= small).any(1),
        "recall": (d <= radii(generated, k)[:, None]).any(0),
        "density": (d <= large).sum(1) / density_k,
        "coverage": (d.min(0) <= large),
        "ratio": (d / small).min(1),
        "nearest": d.argmin(1),
    }
