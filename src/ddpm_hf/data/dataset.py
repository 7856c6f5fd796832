"""A data set of images as a training set: pixels and classes, with broken images left out."""

import contextlib
import dataclasses
import functools
import logging
import os
import textwrap
from collections.abc import Callable, Iterable, Iterator

import datasets
import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ddpm_hf.arguments import listed, shown
from ddpm_hf.data.labels import LabelColumn, label_ids
from ddpm_hf.data.pixels import ImageDoesNotFit, decode_image, pixel_limit

logger = logging.getLogger(__name__)

MOST_NAMED, MOST_SEARCHED = 10, 1000  # broken images in an error's message, and the images in which they are searched


def image_column(dataset: datasets.Dataset | datasets.IterableDataset, column: str | None = None) -> str:
    """The column that holds the images: `column` if given, else the only one of the Image type.

    Raises:
        ValueError: there is no such column, or no single one to choose.
    """
    if column is not None:
        if column not in dataset.column_names:
            raise ValueError(f"image_column={shown(column)} is not in the data; it has {listed(dataset.column_names)}")
        if not isinstance(dataset.features[column], datasets.Image):
            raise ValueError(f"image_column={shown(column)} holds {dataset.features[column]}, not images")
        return column
    columns = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if len(columns) != 1:
        raise ValueError(
            f"image_column is needed: the data has {len(columns)} image columns among {listed(dataset.column_names)}"
        )
    return columns[0]


