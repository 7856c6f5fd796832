"""What this package uses of accelerate beyond its documented interface, checked on accelerate 1.15.

tests/training/test_accelerate_internals.py says which of these has changed in another version.
"""

from pathlib import Path

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.data_loader import prepare_data_loader
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import load


def known_trackers() -> list[str]:
    """The names of all trackers that accelerate supports."""
    return [str(name) for name in LOGGER_TYPE_TO_CLASS]


def installed_trackers() -> list[str]:
    """The names of those trackers whose packages are installed."""
    return [str(name) for name in get_available_trackers()]


def has_mixed_precision(accelerator: Accelerator) -> bool:
    """Whether autocast is on; accelerate ignores mixed_precision in silence where the device cannot do it."""
    return accelerator.native_amp


def loader_of_own_part(loader: torch.utils.data.DataLoader, accelerator: Accelerator) -> torch.utils.data.DataLoader:
    """The loader of a data set that is divided among processes already, with batches on this process's device.

    `accelerator.prepare` would divide it again. A process whose part is shorter starts its next epoch earlier.
    """
    return prepare_data_loader(
        loader,
        accelerator.device,
        num_processes=1,
        process_index=0,
        put_on_device=True,
        dispatch_batches=False,
        non_blocking=accelerator.non_blocking,
    )


def skip_batches(loader: torch.utils.data.DataLoader, count: int) -> torch.utils.data.DataLoader:
    """A loader that starts after `count` batches of the epoch, and copies them to the device as `loader` does."""
    remaining = skip_first_batches(loader, count)
    remaining._non_blocking = loader._non_blocking  # accelerate forgets it
    return remaining


def end_of_loading(loader: torch.utils.data.DataLoader) -> None:
    """Remove a loader whose iteration failed from accelerate's list of active ones."""
    loader.end()


def check_random_states(checkpoint: Path, process: int) -> None:
    """Raise an error where the random states of a process cannot be read; accelerate would ignore that in silence."""
    load(checkpoint / f"random_states_{process}.pkl")
