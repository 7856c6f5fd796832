"""Coefficients of q and p by position in a chain, computed once in float64."""

import functools
import math

import torch

from ddpm_hf.schedulers.prediction import Coefficient, x_start_weights


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
                    table = self.tables[name].to(like.dtype)
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
                table = self.tables[name]
                if table.is_floating_point():
                    table = torch.cat((table, torch.full_like(table[:1], math.nan)))
                    table = table.float() if device.type == "mps" else table
                self.tensors[key] = table.to(device)
        return self.tensors[key]


class ChainTables(_Tables):
    """The tables of q and p on a subsequence of the timesteps (IDDPM section 4), by position in the subsequence.

    All are differentiable functions of betas and alphas_cumprod.

    Args:
        timesteps: the subsequence, ascending.
        betas, alphas_cumprod: (T,) float64, of all timesteps.
        variance_type, prediction_type: as in `VariationalDDPMScheduler`.
        x_start_mse: (T,) float64, for the variance "analytic".
    """

    def __init__(
        self,
        timesteps: list[int],
        betas: torch.Tensor,
        alphas_cumprod: torch.Tensor,
        variance_type: str,
        prediction_type: str,
        x_start_mse: torch.Tensor | None = None,
    ):
        super().__init__({})
        T, tables = len(betas), self.tables
        self.timesteps = timesteps
        self.position = {t: i for i, t in enumerate(timesteps)}
        is_whole = len(timesteps) == T
        alpha_bar = alphas_cumprod if is_whole else alphas_cumprod[timesteps]
        one, zero = torch.ones_like(alpha_bar[:1]), torch.zeros_like(alpha_bar[:1])
        alpha_bar_prev = torch.cat((one, alpha_bar[:-1]))
        beta = betas if is_whole else 1 - alpha_bar / alpha_bar_prev
        one_minus = 1 - alpha_bar

        # q(x_t | x_0), eq. 4
        tables["timesteps"] = torch.tensor(timesteps, device="cpu")
        tables["positions"] = torch.full((T,), len(timesteps), device="cpu")
        tables["positions"][timesteps] = torch.arange(len(timesteps), device="cpu")
        tables["sqrt_alphas_cumprod"] = alpha_bar.sqrt()
        tables["sqrt_one_minus_alphas_cumprod"] = one_minus.sqrt()
        tables["one_minus_alphas_cumprod"] = one_minus
        tables["log_one_minus_alphas_cumprod"] = one_minus.log()
        tables["x_t"] = _columns(alpha_bar.sqrt(), one_minus.sqrt())  # of x_0 and noise

        # q(x_{t-1} | x_t, x_0), eq. 6-7
        variance = beta * (1 - alpha_bar_prev) / one_minus
        # The variance of the first step is 0. Its logarithm, which is the decoder's scale, is that of the second step, as in
        # the paper's code, or of beta in a chain of one step.
        clipped = torch.cat((variance[1:2] if len(variance) > 1 else beta, variance[1:]))
        mean_of_x_start, mean_of_x_t = posterior_mean_weights(alpha_bar, alpha_bar_prev, beta)
        tables["posterior_mean"] = _columns(mean_of_x_start, mean_of_x_t)
        tables["posterior_variance"] = variance
        tables["posterior_log_variance_clipped"] = clipped.log()

        # p(x_{t-1} | x_t), eq. 1, where its variance is fixed (section 3.2)
        large = torch.cat((clipped[:1], beta[1:]))
        self.x_start_mse = None if x_start_mse is None else x_start_mse[timesteps]
        if self.x_start_mse is not None:
            # the error of the mean is a multiple of that of x_0 (Bao et al. 2022, theorem 1)
            clipped = model_variance = variance + mean_of_x_start**2 * self.x_start_mse
        else:
            model_variance = {"fixed_small": variance, "fixed_small_log": clipped}.get(variance_type, large)
        is_clipped = variance_type.startswith("fixed_small") or variance_type == "analytic"
        tables["model_variance"] = model_variance
        tables["model_log_variance"] = (clipped if is_clipped else large).log()
        std = torch.cat((zero, model_variance[1:].sqrt()))  # the last step adds no noise
        tables["ancestral"] = _columns(mean_of_x_start, mean_of_x_t, std)
        tables["log_betas"] = beta.log()

        # x_0 as a linear function of x_t and the network's output
        root = alpha_bar.clamp(min=1e-24).sqrt()
        tables["reciprocal_sqrt_alphas_cumprod"], tables["sqrt_snr"] = 1 / root, root / one_minus.sqrt()
        # where nothing of x_0 is left there is no class either
        tables["x_start_of_gradient"] = torch.where(alpha_bar > 1e-12, one_minus / root, 0.0)
        scale = torch.where(alpha_bar >= 1e-24, root, 0.0)  # zero terminal SNR: nothing of x_0 is left
        posterior = mean_of_x_start.clamp(min=1e-12), mean_of_x_t
        tables["x_start"] = _columns(*x_start_weights(prediction_type, scale, one_minus.sqrt(), posterior))

        # DDIM's ODE, one step up in t; after the last timestep alpha_bar is 0
        tables["reverse"] = self._ddim(torch.cat((alpha_bar[1:], zero)), torch.zeros_like(beta))[:, :2]

    def ddim(self, eta: float) -> "_Tables":
        """Tables with the entry "ddim": DDIM eq. 12, with eta times the posterior's standard deviation as sigma (eq. 16).

        With the variance "analytic" the noise is that of Analytic-DDIM (Bao et al. 2022, theorem 1), also for eta = 0.
        """
        sigma = eta * self.tables["posterior_variance"].sqrt()
        alpha_bar = self.tables["sqrt_alphas_cumprod"] ** 2
        weights = self._ddim(torch.cat((torch.ones_like(alpha_bar[:1]), alpha_bar[:-1])), sigma)
        if self.x_start_mse is not None:
            variance = sigma**2 + weights[:, 0] ** 2 * self.x_start_mse
            weights[1:, 2] = variance[1:].sqrt()  # the last step adds no noise
        return _Tables({"ddim": weights})

    def _ddim(self, alpha_bar_to, sigma):
        """The weights of x_0, x_t and the noise in DDIM eq. 12, with epsilon = (x_t - sqrt(abar) x_0) / sqrt(1 - abar)."""
        of_epsilon = (1 - alpha_bar_to - sigma**2).clamp(min=0.0).sqrt()
        of_x_t = of_epsilon / self.tables["sqrt_one_minus_alphas_cumprod"]
        return _columns(alpha_bar_to.sqrt() - of_x_t * self.tables["sqrt_alphas_cumprod"], of_x_t, sigma)


