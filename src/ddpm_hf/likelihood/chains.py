"""The chain with the lowest bound for a trained network: optimal variances and optimal lists of timesteps.

Both follow from one table, how well the network predicts x_0 at each timestep (Bao et al. 2022, "Analytic-DPM"; Watson et al.
2021). Each network evaluation at t serves all steps from t.
"""

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from numbers import Integral
from typing import NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from ddpm_hf.arguments import shown
from ddpm_hf.likelihood.bound import BoundEvaluator
from ddpm_hf.schedulers.ddpm import VARIANCE_TYPES, VariationalDDPMScheduler
from ddpm_hf.schedulers.gaussian import discretized_gaussian_log_likelihood
from ddpm_hf.schedulers.optimal import StepCosts, Transitions, best_chains, clipped_x_start_mse, transitions
from ddpm_hf.schedulers.precision import to_float64

GROUPS = 10  # of images; leaving each out in turn gives standard errors
LOG_VARIANCE_STEP = 0.25  # the decoder is tabulated at these log variances: linear interpolation is 0.004 nats off
MOST_SEARCHED = 10_000  # timesteps: 0.8 GB for each table of their pairs
MOST_DECODED = 2**16  # pixels whose decoder is tabulated in a network call
LOG_RATIOS = np.concatenate(([0.0], np.geomspace(1e-3, 30.0, 63)))  # of the upper and lower ends of a learned range


class Estimate(NamedTuple):
    """Numbers and their standard errors over the images."""

    value: np.ndarray
    standard_error: np.ndarray


