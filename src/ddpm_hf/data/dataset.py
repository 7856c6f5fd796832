"""A data set of images and labels as a training set: which column, which labels, which rows, broken images left out."""

import contextlib
import textwrap
from collections.abc import Callable, Iterable, Iterator

import datasets
import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ddpm_hf.arguments import listed, shown
from ddpm_hf.data.folders import in_order
from ddpm_hf.data.pixels import ImageDoesNotFit, decode_image, pixel_limit
from ddpm_hf.data.sources import logger


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
    found = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if len(found) != 1:
        raise ValueError(
            f"image_column is needed: the data has {len(found)} image columns among {listed(dataset.column_names)}"
        )
    return found[0]


def held_out_rows(share: float, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows that a run with held_out=share sets aside of `count`, one at least, and those it trains on.

    They are a function of both numbers alone: drawn at random, and in order.
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
    max_broken: float = 0.0,
    memory: int = 2**30,
    max_image_pixels: int | None = None,
) -> torch.utils.data.Dataset | datasets.IterableDataset:
    """A data set, or stream, with items {"pixels": what `to_pixels` gives}, and {"class_labels": int} of a label column.

    Args:
        column: of the images; None for the only one.
        label_column: labels of any kind. Integers below num_classes and `ClassLabel` stay; of others, not of a stream, the
            sorted values become 0, 1, ...: see `label_names`.
        num_classes: of the network; labels are 0 .. num_classes - 1.
        names: of the labels 0, 1, ... where another data set has given them, see `label_names`; labels are matched by name.
        max_broken: share of the images that may be broken (whatever opening, decoding and converting them raises): they are
            left out, each with a line in the log.
        memory: bytes; a data set whose pixels need no more is read once, and is `PixelTensors`.
        max_image_pixels: an image of more counts as broken; None for Pillow's limit against decompression bombs, 178,956,970.

    Raises:
        ValueError: a column that is not there, labels that do not fit; now or when read, too many broken images.
        ImageDoesNotFit: when read, an image that `to_pixels` refuses so.
    """
    if max_image_pixels is not None and max_image_pixels < 1:
        raise ValueError(f"max_image_pixels={max_image_pixels} must be 1 or more")
    column = image_column(dataset, column)
    ids = label_ids(dataset, label_column, num_classes, names)
    dataset = dataset.select_columns([column, *([label_column] if label_column else [])])
    dataset = dataset.cast_column(column, datasets.Image(decode=False))  # a broken one shall not end it
    read = _Reader(to_pixels, column, label_column, ids, num_classes, max_broken, max_image_pixels)
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.map(read.rows, batched=True, batch_size=1, remove_columns=dataset.column_names)
    images = ReadImages(dataset, read)
    if len(images) and memory >= len(images) * images[0]["pixels"].nbytes:
        return images.in_memory()
    return images


def label_ids(
    dataset, label_column: str | None, num_classes: int | None = None, names: list[str] | None = None
) -> dict | None:
    """Label -> 0, 1, ... for a column of a data set; None where its labels are these already, or cannot be known of a stream.

    Raises:
        ValueError: labels that are missing, more than `num_classes`, or not among `names`.
    """
    if label_column is None:
        return None
    if label_column not in dataset.column_names:
        raise ValueError(
            f"label_column={shown(label_column)} is not in the data; it has {listed(dataset.column_names)}"
        )
    feature = dataset.features[label_column]
    if not isinstance(feature, (datasets.Value, datasets.ClassLabel)):
        raise ValueError(f"label_column={shown(label_column)} holds {shown(feature)}, not labels")
    classes, stream = _classes(feature), isinstance(dataset, datasets.IterableDataset)
    values = set(range(len(classes or ())))

    def missing(value):
        return value is None or value != value or (classes is not None and value < 0)

    if not stream:
        found = set(dataset.unique(label_column))  # of a million rows in milliseconds
        if any(map(missing, found)):
            count = sum(map(missing, dataset[label_column]))
            raise ValueError(
                f"label_column={shown(label_column)} has no value in {count} of {len(dataset)} rows; fill or remove them"
            )
        values |= found
    if names is not None:
        ids = {name: i for i, name in enumerate(names)}
        if stream and not classes:  # of labels that nobody has seen yet
            return {_value_of(name, feature): i for name, i in ids.items()}
        called = {value: classes[value] if classes else str(value) for value in values}
        unknown = set() if stream else {called[value] for value in found} - ids.keys()
        if unknown:
            raise ValueError(
                f"label_column={shown(label_column)} has the label {shown(min(unknown))}; known are {listed(names)}"
            )
        return {value: ids[name] for value, name in called.items() if name in ids}
    if num_classes is not None and len(values) > num_classes:
        raise ValueError(
            f"label_column={shown(label_column)} has {len(values)} labels, the network {num_classes} classes; set "
            f"unet.num_class_embeds, or classifier.num_classes, to {len(values)}"
        )
    if classes or all(isinstance(value, int) and 0 <= value < (num_classes or len(values)) for value in values):
        return None
    texts = all(isinstance(value, str) for value in values)
    return {value: i for i, value in enumerate(in_order(values) if texts else sorted(values))}


def label_names(dataset, label_column: str | None, num_classes: int | None = None) -> list[str] | None:
    """Names of the labels 0, 1, ... that `training_set` gives: their texts, those of a `ClassLabel`, or the numbers themselves.

    None without a label column, and for a stream, unless its type or, for integers, `num_classes` has them.
    """
    if label_column is None:
        return None
    ids = label_ids(dataset, label_column, num_classes)
    if ids is not None:
        return [str(value) for value in ids]
    if classes := _classes(dataset.features[label_column]):
        return classes
    if isinstance(dataset, datasets.IterableDataset):
        known = num_classes if "int" in dataset.features[label_column].dtype else None
    else:
        known = num_classes or len(dataset.unique(label_column))
    return None if known is None else [str(i) for i in range(known)]


