"""Training of diffusion models and of classifiers for guidance: `from ddpm_hf.training import train`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ddpm_hf.training.loop import train

__all__ = ["train"]


def __getattr__(name):
    if name == "train":  # when it is first used: a mistyped option must not wait for torch
        from ddpm_hf.training.loop import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
