"""Beta schedules, each with the paper or the code that it comes from, and subsequences of their timesteps."""

import math
from collections.abc import Callable

import numpy as np

MOST_TIMESTEPS = 100_000  # so that a config from elsewhere cannot ask for all memory
LEAST_BETA = 1e-15  # a smaller beta is lost in 1 - beta


# Each function takes the number of timesteps T, beta_start and beta_end, and returns T float64 betas.


def linear_betas(T: int, start: float, end: float) -> np.ndarray:
    """Linear from start to end (Ho, Jain, Abbeel 2020, section 4)."""
    return np.linspace(start, end, T)


def quad_betas(T: int, start: float, end: float) -> np.ndarray:
    """Linear in the square root: "quad" of the paper's code, "scaled_linear" of diffusers, as in latent diffusion."""
    return np.linspace(start**0.5, end**0.5, T) ** 2


def warmup10_betas(T: int, start: float, end: float) -> np.ndarray:
    """Linear from start to end over the first tenth, then end (the paper's code)."""
    return _warmup_betas(T, start, end, 0.1)


def warmup50_betas(T: int, start: float, end: float) -> np.ndarray:
    """Linear from start to end over the first half, then end (the paper's code)."""
    return _warmup_betas(T, start, end, 0.5)


def _warmup_betas(T, start, end, fraction):
    betas = np.full(T, end, dtype=np.float64)
    steps = int(T * fraction)
    betas[:steps] = np.linspace(start, end, steps)
    return betas


def const_betas(T: int, start: float, end: float) -> np.ndarray:
    """The constant end (the paper's code)."""
    return np.full(T, end, dtype=np.float64)


def jsd_betas(T: int, start: float, end: float) -> np.ndarray:
    """1/T, 1/(T - 1), ..., 1 (Sohl-Dickstein et al. 2015, appendix B.1; the paper's code)."""
    return 1 / np.linspace(T, 1, T)


def cosine_betas(T: int, start: float, end: float) -> np.ndarray:
    """A squared cosine as alpha_bar (IDDPM eq. 17): "squaredcos_cap_v2" of diffusers, here in float64."""

    def alpha_bar(u):
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    return _betas_of(alpha_bar, T)


def laplace_betas(T: int, start: float, end: float) -> np.ndarray:
    """A Laplace distribution of log SNR (Hang et al. 2024), in the form of diffusers."""

    def alpha_bar(u):
        log_snr = -0.5 * math.copysign(1, 0.5 - u) * math.log(1 - 2 * abs(0.5 - u) + 1e-6)
        return 1 / math.sqrt(1 + math.exp(-log_snr))

    return _betas_of(alpha_bar, T)


def _betas_of(alpha_bar, T, max_beta=0.999):
    """The betas, `max_beta` at most, whose products of 1 - beta are alpha_bar(u) at u = 1/T, 2/T, ..., 1."""
    values = np.array([alpha_bar(u) for u in np.arange(T + 1) / T])
    return np.minimum(1 - values[1:] / values[:-1], max_beta)


def sigmoid_betas(T: int, start: float, end: float) -> np.ndarray:
    """A sigmoid from start to end (GeoDiff, Xu et al. 2022), in the form of diffusers."""
    return (end - start) / (1 + np.exp(-np.linspace(-6, 6, T))) + start


def linear_scaled_by_T_betas(T: int, start: float, end: float) -> np.ndarray:
    """Linear, with start and end multiplied by 1000 / T: the "linear" schedule of IDDPM's code."""
    return np.linspace(start * 1000 / T, end * 1000 / T, T)


BETA_SCHEDULES: dict[str, Callable[[int, float, float], np.ndarray]] = {
    "linear": linear_betas,
    "quad": quad_betas,
    "warmup10": warmup10_betas,
    "warmup50": warmup50_betas,
    "const": const_betas,
    "jsd": jsd_betas,
    "scaled_linear": quad_betas,
    "squaredcos_cap_v2": cosine_betas,
    "sigmoid": sigmoid_betas,
    "laplace": laplace_betas,
    "cosine": cosine_betas,
    "linear_scaled_by_T": linear_scaled_by_T_betas,
}


# Not all of diffusers' schedulers know these names; they are given the betas, as `trained_betas`.
OWN_SCHEDULES = ("quad", "warmup10", "warmup50", "const", "jsd", "sigmoid", "laplace", "cosine", "linear_scaled_by_T")


def check_betas(betas: np.ndarray, source: str) -> None:
    """Raise ValueError for betas outside [1e-15, 1], or so large that nothing of x_0 is left before the last timestep.

    Args:
        betas: (T,) float64.
        source: the arguments that they come from, for the message.
    """
    possible = (betas >= LEAST_BETA) & (betas <= 1)
    if not possible.all():
        t = int(np.argmin(possible))
        raise ValueError(f"{source} has beta={betas[t]} at t={t}; betas must be in [{LEAST_BETA}, 1]")
    lost = np.cumprod(1 - betas)[:-1] == 0
    if lost.any():
        t = int(np.argmax(lost))
        raise ValueError(f"{source} leaves nothing of x_0 at t={t}, before the last timestep; lower the betas")


def space_timesteps(num_train_timesteps: int, sections: int | str | list[int]) -> list[int]:
    """Choose a subsequence of 0 .. num_train_timesteps - 1, evenly strided within equal sections (IDDPM section 4).

    Args:
        num_train_timesteps: T.
        sections: the number of steps to keep in each section, and thereby the number of sections: 250 or "250" (one section),
            "10,15,20" or [10, 15, 20] (three); or "ddim50": 50 steps at the smallest integer stride that gives 50.

    Returns:
        Original timesteps, ascending. Both ends of each section are kept; fractional steps are rounded half to even.

    Raises:
        ValueError: a section has fewer timesteps than are to be kept, or `sections` cannot be read.
    """
    T = num_train_timesteps
    try:
        if isinstance(sections, str) and sections.startswith("ddim"):
            count = int(sections.removeprefix("ddim"))
            for stride in range(1, T):
                if len(range(0, T, stride)) == count:
                    return list(range(0, T, stride))
            raise ValueError(f"sections={sections!r}: no integer stride keeps {count} of {T} timesteps")
        if isinstance(sections, str):
            counts = [int(part) for part in sections.split(",")]
        else:
            counts = [sections] if isinstance(sections, int) else [int(part) for part in sections]
    except (TypeError, ValueError) as error:
        if str(error).startswith("sections"):
            raise
        raise ValueError(f"sections={sections!r} cannot be read; give 250, '250', '10,15,20' or 'ddim50'") from None
    if not counts or min(counts) < 1:
        raise ValueError(f"sections={sections!r}: each section must keep one timestep at least")
    kept, start = set(), 0
    for i, count in enumerate(counts):
        size = T // len(counts) + (i < T % len(counts))
        if count > size:
            raise ValueError(f"sections={sections!r}: cannot keep {count} timesteps of a section of {size}")
        step, offset = (size - 1) / (count - 1) if count > 1 else 1, 0.0
        for _ in range(count):
            kept.add(start + round(offset))
            offset += step
        start += size
    return sorted(kept)
