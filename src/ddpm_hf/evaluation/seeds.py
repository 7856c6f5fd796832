"""Seeds of images, and the class labels that follow from them."""

import re
from collections.abc import Iterable

import numpy as np

from ddpm_hf.arguments import shown

MOST_SEEDS = 10_000_000
LARGEST_SEED = 10**18 - 1


def parse_seeds(text: str) -> list[int]:
    """Read a list of seeds and ranges, both ends included, such as "0-49999" or "0-9,20,30-39".

    Raises:
        ValueError: another text, a range that descends, a seed that is named twice, or more than `MOST_SEEDS`.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,18})\s*(?:-\s*(\d{1,18})\s*)?", part)
        if not match:
            raise ValueError(f"seeds {shown(text)} must be numbers and ranges, as 0-49999 or 0-9,20,30-39")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"seeds {part.strip()}: the range descends; give {last}-{first}")
        if len(seeds) + last - first >= MOST_SEEDS:
            raise ValueError(f"seeds {shown(text)} are more than {MOST_SEEDS:,}; draw them in several folders")
        seeds += range(first, last + 1)
    unique, counts = np.unique(seeds, return_counts=True)
    if len(unique) < len(seeds):
        raise ValueError(f"seeds {shown(text)} overlap: {unique[counts > 1][0]} is named twice; name each seed once")
    return seeds


def seeds_from(first: int, count: int) -> range:
    """The `count` seeds from `first` on.

    Raises:
        ValueError: a negative seed, one of more than 18 digits, or more than `MOST_SEEDS`.
    """
    if not 0 <= first <= LARGEST_SEED + 1 - count:
        raise ValueError(f"seed={first} with {count:,} images: the seeds of single images are 0 to {LARGEST_SEED}")
    if count > MOST_SEEDS:
        raise ValueError(f"{count:,} seeds are more than {MOST_SEEDS:,}; draw them in several folders")
    return range(first, first + count)


def seeds_in_words(seeds: list[int]) -> str:
    """The seeds as `parse_seeds` reads them; of many ranges only the first and the last."""
    values = np.unique(seeds)
    ranges = [f"{part[0]}-{part[-1]}" if len(part) > 1 else f"{part[0]}" for part in _runs(values)]
    return ",".join(ranges if len(ranges) <= 6 else [*ranges[:3], "...", ranges[-1]])


def _runs(values):
    return np.split(values, np.flatnonzero(np.diff(values) != 1) + 1)


def labels_of_seeds(rule: str | int, seeds: Iterable[int], num_classes: int) -> list[int]:
    """The class label of each seed, which depends on the seed alone.

    Args:
        rule: "balanced" for the classes in turn (seed modulo `num_classes`), "random" for a class drawn by the seed, or the
            label of all.
        num_classes: number of classes.

    Raises:
        ValueError: a label that is no class.
    """
    if rule == "balanced":
        return [seed % num_classes for seed in seeds]
    if rule == "random":
        return [int(np.random.default_rng(seed).integers(num_classes)) for seed in seeds]
    if not isinstance(rule, int) or not 0 <= rule < num_classes:
        raise ValueError(f"class_labels={shown(rule)} must be balanced, random, or 0 to {num_classes - 1}")
    return [rule for _ in seeds]
