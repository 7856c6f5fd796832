"""Samples and likelihoods of a saved pipeline."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ddpm_hf.evaluation.animation import animate

__all__ = ["animate"]


def __getattr__(name):
    if name == "animate":  # when it is first used: a mistyped option must not wait for torch
        from ddpm_hf.evaluation.animation import animate

        return animate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