@dataclasses.dataclass
class DenoisingErrors:
    """How well a network predicts x_0 at some timesteps: means over groups of images (G, n, ...) float64.

    Attributes:
        scheduler: of the process; all its T timesteps count, whatever its chain.
        timesteps: n ascending timesteps.
        squared_error: (G, n), of x_0 on the scale [-1, 1].
        decoder: (G, n, S), negative log-likelihood of the decoder in nats per dimension, for `log_variances`; with
            variance_type "learned_range" these are the lower ends of the range.
        log_variances: (S,).
        squared_pixels: (G,), mean of x_0 squared.
        share, decay, decayed_error: with "learned_range", the means of w (G, n), of exp(-w R) (G, n, 64), and of the squared
            error times exp(-w R) (G, n, 64), for w the network's place in the range and R = `LOG_RATIOS`. Else None.
        evaluations: network evaluations.
    """

    scheduler: VariationalDDPMScheduler
    timesteps: np.ndarray
    squared_error: np.ndarray
    decoder: np.ndarray
    log_variances: np.ndarray
    squared_pixels: np.ndarray
    share: np.ndarray | None
    decay: np.ndarray | None
    decayed_error: np.ndarray | None
    evaluations: int

    @property
    def alphas_cumprod(self) -> np.ndarray:
        """(T,) float64."""
        return self.scheduler.alphas_cumprod.numpy()

    def x_start_mse(self) -> Estimate:
        """The mean squared error of x_0 at each of the T timesteps, clipped by `clipped_x_start_mse`."""
        return self._jackknife(lambda tables: clipped_x_start_mse(tables.squared_error, self.alphas_cumprod))

    def step_costs(self, variance_type: str) -> StepCosts:
        """The bound's terms for every pair of timesteps. variance_type: "analytic", or that of the network's scheduler."""
        return self._costs(self._checked(variance_type), self._tables[0])

    def bits_per_dim(self, chain: list[int], variance_type: str) -> Estimate:
        """The bound of a chain, ascending timesteps, in bits per dimension."""
        kind = self._checked(variance_type)
        return self._jackknife(lambda tables: np.array(self._cost_of_chain(kind, chain, tables)))

    @functools.cached_property
    def _tables(self):
        """The means over all groups, and those without each of them if there are several, at all T timesteps."""
        groups = np.arange(len(self.squared_error))
        without_one = [groups != left_out for left_out in groups] if len(groups) > 1 else []
        return [self._tables_of(chosen) for chosen in (groups, *without_one)]

    def _tables_of(self, chosen):
        def over_time(table):
            return self._over_time(table[chosen].mean(0))

        log_error = np.log(np.maximum(self.squared_error[chosen].mean(0), 1e-30))
        moments = None if self.share is None else tuple(map(over_time, (self.share, self.decay, self.decayed_error)))
        abar = self.alphas_cumprod
        prior = 0.5 * (abar * (self.squared_pixels[chosen].mean(0) - 1) - np.log1p(-abar))
        return _Tables(np.exp(self._over_time(log_error)), over_time(self.decoder), moments, prior)

    def _jackknife(self, statistic):
        value, *parts = map(statistic, self._tables)
        groups = len(parts)
        if not parts:
            return Estimate(value, np.full_like(value, math.nan))
        return Estimate(value, np.sqrt((groups - 1) / groups * ((parts - np.mean(parts, axis=0)) ** 2).sum(0)))

    def _checked(self, variance_type):
        own = self.scheduler.variance_type
        if variance_type == "analytic":
            return "analytic"
        if own == "learned":
            raise ValueError("variance_type='learned' is known for the steps of the training alone; choose 'analytic'")
        if variance_type not in VARIANCE_TYPES or (variance_type == "learned_range") != (own == "learned_range"):
            raise ValueError(
                f"variance_type={shown(variance_type)} is not for a network of variance_type={own!r}; choose 'analytic' or "
                f"{own!r}"
            )
        return variance_type.removesuffix("_log")

    def _over_time(self, table):
        """A table (n, ...) at all T timesteps (T, ...), linear in the log signal-to-noise ratio."""
        abar = self.alphas_cumprod
        places = -np.log(abar / (1 - abar))
        rows = table.reshape(len(table), -1)
        columns = [np.interp(places, places[self.timesteps], column) for column in rows.T]
        return np.stack(columns, axis=-1).reshape(len(abar), *table.shape[1:])

    def _costs(self, kind, tables):
        abar, error = self.alphas_cumprod, tables.squared_error
        T, q = len(abar), transitions(abar[:, None], abar[None, :])
        kl = self._kl(kind, q, error, tables.moments, np.arange(T))
        alone, first = (
            np.stack([self._decode(kind, tables.decoder[t], log_variance[t], error[t], abar[t]) for t in range(T)])
            for log_variance in (np.log(1 - abar), np.log(q.variance))
        )
        nats = first, alone, kl, tables.prior
        return StepCosts(*(term / math.log(2) for term in nats))

    def _cost_of_chain(self, kind, chain, tables):
        abar, error = self.alphas_cumprod[chain], tables.squared_error[chain]
        q = transitions(abar[:-1], abar[1:])
        kl = self._kl(kind, q, error[1:], tables.moments, np.array(chain[1:], dtype=int))
        log_variance = np.log(q.variance[0] if len(chain) > 1 else 1 - abar[0])
        decoder = self._decode(kind, tables.decoder[chain[0]], log_variance, error[0], abar[0])
        return float(decoder + kl.sum() + tables.prior[chain[-1]]) / math.log(2)

    def _kl(self, kind, q: Transitions, error, moments, t):
        """KL divergences in nats per dimension, of steps from timesteps t."""
        excess = q.of_x_start**2 / q.variance  # of the squared distance of the means, in posterior variances, per error
        if kind == "analytic":  # its variance has the clipped error
            clipped = clipped_x_start_mse(error, self.alphas_cumprod[t])
            return 0.5 * (np.log1p(excess * clipped) + excess * (error - clipped) / (1 + excess * clipped))
        if kind == "fixed_small":
            return 0.5 * excess * error
        log_ratio = np.log(q.beta / q.variance)
        if kind == "fixed_large":
            return 0.5 * (log_ratio + np.exp(-log_ratio) * (1 + excess * error) - 1)
        share, decay, decayed_error = moments
        t = np.broadcast_to(t, log_ratio.shape)
        decay, decayed_error = (_interpolated(table, t, log_ratio) for table in (decay, decayed_error))
        return 0.5 * (share[t] * log_ratio + decay + excess * decayed_error - 1)

    def _decode(self, kind, table, log_variance, error, abar):
        """The decoder's nats per dimension at a chain's first timestep; log_variance: that of the second step's posterior."""
        if kind == "analytic":
            log_variance = np.full_like(log_variance, np.log(clipped_x_start_mse(error, abar)))
        return np.interp(log_variance, self.log_variances, table)


