"""Coefficients of q and p by position in a chain, computed once in float64."""

import functools
import math

import numpy as np
import torch

from ddpm_hf.schedulers.prediction import x_start_weights


class _Tables:
    """Tables by position in a chain, kept in the forms that they are asked for: on each device, in each dtype."""

    def __init__(self, tables):
        self.tables, self.tensors, self.entries = tables, {}, {}

    def __deepcopy__(self, memo):
        return self  # their values never change: copies of a scheduler share them

    def at(self, name, position, like):
        """A table's entry to multiply `like` with, one for each column of the table.

        0-d, on the CPU, for an int; (B, 1, ...) for a tensor of positions.
        """
        if isinstance(position, int):
            key = (name, like.dtype)
            if key not in self.entries:
                with torch.inference_mode(False):  # what is kept here serves calls with gradients too
                    table = torch.as_tensor(self.tables[name]).to(like.dtype)
                    columns = [column.unbind() for column in table.unbind(1)] if table.dim() > 1 else None
                    self.entries[key] = list(zip(*columns)) if columns else table.unbind()
            return self.entries[key][position]
        entry = self.on(name, like.device)[position].to(like.dtype)
        columns = [column.view(-1, *[1] * (like.dim() - 1)) for column in entry.view(len(position), -1).unbind(1)]
        return columns if entry.dim() > 1 else columns[0]

    def on(self, name, device):
        """A table as a tensor on `device`, moved there once; one NaN more than its entries, for steps not in the chain."""
        key = (name, device)
        if key not in self.tensors:
            with torch.inference_mode(False):
                table = torch.as_tensor(self.tables[name])
                if table.is_floating_point():
                    table = torch.cat((table, torch.full_like(table[:1], math.nan)))
                    table = table.float() if device.type == "mps" else table
                self.tensors[key] = table.to(device)
        return self.tensors[key]


class ChainTables(_Tables):
    """The tables of q and p on a subsequence of the timesteps (IDDPM section 4), by position in it."""

    def __init__(self, timesteps, betas, alphas_cumprod, variance_type, prediction_type):
        super().__init__({})
        T, tables = len(betas), self.tables
        self.timesteps = timesteps  # ascending
        self.position = {t: i for i, t in enumerate(timesteps)}
        alpha_bar = alphas_cumprod[timesteps]
        alpha_bar_prev = np.append(1.0, alpha_bar[:-1])
        beta = betas if len(timesteps) == T else 1 - alpha_bar / alpha_bar_prev
        one_minus = 1 - alpha_bar

        # q(x_t | x_0), eq. 4
        tables["timesteps"] = np.array(timesteps, dtype=np.int64)
        tables["positions"] = np.full(T, len(timesteps))
        tables["sqrt_alphas_cumprod"] = np.sqrt(alpha_bar)
        tables["sqrt_one_minus_alphas_cumprod"] = np.sqrt(one_minus)
        tables["one_minus_alphas_cumprod"] = one_minus
        tables["log_one_minus_alphas_cumprod"] = np.log(one_minus)
        tables["x_t"] = _columns(np.sqrt(alpha_bar), np.sqrt(one_minus))  # of x_0 and noise
        tables["positions"][timesteps] = np.arange(len(timesteps))

        # q(x_{t-1} | x_t, x_0), eq. 6-7
        variance = beta * (1 - alpha_bar_prev) / one_minus
        # The first step's variance is 0; its logarithm is taken from the second, as in the paper's code: it is the
        # decoder's scale. A chain of one step has no second: beta stands in.
        clipped = np.append(variance[1] if len(variance) > 1 else beta[0], variance[1:])
        mean_of_x_start, mean_of_x_t = posterior_mean_weights(alpha_bar, alpha_bar_prev, beta)
        tables["posterior_mean"] = _columns(mean_of_x_start, mean_of_x_t)
        tables["posterior_variance"] = variance
        tables["posterior_log_variance_clipped"] = np.log(clipped)

        # p(x_{t-1} | x_t), eq. 1, where its variance is fixed (section 3.2)
        large = np.append(clipped[0], beta[1:])
        model_variance = {"fixed_small": variance, "fixed_small_log": clipped}.get(variance_type, large)
        tables["model_variance"] = model_variance
        tables["model_log_variance"] = np.log(clipped if variance_type.startswith("fixed_small") else large)
        std = np.append(0.0, np.sqrt(model_variance[1:]))  # the last step adds no noise
        tables["ancestral"] = _columns(mean_of_x_start, mean_of_x_t, std)
        tables["log_betas"] = np.log(beta)

        # x_0 as a linear function of x_t and the network's output
        root = np.sqrt(np.maximum(alpha_bar, 1e-24))
        tables["reciprocal_sqrt_alphas_cumprod"], tables["sqrt_snr"] = 1 / root, root / np.sqrt(one_minus)
        # what has nothing of x_0 in it has no class either
        tables["x_start_of_gradient"] = np.where(alpha_bar > 1e-12, one_minus / root, 0.0)
        scale = np.where(alpha_bar >= 1e-24, root, 0.0)  # zero terminal SNR: nothing of x_0 is left
        posterior = np.maximum(mean_of_x_start, 1e-12), mean_of_x_t
        tables["x_start"] = _columns(*x_start_weights(prediction_type, scale, np.sqrt(one_minus), posterior))

        # DDIM's ODE one step up in t; pure noise after the last
        tables["reverse"] = self._ddim(np.append(alpha_bar[1:], 0.0), np.zeros_like(beta))[:, :2]

    def ddim(self, eta):
        """The table "ddim": DDIM eq. 12 with the sigma of eq. 16, which is eta times the posterior's standard deviation."""
        sigma = eta * np.sqrt(self.tables["posterior_variance"])
        alpha_bar_prev = np.append(1.0, self.tables["sqrt_alphas_cumprod"][:-1] ** 2)
        return _Tables({"ddim": self._ddim(alpha_bar_prev, sigma)})

    def _ddim(self, alpha_bar_to, sigma):
        """What x_0, x_t and the noise count in eq. 12, with epsilon = (x_t - sqrt(abar) x_0) / sqrt(1 - abar)."""
        of_epsilon = np.sqrt(np.maximum(1 - alpha_bar_to - sigma**2, 0.0))
        of_x_t = of_epsilon / self.tables["sqrt_one_minus_alphas_cumprod"]
        return _columns(np.sqrt(alpha_bar_to) - of_x_t * self.tables["sqrt_alphas_cumprod"], of_x_t, sigma)


def posterior_mean_weights(
    alpha_bar: np.ndarray, alpha_bar_prev: np.ndarray, beta: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The weights of x_0 and x_t in the mean of q(x_{t-1} | x_t, x_0), eq. 7."""
    of_x_start = beta * np.sqrt(alpha_bar_prev) / (1 - alpha_bar)
    return of_x_start, (1 - alpha_bar_prev) * np.sqrt(1 - beta) / (1 - alpha_bar)


@functools.lru_cache(maxsize=8)
def ddim_tables(chain, eta):
    return chain.ddim(eta)


def _columns(*arrays):
    return np.stack(arrays, axis=1)


def in_working_precision(x):
    """Half precision is computed in float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def weighted_sum(weights, x, y, onto=None):
    """a * x + b * y, added in place to `onto` where given; the weights (a, b) are those of `ChainTables.at`."""
    a, b = weights
    if a.dim() == 0:
        total = x * a if onto is None else onto.add_(x, alpha=a)
        return total.add_(y, alpha=b)
    total = x * a if onto is None else onto.addcmul_(x, a)
    return total.addcmul_(y, b)
