"""Coefficients of q and p by position in a chain, computed once in float64."""

import functools
import math

import numpy as np
import torch

from ddpm_hf.schedulers.prediction import x_start_weights


class _Tables:
    """Tables by position in a chain, each copied once to every device and dtype that it is used with."""

    def __init__(self, tables):
        self.tables, self.tensors, self.entries = tables, {}, {}

    def __deepcopy__(self, memo):
        return self  # the values never change, so copies of a scheduler share them

    def column_at(self, name: str, position: int | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The entry of a one-column table, to multiply images `like`; see `columns_at`."""
        return self.columns_at(name, position, like)[0]

    def columns_at(self, name: str, position: int | torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The entries of a table's columns, to multiply images `like`.

        For an int position they are 0-d and on the CPU; for a tensor of positions (B,) they are (B, 1, ...) and beside `like`.
        """
        if isinstance(position, int):
            key = (name, like.dtype)
            if key not in self.entries:
                with torch.inference_mode(False):  # later calls may need gradients
                    table = torch.as_tensor(self.tables[name]).to(like.dtype)
                    columns = table.view(len(table), -1).unbind(1)
                    self.entries[key] = list(zip(*(column.unbind() for column in columns)))
            return self.entries[key][position]
        entries = self.table_on(name, like.device)[position].to(like.dtype).view(len(position), -1)
        return tuple(column.view(-1, *[1] * (like.dim() - 1)) for column in entries.unbind(1))

    def table_on(self, name: str, device: torch.device) -> torch.Tensor:
        """A table as a tensor on `device`, with one NaN appended for timesteps outside the chain."""
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
    """The tables of q and p on a subsequence of the timesteps (IDDPM section 4), by position in the subsequence.

    Args:
        timesteps: the subsequence, ascending.
        betas, alphas_cumprod: (T,) float64, of all timesteps.
        variance_type, prediction_type: as in `VariationalDDPMScheduler`.
        x_start_mse: (T,) float64, for the variance "analytic".
    """

    def __init__(
        self,
        timesteps: list[int],
        betas: np.ndarray,
        alphas_cumprod: np.ndarray,
        variance_type: str,
        prediction_type: str,
        x_start_mse: np.ndarray | None = None,
    ):
        super().__init__({})
        T, tables = len(betas), self.tables
        self.timesteps = timesteps
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
        # The variance of the first step is 0. Its logarithm, which is the decoder's scale, is that of the second step, as in
        # the paper's code, or of beta in a chain of one step.
        clipped = np.append(variance[1] if len(variance) > 1 else beta[0], variance[1:])
        mean_of_x_start, mean_of_x_t = posterior_mean_weights(alpha_bar, alpha_bar_prev, beta)
        tables["posterior_mean"] = _columns(mean_of_x_start, mean_of_x_t)
        tables["posterior_variance"] = variance
        tables["posterior_log_variance_clipped"] = np.log(clipped)

        # p(x_{t-1} | x_t), eq. 1, where its variance is fixed (section 3.2)
        large = np.append(clipped[0], beta[1:])
        self.x_start_mse = None if x_start_mse is None else x_start_mse[timesteps]
        if self.x_start_mse is not None:
            # the error of the mean is a multiple of that of x_0 (Bao et al. 2022, theorem 1)
            clipped = model_variance = variance + mean_of_x_start**2 * self.x_start_mse
        else:
            model_variance = {"fixed_small": variance, "fixed_small_log": clipped}.get(variance_type, large)
        is_clipped = variance_type.startswith("fixed_small") or variance_type == "analytic"
        tables["model_variance"] = model_variance
        tables["model_log_variance"] = np.log(clipped if is_clipped else large)
        std = np.append(0.0, np.sqrt(model_variance[1:]))  # the last step adds no noise
        tables["ancestral"] = _columns(mean_of_x_start, mean_of_x_t, std)
        tables["log_betas"] = np.log(beta)

        # x_0 as a linear function of x_t and the network's output
        root = np.sqrt(np.maximum(alpha_bar, 1e-24))
        tables["reciprocal_sqrt_alphas_cumprod"], tables["sqrt_snr"] = 1 / root, root / np.sqrt(one_minus)
        # where nothing of x_0 is left there is no class either
        tables["x_start_of_gradient"] = np.where(alpha_bar > 1e-12, one_minus / root, 0.0)
        scale = np.where(alpha_bar >= 1e-24, root, 0.0)  # zero terminal SNR: nothing of x_0 is left
        posterior = np.maximum(mean_of_x_start, 1e-12), mean_of_x_t
        tables["x_start"] = _columns(*x_start_weights(prediction_type, scale, np.sqrt(one_minus), posterior))

        # DDIM's ODE, one step up in t; after the last timestep alpha_bar is 0
        tables["reverse"] = self._ddim(np.append(alpha_bar[1:], 0.0), np.zeros_like(beta))[:, :2]

    def ddim(self, eta: float) -> "_Tables":
        """Tables with the entry "ddim": DDIM eq. 12, with eta times the posterior's standard deviation as sigma (eq. 16).

        With the variance "analytic" the noise is that of Analytic-DDIM (Bao et al. 2022, theorem 1), also for eta = 0.
        """
        sigma = eta * np.sqrt(self.tables["posterior_variance"])
        alpha_bar_prev = np.append(1.0, self.tables["sqrt_alphas_cumprod"][:-1] ** 2)
        weights = self._ddim(alpha_bar_prev, sigma)
        if self.x_start_mse is not None:
            variance = sigma**2 + weights[:, 0] ** 2 * self.x_start_mse
            weights[1:, 2] = np.sqrt(variance[1:])  # the last step adds no noise
        return _Tables({"ddim": weights})

    def _ddim(self, alpha_bar_to, sigma):
        """The weights of x_0, x_t and the noise in DDIM eq. 12, with epsilon = (x_t - sqrt(abar) x_0) / sqrt(1 - abar)."""
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
def ddim_tables(chain: ChainTables, eta: float) -> _Tables:
    """`chain.ddim(eta)`, kept for the latest few chains and etas."""
    return chain.ddim(eta)


def _columns(*arrays):
    return np.stack(arrays, axis=1)


def weighted_sum(
    weights: tuple[torch.Tensor, ...], x: torch.Tensor, y: torch.Tensor, onto: torch.Tensor | None = None
) -> torch.Tensor:
    """Return a * x + b * y for weights (a, b) of `columns_at`, added in place to `onto` if that is given."""
    a, b = weights
    if a.dim() == 0:
        total = x * a if onto is None else onto.add_(x, alpha=a)  # type: ignore[arg-type]
        return total.add_(y, alpha=b)  # type: ignore[arg-type]
    total = x * a if onto is None else onto.addcmul_(x, a)
    return total.addcmul_(y, b)