class _Tables(NamedTuple):
    """Means over groups at all T timesteps: (T,), (T, S), three of the learned range or None, and L_T in nats (T,)."""

    squared_error: np.ndarray
    decoder: np.ndarray
    moments: tuple[np.ndarray, ...] | None
    prior: np.ndarray


def _interpolated(table, t, log_ratio):
    """Entries of a table (T, R) at rows t, linear in the logarithm of R's spacing."""
    place = np.interp(log_ratio, LOG_RATIOS, np.arange(len(LOG_RATIOS)))
    valid = np.isfinite(place)
    lower = np.clip(np.where(valid, place, 0).astype(int), 0, len(LOG_RATIOS) - 2)
    part = place - lower
    return table[t, lower] * (1 - part) + table[t, lower + 1] * part


@torch.no_grad()
def measure_denoising_errors(
    unet: Callable,
    scheduler: VariationalDDPMScheduler,
    x_start: torch.Tensor,
    *,
    num_evaluations: int = 100,
    class_labels: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    clip_sample: bool = True,
    batch_size: int | None = None,
    levels: int | None = None,
    progress_bar: bool = False,
) -> DenoisingErrors:
    """Measures how well a network predicts x_0, at timesteps evenly spaced in the log signal-to-noise ratio.

    Args:
        num_evaluations: network evaluations per image, each at another timestep; at most T.
        unet, scheduler, x_start, class_labels, generator, clip_sample, batch_size, levels, progress_bar: as in `bits_per_dim`.

    Raises:
        ValueError: as `bits_per_dim`; fewer than 2 evaluations; zero terminal SNR; a prediction_type without x_0 ("previous").
    """
    scheduler = copy.copy(scheduler)
    if hasattr(scheduler, "chain"):  # else the evaluator refuses it
        scheduler.set_timesteps(scheduler.config.num_train_timesteps)
    evaluate = BoundEvaluator(
        unet,
        scheduler,
        x_start,
        class_labels=class_labels,
        clip_sample=clip_sample,
        levels=levels,
        batch_size=batch_size,
    )
    timesteps = _spread_timesteps(scheduler, num_evaluations)
    count, size = len(x_start), batch_size or len(x_start)
    groups = min(GROUPS, count)
    group_of = torch.arange(count) * groups // count
    # a smaller variance is no posterior's, and is far below the width of a bin
    abar = scheduler.alphas_cumprod.numpy()
    smallest = np.append(transitions(abar[:-1], abar[1:]).variance, 1 - abar[-1]).min()
    lowest = min(math.log(smallest), 2 * math.log(0.1 / (evaluate.levels - 1)))
    log_variances = np.arange(lowest, LOG_VARIANCE_STEP, LOG_VARIANCE_STEP)
    # Each image has one noise at all timesteps. Errors of the table are then alike at neighboring timesteps; if they were
    # independent, the search would choose timesteps for their errors.
    noise = evaluate.noise(x_start.shape, generator)
    tables: list[list[torch.Tensor]] = []
    with evaluate, tqdm(total=count * len(timesteps), desc="denoising errors", disable=not progress_bar or None) as bar:
        for t in timesteps:
            rows = []
            for index in torch.arange(count).split(size):
                x_0 = x_start[index.to(x_start.device)]
                rows.append(_moments_of(evaluate, index, x_0, int(t), noise[index], log_variances))
                bar.update(len(index))
            tables.append([torch.cat(parts) for parts in zip(*rows)])
    squared_error, decoder, share, decay, decayed_error = (
        _by_group(column, group_of, groups) for column in zip(*tables)
    )
    learned = scheduler.variance_type == "learned_range"
    squared_pixels = to_float64(x_start).square().flatten(1).mean(1).cpu()
    return DenoisingErrors(
        scheduler=scheduler,
        timesteps=timesteps,
        squared_error=squared_error[..., 0],
        decoder=decoder,
        log_variances=log_variances,
        squared_pixels=np.stack([squared_pixels[group_of == g].mean().numpy() for g in range(groups)]),
        share=share[..., 0] if learned else None,
        decay=decay if learned else None,
        decayed_error=decayed_error if learned else None,
        evaluations=count * len(timesteps),
    )