def posterior_mean_weights(
    alpha_bar: Coefficient, alpha_bar_prev: Coefficient, beta: Coefficient
) -> tuple[Coefficient, Coefficient]:
    """The weights of x_0 and x_t in the mean of q(x_{t-1} | x_t, x_0), eq. 7; NumPy arrays or tensors."""
    of_x_start = beta * alpha_bar_prev**0.5 / (1 - alpha_bar)
    return of_x_start, (1 - alpha_bar_prev) * (1 - beta) ** 0.5 / (1 - alpha_bar)


@functools.lru_cache(maxsize=8)
def ddim_tables(chain: ChainTables, eta: float) -> _Tables:
    """`chain.ddim(eta)`, kept for the latest few chains and etas."""
    return chain.ddim(eta)


def _columns(*columns):
    return torch.stack(columns, dim=1)


def weighted_sum(
    weights: tuple[torch.Tensor, ...], x: torch.Tensor, y: torch.Tensor, onto: torch.Tensor | None = None
) -> torch.Tensor:
    """Return a * x + b * y for weights (a, b) of `columns_at`, added in place to `onto` if that is given."""
    a, b = weights
    if a.dim() == 0 and not a.requires_grad:
        total = x * a if onto is None else onto.add_(x, alpha=a)  # type: ignore[arg-type]
        return total.add_(y, alpha=b)  # type: ignore[arg-type]
    total = x * a if onto is None else onto.addcmul_(x, a)
    return total.addcmul_(y, b)
