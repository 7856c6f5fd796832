"""Chains chosen by the variational bound: the cost of every step, and the list of timesteps with the lowest bound.

A step from timestep t to s < t costs the KL divergence between q(x_s | x_t, x_0) and p(x_s | x_t). Both are Gaussians whose
means differ by a multiple of the error of the predicted x_0, so the mean squared error of x_0 at t determines the costs of all
steps from t. Watson et al. 2021 ("Learning to efficiently sample from diffusion probabilistic models") choose the list of
timesteps by dynamic programming over these costs; Bao et al. 2022 ("Analytic-DPM") choose the variance.
"""

from typing import NamedTuple

import numpy as np


class Transitions(NamedTuple):
    """q(x_s | x_t, x_0) for pairs of timesteps s < t of a process, float64 of any one shape.

    Its mean is a multiple `of_x_start` of x_0 and a multiple of x_t (Ho, Jain, Abbeel 2020, eq. 7).
    """

    beta: np.ndarray
    variance: np.ndarray
    of_x_start: np.ndarray


def transitions(alphas_cumprod_s: np.ndarray, alphas_cumprod_t: np.ndarray) -> Transitions:
    """Returns the posteriors for pairs of alphas_cumprod, which are broadcast; NaN where s is not below t."""
    s, t = np.broadcast_arrays(alphas_cumprod_s, alphas_cumprod_t)
    with np.errstate(divide="ignore", invalid="ignore"):
        beta = np.where(t < s, 1 - t / s, np.nan)
        return Transitions(beta, beta * (1 - s) / (1 - t), beta * np.sqrt(s) / (1 - t))


def clipped_x_start_mse(x_start_mse: np.ndarray, alphas_cumprod: np.ndarray) -> np.ndarray:
    """Clips the mean squared error of x_0 to what is possible for data in [-1, 1] (Bao et al. 2022, theorem 2 and corollary 1).

    The best prediction has an error of at most (1 - abar) / abar, that of x_t / sqrt(abar), and of at most 1, that of 0.
    """
    return np.clip(x_start_mse, 0.0, np.minimum(1.0, (1 - alphas_cumprod) / alphas_cumprod))


class StepCosts(NamedTuple):
    """The terms of the bound for every choice of a chain's timesteps, float64, in bits per dimension.

    A chain t_1 < ... < t_K costs first[t_1, t_2] + kl[t_1, t_2] + ... + kl[t_{K-1}, t_K] + prior[t_K]; one of a single step
    costs alone[t_1] + prior[t_1].
    """

    first: np.ndarray  # (T, T), the decoder at t_1; its variance may be taken from the second step
    alone: np.ndarray  # (T,), the decoder of a chain of one step
    kl: np.ndarray  # (T, T), of the step from the column's timestep to the row's; NaN where there is none
    prior: np.ndarray  # (T,), L_T of a chain that ends there


def best_chains(costs: StepCosts, most: int) -> tuple[np.ndarray, list[list[int]]]:
    """Finds, for each number of steps from 1 to `most`, the chain with the lowest bound (Watson et al. 2021, algorithm 1).

    Args:
        costs: of T timesteps.
        most: 1 to T.

    Returns:
        The bounds (most,), in bits per dimension, and the chains, each with ascending timesteps.
    """
    impossible = np.isnan(costs.kl)
    kl, first = (np.where(impossible, np.inf, table) for table in (costs.kl, costs.first))
    # lowest cost of a chain of k + 1 steps that ends at each timestep, without the prior; and the timestep before that one
    best, before = [costs.alone], [np.full(len(kl), -1)]
    for k in range(1, most):
        total = (first if k == 1 else best[-1][:, None]) + kl
        before.append(total.argmin(0))
        best.append(total.min(0))
    bounds, chains = np.empty(most), []
    for k in range(most):
        ends = best[k] + costs.prior
        chain = [int(ends.argmin())]
        bounds[k] = ends[chain[0]]
        for step in range(k, 0, -1):
            chain.append(int(before[step][chain[-1]]))
        chains.append(chain[::-1])
    return bounds, chains