def _spread_timesteps(scheduler, count):
    if not (isinstance(count, Integral) and count >= 2):
        raise ValueError(f"num_evaluations={shown(count)} must be an integer, 2 or more")
    if scheduler.prediction_type == "previous":
        raise ValueError("prediction_type='previous' gives x_{t-1}, not x_0; its chain cannot be shortened")
    abar = scheduler.alphas_cumprod.numpy()
    if abar[-1] <= 0:
        raise ValueError(
            "the last timestep has zero signal-to-noise ratio (rescale_betas_zero_snr), which is not supported"
        )
    T = len(abar)
    if T > MOST_SEARCHED:
        raise ValueError(
            f"num_train_timesteps={T} is too many: tables of pairs of timesteps are for up to {MOST_SEARCHED}"
        )
    if count >= T:
        return np.arange(T)
    noise = np.log((1 - abar) / abar)
    even = np.interp(np.linspace(noise[0], noise[-1], count), noise, np.arange(T)).round().astype(int)
    # where timesteps are sparse in noise, as at its ends, there are fewer than `count`: the rest is spread evenly in t
    missing = np.setdiff1d(np.linspace(0, T - 1, count).round().astype(int), even)
    return np.union1d(even, missing[: count - len(np.unique(even))])


def _moments_of(evaluate, index, x_0, t, noise, log_variances):
    """Per image: squared error (rows, 1), decoder (rows, S), share (rows, 1), decay and decayed error (rows, R)."""
    scheduler, channels = evaluate.scheduler, x_0.shape[1]
    x_t = scheduler.q_sample(x_0, t, noise)
    output = evaluate.network_output(index.to(x_0.device), t, x_t)
    predicted = scheduler.p_mean_variance(output, x_t, t, evaluate.clip_sample).pred_original_sample
    if not output.isfinite().all():
        raise ValueError(f"the network's output at t={t} is not finite")
    error = to_float64(predicted - x_0).square().flatten(1)
    share = None
    if scheduler.variance_type == "learned_range":
        share = to_float64(output[:, channels:]).flatten(1) / 2 + 0.5
    high = math.log1p(-scheduler.alphas_cumprod[t].item())
    decoded = []
    # every n-th pixel, another one at each timestep, is enough
    stride = min(max(1, error.numel() // MOST_DECODED), error.shape[1])
    x_some, mean, w = (None if v is None else v.flatten(1)[:, t % stride :: stride] for v in (x_0, predicted, share))
    for low in log_variances:
        log_scale = torch.tensor(low / 2) if w is None else (low + w * (high - low)) / 2
        nats = -discretized_gaussian_log_likelihood(x_some, mean, log_scale, evaluate.levels)
        decoded.append(to_float64(nats).mean(1))
    decoder = torch.stack(decoded, dim=1)
    if share is None:
        return [part.cpu() for part in (error.mean(1, keepdim=True), decoder, error[:, :0], error[:, :0], error[:, :0])]
    decays = [torch.exp(-share * ratio) for ratio in LOG_RATIOS]
    decay = torch.stack([d.mean(1) for d in decays], dim=1)
    decayed = torch.stack([(error * d).mean(1) for d in decays], dim=1)
    return [part.cpu() for part in (error.mean(1, keepdim=True), decoder, share.mean(1, keepdim=True), decay, decayed)]


def _by_group(columns, group_of, groups):
    """Means over groups of images (G, n, S) of n tables (B, S)."""
    table = torch.stack(columns, dim=1)
    return np.stack([table[group_of == g].mean(0).numpy() for g in range(groups)])


class ReverseVariances(NamedTuple):
    """The variances of p(x_{t-1} | x_t) with the lowest bound, for the steps of a chain, ascending in t, float64 (K,)."""

    timesteps: list[int]
    variance: np.ndarray  # of the first step: that of the decoder
    standard_error: np.ndarray
    x_start_mse: np.ndarray  # (T,), of the scheduler's config


def estimate_reverse_variances(
    unet: Callable, scheduler: VariationalDDPMScheduler, x_start: torch.Tensor, *, num_evaluations: int = 100, **options
) -> ReverseVariances:
    """Estimates the variances that minimize the bound of the scheduler's chain (Bao et al. 2022, theorem 1 and 2).

    The mean of p misses that of the posterior by a multiple c of the error of x_0, so the best variance is that of the
    posterior plus c^2 times the mean squared error of x_0, which is measured. For a perfect network this is Bao et al.'s.

    `VariationalDDPMScheduler.from_config(scheduler.config, variance_type="analytic", x_start_mse=result.x_start_mse)` uses
    them, in any chain.

    Args:
        num_evaluations, options: as `measure_denoising_errors`.

    Raises:
        ValueError: as `measure_denoising_errors`.
    """
    errors = measure_denoising_errors(unet, scheduler, x_start, num_evaluations=num_evaluations, **options)
    mse, chain = errors.x_start_mse(), scheduler.chain
    abar = errors.alphas_cumprod[chain]
    q = transitions(np.append(1.0, abar[:-1]), abar)
    factor = q.of_x_start**2
    return ReverseVariances(
        chain, q.variance + factor * mse.value[chain], factor * mse.standard_error[chain], mse.value
    )


class OptimalTimesteps(NamedTuple):
    """The chain of a number of steps with the lowest bound."""

    timesteps: list[int]  # descending, for `set_timesteps(timesteps=...)`
    bits_per_dim: float
    standard_error: float


def optimal_timesteps(
    unet: Callable,
    scheduler: VariationalDDPMScheduler,
    x_start: torch.Tensor,
    *,
    steps: int,
    variance_type: str | None = None,
    num_evaluations: int = 100,
    **options,
) -> OptimalTimesteps:
    """Finds the list of timesteps with the lowest variational bound (Watson et al. 2021).

    Args:
        steps: their number, 1 to T.
        variance_type: "analytic", or a type for which the network was trained; None for that of the scheduler.
        num_evaluations, options: as `measure_denoising_errors`.

    Raises:
        ValueError: as `measure_denoising_errors`; steps out of range; a variance type that the network does not have.
    """
    (choice,) = optimal_chains(
        measure_denoising_errors(unet, scheduler, x_start, num_evaluations=num_evaluations, **options),
        [steps],
        variance_type or scheduler.variance_type,
    )
    return choice


def optimal_chains(errors: DenoisingErrors, steps: Iterable[int], variance_type: str) -> list[OptimalTimesteps]:
    """`optimal_timesteps` for several numbers of steps, from one table."""
    steps, T = list(steps), len(errors.alphas_cumprod)
    for count in steps:
        if not (isinstance(count, Integral) and 1 <= count <= T):
            raise ValueError(f"steps={shown(count)} must be an integer, 1 to {T}, the steps of the process")
    _, chains = best_chains(errors.step_costs(variance_type), max(steps))
    results = []
    for count in steps:
        bits = errors.bits_per_dim(chains[count - 1], variance_type)
        results.append(OptimalTimesteps(chains[count - 1][::-1], float(bits.value), float(bits.standard_error)))
    return results
