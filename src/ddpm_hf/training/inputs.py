"""Opens the images of a run: those that it trains on, and the held-out ones."""

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Callable

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from PIL import Image
from torch.utils.data import default_collate

from ddpm_hf.data.dataset import PixelTensors, held_out_rows, training_set
from ddpm_hf.data.labels import label_names
from ddpm_hf.data.pixels import image_to_pixels, pixels_to_tensor
from ddpm_hf.data.sources import check_levels, load_images
from ddpm_hf.training.config import ConfigError, RunConfig, image_size
from ddpm_hf.training.errors import DATA_ERRORS, as_config_error

if not sys.stderr.isatty():
    datasets.disable_progress_bars()  # a log would have a line of each of their changes


def levels_of(config: RunConfig) -> int:
    """Return the number of grey levels of the data."""
    return config.scheduler.get("levels", 256)


def pixels_by(config: RunConfig) -> Callable[[Image.Image], torch.Tensor]:
    """Return the function that turns a PIL image into pixels, for training and held-out images; see `image_to_pixels`."""
    return image_to_pixels(image_size(config), config.channels, levels_of(config), config.background, config.crop)


def check_pixels(config: RunConfig) -> None:
    """Raise ValueError or ConfigError for an unknown background or crop, and for grey levels that the data does not have."""
    pixels_by(config)
    try:
        check_levels(config.data, levels_of(config))
    except ValueError as error:
        raise ConfigError(f"scheduler.{error}") from None


@dataclasses.dataclass(frozen=True)
class TrainingImages:
    """The opened data set that a run trains on; no image has been read.

    Attributes:
        images: the images to train on, without the held-out ones.
        class_names: names of the labels 0, 1, ...; None if there are none.
        split_size: number of images of the split, including the held-out ones; None for a stream.
    """

    images: datasets.Dataset | datasets.IterableDataset
    class_names: list[str] | None
    split_size: int | None

    def facts(self, config: RunConfig) -> dict:
        """Return what must not change before a run resumes: class names and, with held_out, the size of the divided split."""
        size = {"size_of_the_split": self.split_size} if config.held_out else {}
        return {"class_names": self.class_names, **size}


def open_images(config: RunConfig) -> TrainingImages:
    """Open the data set of a run.

    Raises:
        ConfigError: data that cannot be opened or does not fit the config.
    """
    with as_config_error(f"data={config.data!r}", DATA_ERRORS):
        check_levels(config.data, levels_of(config))
        images = load_images(config.data, config.split, config.streaming)
        names = label_names(images, config.label_column, config.classes)
        size = count_images(images)
        if config.held_out:
            images = images.select(held_out_rows(config.held_out, len(images))[1])
    return TrainingImages(images, names, size)


def record_data(network, config: RunConfig, class_names: list[str] | None) -> None:
    """Store in a network the names of its classes and how its images are prepared, as an evaluation needs them.

    Raises:
        ConfigError: names of classes that cannot be saved.
    """
    with as_config_error(f"data={config.data!r}", DATA_ERRORS):
        network.class_names = class_names
    values = {key: getattr(config, key) for key in ("background", "crop", "image_column", "label_column")}
    network.preprocessing = {key: value for key, value in values.items() if value is not None}


def count_images(images) -> int | None:
    """Return the number of images, including unreadable ones; None for a stream."""
    return len(images) if hasattr(images, "__len__") else None


def open_data(config: RunConfig, data: TrainingImages, process: int = 0, processes: int = 1):
    """Open the training set, of which the first image is read; a stream is shuffled and divided among the processes.

    A class may be without images: class names may come from the pipeline that a classifier guides.

    Args:
        data: the opened images.
        process, processes: number of this process, from 0, and of all processes.

    Raises:
        ConfigError: as `open_images`.
    """
    with as_config_error(_training_images(config), DATA_ERRORS):
        images = data.images
        if config.streaming:
            if next(iter(_training_set(config, images, data.class_names)), None) is None:
                raise ValueError("there are no images in it")
            images = images.shuffle(seed=config.seed, buffer_size=config.shuffle_buffer)
            images = split_dataset_by_node(images, process, processes)
        dataset = _training_set(config, images, data.class_names, memory=int(config.memory_gb * 2**30))
        if not config.streaming and len(dataset) < config.batch_size:
            raise ValueError(
                f"batch_size={config.batch_size} is more than the {len(dataset)} images of {config.data!r}"
            )
    return dataset


def _training_images(config):
    """What is trained on, in words."""
    return f"data={config.data!r}{' without its held-out images' if config.held_out else ''}"


def _training_set(config, images, class_names, **options):
    """Return the images as a `training_set`."""
    columns = config.image_column, config.label_column, config.classes, class_names
    limits = dict(max_broken=config.max_broken, max_image_pixels=config.max_image_pixels)
    return training_set(images, pixels_by(config), *columns, **limits, **options)


def some_training_images(config: RunConfig, data: TrainingImages) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Read `eval_images` of the training images: x_start (N, C, H, W) in [-1, 1] and labels (N,), or None without labels.

    Raises:
        ConfigError: as `open_images`.
    """
    with as_config_error(_training_images(config), DATA_ERRORS):
        return _some_images(config, data.images, data.class_names)


def held_out_images(config: RunConfig, class_names: list[str] | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Read `eval_images` held-out images: x_start (N, C, H, W) in [-1, 1] and labels (N,), or None without labels.

    Raises:
        ConfigError: as `open_images`.
    """
    with _open_held_out(config) as images:
        return _some_images(config, images, class_names)


def count_held_out(config: RunConfig) -> int | None:
    """Return the number of held-out images, including unreadable ones; None for a stream.

    Raises:
        ConfigError: as `open_images`.
    """
    with _open_held_out(config) as images:
        return count_images(images)


@contextlib.contextmanager
def _open_held_out(config):
    """The held-out images; errors within the context are those of their data set."""
    source = config.data if config.held_out else config.eval_data or config.data
    split = config.split if config.held_out else config.eval_split
    keys = ("data", "split") if config.held_out else ("eval_data", "eval_split")
    with as_config_error(f"{keys[0]}={source!r}, {keys[1]}={split!r}", DATA_ERRORS):
        try:
            images = load_images(source, split, config.streaming)
        except ValueError as error:
            hint = "" if config.held_out or config.eval_data else "; --held_out 0.05 sets a share of the images aside"
            raise ValueError(f"{error}{hint}") from error
        if config.held_out:
            images = images.select(held_out_rows(config.held_out, len(images))[0])
        yield images


def _some_images(config, images, class_names):
    if config.streaming:  # a sample of them all, for data is often sorted
        images = images.shuffle(seed=0, buffer_size=config.shuffle_buffer)
    images = _training_set(config, images, class_names, memory=0)
    if not config.streaming:
        images = images.readable(np.random.default_rng(0).permutation(len(images)))
    items = list(itertools.islice(images, config.eval_images))
    if not items:
        raise ValueError("there are no images in it")
    tensors = PixelTensors.from_items(items).tensors
    return pixels_to_tensor(tensors["pixels"], levels_of(config)), tensors.get("class_labels")


def some_items(dataset, count: int) -> dict[str, torch.Tensor]:
    """Return a batch of up to `count` items of a training set: always the same random ones; the first ones of a stream."""
    if not hasattr(dataset, "__getitem__"):  # a stream is shuffled already
        return default_collate(list(itertools.islice(dataset, count)))
    rows = np.random.default_rng(0).permutation(len(dataset))[:count]  # data is often sorted
    return default_collate([dataset[int(row)] for row in rows])
