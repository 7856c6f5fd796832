"""Images of a data set as a trained network expects them: its size, channels, crop, background and labels."""

import itertools
import sys
from typing import Any

import datasets
import numpy as np
import torch

from ddpm_hf.arguments import listed, sides
from ddpm_hf.data.dataset import PixelTensors, training_set
from ddpm_hf.data.pixels import ImageDoesNotFit, image_to_pixels, pixels_to_tensor
from ddpm_hf.data.sources import check_levels, load_images

SUBSET_SEED = 0  # the subset of N images is the same whatever the seed of the noise


def load_tensor(
    source: str, split: str, unet, levels: int, count: int | None = None, **kwargs
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Open a data set with `load_images` and read it with `read_tensor`."""
    check_levels(source, levels)
    return read_tensor(load_images(source, split), unet, levels, count, source=source, **kwargs)


def read_tensor(
    dataset: datasets.Dataset,
    unet,
    levels: int,
    count: int | None = None,
    *,
    label_column: str | None = None,
    with_labels: bool = True,
    source: str = "the data",
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Read images prepared as in the network's training (`unet.preprocessing`), with labels matched to `unet.class_names`.

    Args:
        levels: number of grey levels of the data.
        count: number of images to read; if the data has more, a fixed random subset is read (see `subset_rows`). Unreadable
            images do not count.
        label_column: None means the column used in training if the data has it, else the only one.
        with_labels: False reads the images alone.
        source: what errors call the data.
        **kwargs: image_column, max_broken, max_image_pixels and channels of `prepared_images`.

    Returns:
        x_start (N, C, H, W), float32 in [-1, 1], and labels (N,) int64 for a class-conditional network, else None.

    Raises:
        ValueError: columns, labels or grey levels that do not fit the network, or too many unreadable images.
    """
    label_column = label_column_of(dataset, unet, label_column, source) if with_labels else None
    resized: set[tuple[int, int]] = set()
    images, _ = prepared_images(dataset, unet, levels, label_column=label_column, resized=resized, **kwargs)
    tensors = _read_subset(images, count)
    if resized:
        sizes = ", ".join(f"{width}x{height}" for width, height in sorted(resized)[:3])
        height, width = sides(unet.config.sample_size)
        print(f"images of {sizes} were scaled and cropped to {width}x{height}, the network's size", file=sys.stderr)
    return pixels_to_tensor(tensors["pixels"], levels), tensors.get("class_labels")


def prepared_images(
    dataset: datasets.Dataset,
    unet,
    levels: int,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    max_broken: float = 0.0,
    max_image_pixels: int | None = None,
    channels: int | None = None,
    resized: set[tuple[int, int]] | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Open images prepared as in the network's training; they are read when they are asked for.

    Args:
        levels: number of grey levels of the data.
        image_column: None means the column used in training if the data has it, else the only one.
        label_column: None means images without labels.
        max_broken, max_image_pixels: see `training_set`.
        channels: channels of the images; None means those of the network's input.
        resized: the (width, height) of images that are scaled are added to it.

    Returns:
        The `ReadImages` of `training_set`, and how they are prepared: size (H, W), channels, levels, crop, background.

    Raises:
        ValueError: columns, labels or grey levels that do not fit the network.
    """
    size = unet.config.sample_size
    if size is None:
        raise ValueError("the network's config has no sample_size (the side of its images in pixels); set it")
    trained = unet.preprocessing
    rules = dict(
        size=sides(size),
        channels=channels or unet.config.in_channels,
        levels=levels,
        crop=trained.get("crop", "center"),
        background=trained.get("background", "white"),
    )
    to_pixels = image_to_pixels(**rules)
    if image_column is None and trained.get("image_column") in dataset.column_names:
        image_column = trained["image_column"]

    def convert(image):
        if levels <= 256 and image.mode.startswith("I;16"):
            raise ImageDoesNotFit(f"an image has 16 bits, levels is {levels}; give levels=65536, or data of 8 bits")
        if resized is not None and image.size != rules["size"][::-1]:
            resized.add(image.size)
        return to_pixels(image)

    images = training_set(
        dataset,
        convert,
        image_column,
        label_column,
        num_classes=unet.num_classes,
        names=unet.class_names,
        memory=0,
        max_broken=max_broken,
        max_image_pixels=max_image_pixels,
    )
    return images, rules


def _read_subset(images, count):
    """Read `count` images, None for all: {"pixels": (N, C, H, W)}, with "class_labels" (N,) if the images have classes."""
    if count is None or count >= len(images):
        return images.in_memory().tensors
    items = list(itertools.islice(images.readable(subset_rows(len(images))), count))
    if not items:
        raise ValueError("no image of the data can be read")
    return PixelTensors.from_items(items).tensors


def subset_rows(total: int) -> np.ndarray:
    """Return all row numbers in a fixed random order; the first N of them are the subset of N images."""
    return np.random.default_rng(SUBSET_SEED).permutation(total)


def label_column_of(dataset: datasets.Dataset, unet, column: str | None = None, source: str = "the data") -> str | None:
    """Return the label column for a class-conditional network, None for an unconditional one.

    It is `column` if given, else the training's if the data has it, else the only `ClassLabel` column, else "label".

    Raises:
        ValueError: there is no such column, or `column` is given for an unconditional network. The message names `source`.
    """
    if unet.class_embedding is None:
        if column is not None:
            raise ValueError(f"label_column={column!r}, but the network is not class-conditional; leave it out")
        return None
    if column is not None:
        return column
    labeled = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)]
    for name in (unet.preprocessing.get("label_column"), labeled[0] if len(labeled) == 1 else None, "label"):
        if name in dataset.column_names:
            return name
    if not any(isinstance(feature, (datasets.ClassLabel, datasets.Value)) for feature in dataset.features.values()):
        raise ValueError(
            f"{source} has no class labels (columns: {listed(dataset.column_names)}), but the network is class-conditional; "
            "give data with labels, such as a folder with a sub-folder for each class"
        )
    raise ValueError(
        f"the network is class-conditional: give label_column, the labels among {listed(dataset.column_names)}"
    )
