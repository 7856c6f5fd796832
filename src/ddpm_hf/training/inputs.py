"""The images of a run: the training set, the held-out images, and batches without end."""

import contextlib
import dataclasses
import itertools
import re
import sys
import tarfile

import datasets
import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from datasets.distributed import split_dataset_by_node

from ddpm_hf.data.dataset import PixelTensors, collate, held_out_rows, training_set
from ddpm_hf.data.labels import label_names
from ddpm_hf.data.pixels import image_to_pixels, pixels_to_tensor
from ddpm_hf.data.sources import check_levels, load_images
from ddpm_hf.training.config import ConfigError, RunConfig, image_size
from ddpm_hf.training.interrupts import find_dead_workers_when_reading, ignore_interrupts, tell

if not sys.stderr.isatty():
    datasets.disable_progress_bars()  # a log would have a line of each of their changes


def levels_of(config: RunConfig) -> int:
    """Grey levels of the data."""
    return config.scheduler.get("levels", 256)


def pixels_by(config: RunConfig):
    """The function from a PIL image to its pixels, for training and held-out data alike."""
    return image_to_pixels(image_size(config), config.channels, levels_of(config), config.background, config.crop)


def check_pixels(config: RunConfig) -> None:
    """Raises ValueError for a background or a crop that is none, and for grey levels that the data does not have."""
    pixels_by(config)
    try:
        check_levels(config.data, levels_of(config))
    except ValueError as error:
        raise ConfigError(f"scheduler.{error}") from None


def open_images(config: RunConfig) -> tuple:
    """The data set that is trained on, as it is, and the names of its labels or None; no image is read.

    Raises:
        ConfigError: data that cannot be opened or does not fit the config.
    """
    with _told(f"data={config.data!r}"):
        check_levels(config.data, levels_of(config))
        images = load_images(config.data, config.split, config.streaming)
        names = label_names(images, config.label_column, config.classes)
        config.split_size = count_images(images)
        return (images.select(held_out_rows(config.held_out, len(images))[1]) if config.held_out else images), names


def record_data(network, config: RunConfig, names: list[str] | None) -> None:
    """Saves with a network what its labels mean and how images were prepared for it: evaluate.py and others go by that.

    Raises:
        ConfigError: names of labels that a network cannot be saved with.
    """
    with _told(f"data={config.data!r}"):
        network.class_names = names
    keys = "background", "crop", "image_column", "label_column"
    network.preprocessing = {key: getattr(config, key) for key in keys if getattr(config, key) is not None}


def data_facts(config: RunConfig, names: list[str] | None) -> dict:
    """What must be the same of the data of `open_images` when a run resumes; of another size, held_out divides it otherwise."""
    return {"class_names": names, **({"size_of_the_split": config.split_size} if config.held_out else {})}


def count_images(images) -> int | None:
    """How many there are, also such as cannot be read; None of a stream."""
    return len(images) if hasattr(images, "__len__") else None


@contextlib.contextmanager
def _told(where):
    """Data that cannot be opened or does not fit, as ConfigError."""
    try:
        yield
    except (ValueError, OSError, ImportError, tarfile.TarError) as error:
        raise ConfigError(f"{where}: {' '.join(str(error).split())}") from error


def open_data(config: RunConfig, images, process: int = 0, processes: int = 1, names: list[str] | None = None):
    """The training set of `open_images`' data, its first image read; of a stream, shuffled, this process's part.

    names: of the labels 0, 1, ... as `open_images` gives them, or as the pipeline has them that a classifier is for; a class
        may have no image.

    Raises:
        ConfigError: as `open_images`.
    """
    with _told(f"data={config.data!r}"):
        to_pixels = pixels_by(config)
        columns = config.image_column, config.label_column, config.classes, names
        limits = dict(max_broken=config.max_broken, max_image_pixels=config.max_image_pixels)
        if config.streaming:
            probe = training_set(images, to_pixels, *columns, **limits)
            if next(iter(probe), None) is None:
                raise ValueError("there are no images in it")
            images = images.shuffle(seed=config.seed, buffer_size=config.shuffle_buffer)
            images = split_dataset_by_node(images, process, processes)
        dataset = training_set(images, to_pixels, *columns, memory=int(config.memory_gb * 2**30), **limits)
        if not config.streaming and len(dataset) < config.batch_size:
            raise ValueError(
                f"batch_size={config.batch_size} is more than the {len(dataset)} images of {config.data!r}"
            )
    return dataset


