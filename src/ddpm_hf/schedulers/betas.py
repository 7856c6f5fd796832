"""Beta schedules, each with the paper or code that it comes from, and subsequences of their timesteps."""

import math

import numpy as np


def _betas_from_alpha_bar(alpha_bar, T, max_beta=0.999):
    u = np.arange(T + 1) / T
    values = np.array([alpha_bar(v) for v in u])
    return np.minimum(1 - values[1:] / values[:-1], max_beta)


def _cosine_alpha_bar(u):  # IDDPM eq. 17
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace_alpha_bar(u):  # diffusers' form of Hang et al. 2024
    log_snr = -0.5 * math.copysign(1, 0.5 - u) * math.log(1 - 2 * abs(0.5 - u) + 1e-6)
    return 1 / math.sqrt(1 + math.exp(-log_snr))


def _warmup(T, start, end, fraction):
    betas = np.full(T, end, dtype=np.float64)
    steps = int(T * fraction)
    betas[:steps] = np.linspace(start, end, steps)
    return betas


# Name -> float64 betas of T steps. The first three groups: the paper's code, diffusers, IDDPM.
BETA_SCHEDULES = {
    "linear": lambda T, start, end: np.linspace(start, end, T),
    "quad": lambda T, start, end: np.linspace(start**0.5, end**0.5, T) ** 2,
    "warmup10": lambda T, start, end: _warmup(T, start, end, 0.1),
    "warmup50": lambda T, start, end: _warmup(T, start, end, 0.5),
    "const": lambda T, start, end: np.full(T, end, dtype=np.float64),
    "jsd": lambda T, start, end: 1 / np.linspace(T, 1, T),
    "scaled_linear": lambda T, start, end: np.linspace(start**0.5, end**0.5, T) ** 2,
    "squaredcos_cap_v2": lambda T, start, end: _betas_from_alpha_bar(_cosine_alpha_bar, T),
    "sigmoid": lambda T, start, end: (end - start) / (1 + np.exp(-np.linspace(-6, 6, T))) + start,
    "laplace": lambda T, start, end: _betas_from_alpha_bar(_laplace_alpha_bar, T),
    "cosine": lambda T, start, end: _betas_from_alpha_bar(_cosine_alpha_bar, T),
    "linear_scaled_by_T": lambda T, start, end: np.linspace(start * 1000 / T, end * 1000 / T, T),
}


# These reach diffusers' other schedulers, not all of which know the names, as `trained_betas`.
OWN_SCHEDULES = ("quad", "warmup10", "warmup50", "const", "jsd", "sigmoid", "laplace", "cosine", "linear_scaled_by_T")


MOST_TIMESTEPS = 100_000


def space_timesteps(num_train_timesteps: int, sections: int | str | list[int]) -> list[int]:
    """A subsequence of 0 .. num_train_timesteps - 1, evenly strided within equal sections (IDDPM section 4).

    Args:
        num_train_timesteps: T.
        sections: how many steps to keep of each of as many contiguous sections: 250 or "250" (one section), "10,15,20"
            or [10, 15, 20] (three); or "ddim50": 50 steps at the smallest integer stride that gives as many.

    Returns:
        Original timesteps, ascending; both ends of each section kept, strides rounded half to even.

    Raises:
        ValueError: where that many steps cannot be kept, or `sections` cannot be read.
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
        stride = (size - 1) / (count - 1) if count > 1 else 1
        offset = 0.0
        for _ in range(count):
            kept.add(start + round(offset))
            offset += stride
        start += size
    return sorted(kept)