def held_out_rows(share: float, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows, of `count`, that a run with held_out=share sets aside (at least one), and the rows that it trains on.

    Both are sorted. The draw is random but always the same: it depends only on the two numbers.
    """
    order, size = np.random.default_rng(0).permutation(count), max(1, round(share * count))
    return np.sort(order[:size]), np.sort(order[size:])


def training_set(
    dataset: datasets.Dataset | datasets.IterableDataset,
    to_pixels: Callable[[Image.Image], torch.Tensor],
    column: str | None = None,
    label_column: str | None = None,
    num_classes: int | None = None,
    names: list[str] | None = None,
    *,
    max_broken: float = 0.0,
    memory: int = 2**30,
    max_image_pixels: int | None = None,
) -> "torch.utils.data.Dataset | datasets.IterableDataset":
    """A data set for training, with items {"pixels": to_pixels(image), "class_labels": int}; a stream for a stream.

    Args:
        to_pixels: see `image_to_pixels`.
        column: the image column; None for the only one.
        label_column: the labels, of any type; None for items without "class_labels". Integers below num_classes and
            `ClassLabel` are classes already; other values are sorted and become 0, 1, ..., see `label_names`. A stream can
            only have the first two.
        num_classes: of the network; labels are 0 .. num_classes - 1.
        names: names of the labels 0, 1, ... where another data set has numbered them, see `label_names`; labels are matched
            by name.
        max_broken: the share of images that may be broken, that is, whose opening, decoding or conversion raises an error.
            They are left out, and each is named in a warning.
        memory: bytes; a data set whose pixels need no more is read once, and returned as `PixelTensors`.
        max_image_pixels: an image of more pixels counts as broken; None for Pillow's limit against decompression bombs,
            178,956,970.

    Raises:
        ValueError: a column that is not there, or labels without a class; when read, too many broken images.
        ImageDoesNotFit: when read, an image that `to_pixels` refuses.
    """
    if max_image_pixels is not None and max_image_pixels < 1:
        raise ValueError(f"max_image_pixels={max_image_pixels} must be 1 or more")
    column, labels = image_column(dataset, column), None
    if label_column is not None:
        labels = LabelColumn(label_column, label_ids(dataset, label_column, num_classes, names), num_classes)
    dataset = dataset.select_columns([column, *([labels.name] if labels else [])])
    dataset = dataset.cast_column(column, datasets.Image(decode=False))  # we decode, and leave out broken images
    reader = _Reader(
        to_pixels=to_pixels, column=column, labels=labels, max_broken=max_broken, max_image_pixels=max_image_pixels
    )
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.map(reader.read_rows, batched=True, batch_size=1, remove_columns=dataset.column_names)
    images = ReadImages(dataset, reader)
    if len(images) and memory >= len(images) * images[0]["pixels"].nbytes:
        return images.in_memory()
    return images


class _TooManyBroken(ValueError):
    """More images cannot be read than may be left out."""


@functools.cache  # warn once, also if training and held-out images are in one folder
def _warn_of_file(name, reason):
    logger.warning("%s cannot be read (%s) and is left out", name, reason)


@dataclasses.dataclass(kw_only=True)
class _Reader:
    """Turns rows into items, and counts the images of its own process that cannot be read."""

    to_pixels: Callable
    column: str
    labels: LabelColumn | None
    max_broken: float
    max_image_pixels: int | None
    broken: dict = dataclasses.field(default_factory=dict)  # row whose image cannot be read -> its file, and why
    warned_of: set = dataclasses.field(default_factory=set)  # names of images
    is_searching: bool = False  # for all broken images, where there are too many
    rows_read: int = 0  # of a stream

    def read(self, row, row_name, total):
        """The item of a row, one of `total`; None if its image cannot be read. An image without a file is called `row_name`."""
        try:
            item = {"pixels": self._read_pixels(row)}
        except (ImageDoesNotFit, MemoryError):
            raise
        except Exception as error:  # Pillow's decoders raise many classes for damaged files
            self._leave_out(row, row_name, total, error)
            return None
        if self.labels is not None:
            item["class_labels"] = self.labels.class_of(row[self.labels.name])
        return item

    def read_rows(self, rows):
        """The items of a few rows of a stream, as columns, without those that cannot be read."""
        names = list(rows)
        rows = [dict(zip(names, values)) for values in zip(*rows.values())]
        self.rows_read += len(rows)
        row_name, total = f"image {self.rows_read} of this part of the stream", max(1000, self.rows_read)
        items = [item for item in (self.read(row, row_name, total) for row in rows) if item is not None]
        keys = ["pixels", *(["class_labels"] if self.labels is not None else [])]
        return {key: [item[key] for item in items] for key in keys}

    def _read_pixels(self, row):
        if row[self.column] is None:
            raise OSError("no image")
        with pixel_limit(self.max_image_pixels):
            return self.to_pixels(decode_image(**row[self.column]))

    def _leave_out(self, row, row_name, total, error):
        """Counts a broken image, and warns of it once. Raises _TooManyBroken if there are too many."""
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
        if isinstance(error, Image.DecompressionBombError):
            limit = self.max_image_pixels or 2 * Image.MAX_IMAGE_PIXELS
            reason = f"more than {limit:,} pixels; raise max_image_pixels to allow it"
        name = row[self.column] and row[self.column].get("path") or row_name
        self.broken[row_name] = name, reason  # several rows may have one file
        if self.is_searching:
            return
        if len(self.broken) > self.max_broken * total:
            raise _TooManyBroken(self.too_many(total)) from None
        if os.path.isabs(name):
            _warn_of_file(name, reason)
        elif name not in self.warned_of:
            self.warned_of.add(name)
            logger.warning("%s cannot be read (%s) and is left out", name, reason)

    def too_many(self, total, at_least=False):
        """The message about too many broken images: their number, the last one with the reason, and the others by name."""
        *others, (name, reason) = self.broken.values()
        others = sorted({other for other, _ in others} - {name})[: MOST_NAMED - 1]
        return (
            f"{'at least ' if at_least else ''}{len(self.broken)} of {total} images cannot be read, the last {name} ({reason})"
            f"{', the others ' if others else ''}{', '.join(others)}; remove {'them' if others else 'it'}, or raise "
            f"max_broken={self.max_broken}, the share that may be left out"
        )


class ReadImages(torch.utils.data.Dataset):
    """Images that are read whenever they are asked for; an image that cannot be read is replaced by the next one."""

    def __init__(self, dataset, reader):
        self.dataset, self.reader = dataset, reader

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        if index >= len(self):  # ends a loop over the data set
            raise IndexError(f"index {index} of {len(self)} images")
        for i in range(index, index + len(self)):
            item = self._item(i % len(self))
            if item is not None:
                return item
        raise ValueError("no image of the data can be read")

    def _item(self, index):
        try:
            return self.reader.read(self.dataset[index], f"row {index}", len(self))
        except _TooManyBroken:
            at_least = self._search_broken()
            raise ValueError(self.reader.too_many(len(self), at_least)) from None

    def _search_broken(self):
        """Reads on until there are enough broken images for a message; returns whether there may be more of them."""
        self.reader.is_searching = True
        for index in range(min(len(self), MOST_SEARCHED)):
            if len(self.reader.broken) >= MOST_NAMED:
                return True
            with contextlib.suppress(ValueError, ImageDoesNotFit):  # of other mistakes
                self.reader.read(self.dataset[index], f"row {index}", len(self))
        return len(self) > MOST_SEARCHED

    def readable(self, rows: Iterable[int]) -> Iterator[dict]:
        """The items of these rows, in this order, without those that cannot be read."""
        return (item for item in map(self._item, map(int, rows)) if item is not None)

    def in_memory(self) -> "PixelTensors":
        """All images that can be read, as one tensor."""
        rows = tqdm(range(len(self)), desc="reading images", leave=False, delay=2, disable=None)
        return PixelTensors.from_items(list(self.readable(rows)))


class PixelTensors(torch.utils.data.Dataset):
    """Images in memory: pixels (N, C, H, W), see `image_to_pixels`, and classes int64 (N,) or None.

    A batch is one slice of these tensors.
    """

    def __init__(self, pixels: torch.Tensor, labels: torch.Tensor | None = None):
        self.tensors = {"pixels": pixels} | ({} if labels is None else {"class_labels": labels})

    @classmethod
    def from_items(cls, items: list[dict]) -> "PixelTensors":
        """Stacks items of `training_set`, at least one."""
        labels = torch.tensor([item["class_labels"] for item in items]) if "class_labels" in items[0] else None
        return cls(torch.stack([item["pixels"] for item in items]), labels)

    def __len__(self):
        return len(self.tensors["pixels"])

    def __getitem__(self, index):
        return {key: values[index] for key, values in self.tensors.items()}

    def __getitems__(self, indices):
        return self[torch.as_tensor(indices)]


def collate(batch: list[dict] | dict) -> dict:
    """Makes a batch of items of `training_set`: the `collate_fn` of a DataLoader."""
    return batch if isinstance(batch, dict) else torch.utils.data.default_collate(batch)