def open_some(config: RunConfig, names: list[str] | None, images=None) -> tuple:
    """x_start (eval_images, C, H, W) and labels or None: of `open_images`' data if that is given, else held-out images.

    Raises:
        ConfigError: as `open_images`.
    """
    of_data = images is not None or config.held_out
    source = config.data if of_data else config.eval_data or config.data
    split = config.split if of_data else config.eval_split
    where = f"data={source!r}, split={split!r}" if of_data else f"eval_data={source!r}, eval_split={split!r}"
    with _told(where):
        if images is None:
            try:
                images = load_images(source, split, config.streaming)
            except ValueError as error:
                hint = "" if of_data or config.eval_data else "; --held_out 0.05 sets a share of the images aside"
                raise ValueError(f"{error}{hint}") from error
            images = images.select(held_out_rows(config.held_out, len(images))[0]) if config.held_out else images
        if config.streaming:  # some of all that there are: data is often sorted
            images = images.shuffle(seed=0, buffer_size=config.shuffle_buffer)
        columns = config.image_column, config.label_column, config.classes, names
        limits = dict(max_broken=config.max_broken, max_image_pixels=config.max_image_pixels)
        images = training_set(images, pixels_by(config), *columns, memory=0, **limits)
        if not config.streaming:
            images = images.readable(np.random.default_rng(0).permutation(len(images)))
        items = list(itertools.islice(images, config.eval_images))
        if not items:
            raise ValueError("there are no images in it")
        tensors = PixelTensors.of(items).tensors
        return pixels_to_tensor(tensors["pixels"], levels_of(config)), tensors.get("class_labels")


def open_loader(dataset, config: RunConfig, accelerator: Accelerator) -> torch.utils.data.DataLoader:
    """Batches of this process's images on its device; their order is a function of the seed and the epoch alone.

    That of a stream is one of the processes and workers too.
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
        generator=torch.Generator(),  # reading ahead shall not draw from the generator of noise and timesteps
    )
    if config.streaming:  # divided already; a process whose part is shorter begins its next epoch earlier
        placement = dict(put_on_device=True, dispatch_batches=False, non_blocking=accelerator.non_blocking)
        return prepare_data_loader(loader, accelerator.device, 1, 0, **placement)
    return accelerator.prepare(loader)


@dataclasses.dataclass
class Position:
    """How far a process is: optimizer steps in all, and batches of the present epoch of so many images.

    Their order depends on how many they are: where the number has changed, the epoch begins anew.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    images: int | None = None  # None of a stream

    state_dict = dataclasses.asdict

    def load_state_dict(self, state):
        self.step, self.epoch, self.batch = state["step"], state["epoch"], state["batch"]
        before = state.get("images", self.images)
        if before != self.images:
            self.batch = 0
            if PartialState().is_main_process:
                tell(f"the data has {self.images} images, {before} before the run was stopped; the epoch begins anew")


def batches(loader, config, at):
    """Batches without end, from the place `at` on, which moves with them.

    Workers that were killed are started again, and read from the same place on.

    Raises:
        ConfigError: an image or label that cannot be read, epochs without a batch, or workers that are killed again before
            they have read a batch.
    """
    empty, killed_at = 0, None  # the parts of a stream are others in each epoch
    while empty < 10:
        loader.set_epoch(at.epoch)
        rest = skip_first_batches(loader, at.batch)
        rest._non_blocking = loader._non_blocking  # accelerate 1.15 forgets it
        epoch = iter(rest)
        try:
            while (batch := _next(epoch, config)) is not None:
                at.batch += 1
                yield batch
        except _WorkerKilled as error:
            place = dataclasses.astuple(at)
            if place == killed_at:
                raise ConfigError(
                    f"{error} again, before a batch was read; there is too little memory: give fewer num_workers, or a smaller "
                    "batch_size"
                ) from error
            tell(f"{error}, most likely for want of memory (fewer num_workers need less); all are started again")
            killed_at = place
            rest.end()  # accelerate's account of it
            continue
        empty = 0 if at.batch else empty + 1
        at.epoch, at.batch = at.epoch + 1, 0
    raise ConfigError(
        f"batch_size={config.batch_size} is more than the images of {config.data!r} to a process, or, of a stream, to "
        f"each of its num_workers={config.num_workers}"
    )


class _WorkerKilled(RuntimeError):
    """A process that reads images has died."""


def _next(epoch, config):
    try:
        batch = next(epoch, None)
    except Exception as error:  # of a worker it holds the whole traceback, and ends with what happened
        told = str(error).strip() or type(error).__name__
        if isinstance(error, RuntimeError) and (
            worker := re.match(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)", told)
        ):
            raise _WorkerKilled(f"the process that reads images, {worker[1]}, was killed") from error
        raise ConfigError(f"data={config.data!r}: {told.splitlines()[-1]}") from error
    find_dead_workers_when_reading()
    return batch
