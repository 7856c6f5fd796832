"""Data of which density and score are known at every t."""

import math

import torch


class Mixture:
    """Pixels that are drawn alone from a mixture of normal distributions; the exact network of a process, and the density."""

    def __init__(self, sde, means=(-0.5, 0.4), stds=(0.1, 0.2), weights=(0.3, 0.7)):
        self.sde, self.dtype = sde, torch.float64
        self.means, self.stds, self.weights = (torch.tensor(v, dtype=torch.float64) for v in (means, stds, weights))

    def components(self, x, t):
        scale, noise = self.sde.scale(t), self.sde.std(t)
        variance = scale**2 * self.stds**2 + noise**2
        centered = x[..., None] - scale * self.means
        return centered, variance, self.weights.log() - 0.5 * (centered**2 / variance + (2 * math.pi * variance).log())

    def log_prob(self, x, t):
        return self.components(x, t)[2].logsumexp(-1).flatten(1).sum(1)

    def score(self, x, t):
        centered, variance, logs = self.components(x, t)
        return -(logs.softmax(-1) * centered / variance).sum(-1)

    def __call__(self, x, c_noise, class_labels=None, return_dict=False):
        t = self.sde.times(c_noise)
        score, scale, noise = self.score(x, t), self.sde.scale(t), self.sde.std(t)
        x_start = (x + noise**2 * score) / scale
        return (
            {
                "score": score,
                "epsilon": -noise * score,
                "sample": x_start,
                "v_prediction": -scale * noise * score - noise * x_start,
            }[self.sde.prediction_type],
        )

    def sample(self, *shape, seed=0):
        generator = torch.Generator().manual_seed(seed)
        which = torch.multinomial(self.weights, math.prod(shape), replacement=True, generator=generator).view(shape)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        return self.means[which] + self.stds[which] * noise
