"""Batches without end, in an order that a resumed run continues."""

import dataclasses
import re
from collections.abc import Iterator

import torch
from accelerate import Accelerator, PartialState

from ddpm_hf.data.dataset import collate
from ddpm_hf.training.accelerate_internals import end_of_loading, loader_of_own_part, skip_batches
from ddpm_hf.training.config import ConfigError, RunConfig
from ddpm_hf.training.interrupts import find_dead_workers_when_reading, ignore_interrupts
from ddpm_hf.training.messages import print_above_progress_bar


def open_loader(dataset, config: RunConfig, accelerator: Accelerator) -> torch.utils.data.DataLoader:
    """A loader of this process's batches, on its device; their order depends on the seed and the epoch alone.

    For a stream it depends on the numbers of processes and workers, too.
    """
    loader = torch.utils.data.DataLoader(
        dataset,
        config.batch_size,
        shuffle=None if config.streaming else True,
        drop_last=True,
        num_workers=config.num_workers,
        collate_fn=collate,
        worker_init_fn=ignore_interrupts,
        pin_memory=accelerator.device.type == "cuda",
        generator=torch.Generator(),  # reading ahead must not draw from the generator of noise and timesteps
    )
    return loader_of_own_part(loader, accelerator) if config.streaming else accelerator.prepare(loader)


@dataclasses.dataclass
class Position:
    """The place of a process in its run: optimizer steps in all, and batches of the present epoch.

    The order of an epoch depends on the number of its images: where that has changed, a resumed run starts the epoch again.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    images: int | None = None  # None for a stream

    state_dict = dataclasses.asdict

    def load_state_dict(self, state):
        self.step, self.epoch, self.batch = state["step"], state["epoch"], state["batch"]
        before = state.get("images", self.images)
        if before != self.images:
            self.batch = 0
            if PartialState().is_main_process:
                print_above_progress_bar(
                    f"the data has {self.images} images, {before} before the run was stopped; the epoch starts again"
                )


def batches(loader: torch.utils.data.DataLoader, config: RunConfig, position: Position) -> Iterator[dict]:
    """Yield batches without end from `position` on, and move it with each.

    Workers that were killed are started again, and read on from the same place.

    Raises:
        ConfigError: an image or label that cannot be read, epochs without a batch, or workers that are killed again before
            they have read a batch.
    """
    empty_epochs, place_of_death = 0, None  # the parts of a stream are others in each epoch
    while empty_epochs < 10:
        loader.set_epoch(position.epoch)
        remaining = skip_batches(loader, position.batch)
        epoch = iter(remaining)
        try:
            while (batch := _next(epoch, config)) is not None:
                position.batch += 1
                yield batch
        except _WorkerKilled as error:
            place = dataclasses.astuple(position)
            if place == place_of_death:
                raise ConfigError(
                    f"{error} again, before a batch was read; there is too little memory: give fewer num_workers, or a smaller "
                    "batch_size"
                ) from error
            print_above_progress_bar(
                f"{error}, most likely for want of memory (fewer num_workers need less); all are started again"
            )
            place_of_death = place
            end_of_loading(remaining)
            continue
        empty_epochs = 0 if position.batch else empty_epochs + 1
        position.epoch, position.batch = position.epoch + 1, 0
    raise ConfigError(
        f"batch_size={config.batch_size} is more than the images of {config.data!r} to a process, or, of a stream, to "
        f"each of its num_workers={config.num_workers}"
    )


class _WorkerKilled(RuntimeError):
    """A process that reads images has died."""


def _next(epoch, config):
    try:
        batch = next(epoch, None)
    except Exception as error:  # a worker's message holds its whole traceback; the last line says what happened
        message = str(error).strip() or type(error).__name__
        if isinstance(error, RuntimeError) and (
            worker := re.match(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)", message)
        ):
            raise _WorkerKilled(f"the process that reads images, {worker[1]}, was killed") from error
        raise ConfigError(f"data={config.data!r}: {message.splitlines()[-1]}") from error
    find_dead_workers_when_reading()
    return batch