def _classes(feature):
    """The names of the values 0, 1, ... of a column, where its type has them."""
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    return ["False", "True"] if feature.dtype == "bool" else None


def _value_of(name, feature):
    """The label of a column of this type that is written so."""
    if "int" in feature.dtype:
        with contextlib.suppress(ValueError):
            return int(name)
    return name


class _Reader:
    """Rows -> items; counts what cannot be read, in its own process."""

    def __init__(self, to_pixels, column, label_column, ids, num_classes, max_broken, max_image_pixels):
        self.to_pixels, self.column, self.label_column = to_pixels, column, label_column
        self.ids, self.num_classes, self.max_broken = ids, num_classes, max_broken
        self.max_image_pixels = max_image_pixels
        self.broken, self.told, self.seen = set(), set(), 0

    def pixels(self, row):
        if row[self.column] is None:
            raise OSError("no image")
        with pixel_limit(self.max_image_pixels):
            return self.to_pixels(decode_image(**row[self.column]))

    def item(self, row, name, total):
        """The item of a row; None for an image that cannot be read, one of `total`, called `name` if it has no file."""
        try:
            pixels = self.pixels(row)
        except (ImageDoesNotFit, MemoryError):
            raise
        except Exception as error:  # Pillow's decoders raise whatever a damaged file leads them to
            why = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
            if isinstance(error, Image.DecompressionBombError):
                limit = self.max_image_pixels or 2 * Image.MAX_IMAGE_PIXELS
                why = f"more than {limit:,} pixels; raise max_image_pixels to allow it"
            self.broken.add(name)  # not the file's name, which several may have
            name = row[self.column] and row[self.column].get("path") or name
            if len(self.broken) > self.max_broken * total:
                raise ValueError(
                    f"{len(self.broken)} of {total} images cannot be read, the last {name} ({why}); remove it, or "
                    f"raise max_broken={self.max_broken}, the share that may be left out"
                ) from None
            if name not in self.told:
                self.told.add(name)
                logger.warning("%s cannot be read (%s) and is left out", name, why)
            return None
        item = {"pixels": pixels}
        if self.label_column is not None:
            label = row[self.label_column]
            known = label if self.ids is None else self.ids.get(label)
            if not isinstance(known, int) or not 0 <= known < (self.num_classes or known + 1):
                problem = f"label_column={shown(self.label_column)} holds {shown(label)}"
                if label is None:
                    raise ValueError(f"{problem} for an image; give it a label, or remove it")
                if self.ids is not None:
                    raise ValueError(f"{problem}, which is none of the known labels")
                raise ValueError(
                    f"{problem}; labels of a stream must be integers, 0 to {(self.num_classes or 0) - 1}: it cannot be looked "
                    "through for others before"
                )
            item["class_labels"] = int(known)
        return item

    def rows(self, rows):
        """Of a stream: what can be read of a few rows."""
        names = list(rows)
        rows = [dict(zip(names, values)) for values in zip(*rows.values())]
        self.seen += len(rows)
        items = [self.item(row, f"image {self.seen} of this part of the stream", max(1000, self.seen)) for row in rows]
        items = [item for item in items if item is not None]
        keys = ["pixels", *(["class_labels"] if self.label_column is not None else [])]
        return {key: [item[key] for item in items] for key in keys}


class ReadImages(torch.utils.data.Dataset):
    """Images that are read each time; in place of one that cannot be read stands the next that can."""

    def __init__(self, dataset, read):
        self.dataset, self.read = dataset, read

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        if index >= len(self):  # which ends a loop over them
            raise IndexError(f"index {index} of {len(self)} images")
        for i in range(index, index + len(self)):
            item = self._item(i % len(self))
            if item is not None:
                return item
        raise ValueError("no image of the data can be read")

    def _item(self, index):
        return self.read.item(self.dataset[index], f"row {index}", len(self))

    def readable(self, rows: Iterable[int]) -> Iterator[dict]:
        """The items of those that can be read, in this order."""
        return (item for item in map(self._item, map(int, rows)) if item is not None)

    def in_memory(self) -> "PixelTensors":
        """All that can be read, as one tensor."""
        rows = tqdm(range(len(self)), desc="reading images", leave=False, delay=2, disable=None)
        return PixelTensors.of(list(self.readable(rows)))


class PixelTensors(torch.utils.data.Dataset):
    """pixels (N, C, H, W) as `image_to_pixels` gives them, and labels int64 (N,) or None; batches are cut out at once."""

    def __init__(self, pixels: torch.Tensor, labels: torch.Tensor | None = None):
        self.tensors = {"pixels": pixels} | ({} if labels is None else {"class_labels": labels})

    @classmethod
    def of(cls, items: list[dict]) -> "PixelTensors":
        """Of items of `training_set`, one or more."""
        labels = torch.tensor([item["class_labels"] for item in items]) if "class_labels" in items[0] else None
        return cls(torch.stack([item["pixels"] for item in items]), labels)

    def __len__(self):
        return len(self.tensors["pixels"])

    def __getitem__(self, index):
        return {key: values[index] for key, values in self.tensors.items()}

    def __getitems__(self, indices):
        return self[torch.as_tensor(indices)]


def collate(batch: list[dict] | dict) -> dict:
    """A batch of items of `training_set`, for a DataLoader."""
    return batch if isinstance(batch, dict) else torch.utils.data.default_collate(batch)
