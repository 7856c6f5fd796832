"""Opens a folder of images, or of files that hold images, as a data set with splits and labels.

The "imagefolder" of `datasets` infers splits from words within names, so that a class called "train" becomes the whole data
set, and it skips files silently. Here every image in a folder becomes a row, or a warning says why it does not.
"""

import collections
import functools
import glob
import logging
import os
import re
import tarfile
import zlib
from collections.abc import Iterable

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, ImageFile

from ddpm_hf.arguments import shown
from ddpm_hf.files.paths import TABLES

logger = logging.getLogger(__name__)


METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


# names of splits, the same as in `datasets`
NAMES_OF_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


SPLITS = {name: split for split, names in NAMES_OF_SPLITS.items() for name in names}


# names of tables that begin with a split: test, train0, train-00000-of-00002, train-00000-of-00002-0123456789abcdef
TABLE_NAME = re.compile(r"([a-z]+)([-_.]?\d+([-_.]of[-_.]\d+)?([-_.][0-9a-f]{16})?)?", re.IGNORECASE)


SYSTEM_FOLDERS = ("__MACOSX", "__pycache__", "@eaDir")  # of macOS, Python, Synology: copies and thumbnails


SHARDS = 128  # of a stream; processes and workers divide them


def open_folder(source: str, split: str, streaming: bool) -> datasets.Dataset | datasets.IterableDataset:
    """Opens a folder of images, or of .parquet, .arrow or .tar (webdataset) files.

    The top-level folders are splits if all that hold such files are named after a split (see `NAMES_OF_SPLITS`). So are tables
    if all are named after one ("test.parquet", "train-00000-of-00002.parquet"). Otherwise everything is "train", whatever
    words its names contain. The label of an image is the name of its folder, or the folder's path if two folders have the same
    name. Metadata files (csv, jsonl, parquet, as for the "imagefolder" of `datasets`) replace these labels.

    Args:
        split: a split by any of its names, or a slice such as "train[:1000]" (not of a stream of tables).

    Raises:
        FileNotFoundError: the folder has no images.
        PermissionError: a folder may not be read.
        ValueError: an unknown split; files of several kinds, or damaged files; a link to a folder.
    """
    root = os.path.abspath(source)
    files, folders = _walk(root)
    endings, all_kinds = picture_endings(), collections.defaultdict(list)
    for path in files:
        all_kinds["images" if _ending(path) in endings else TABLES.get(_ending(path), "others")].append(path)
    metadata = {path for path in files if "images" in all_kinds and os.path.basename(path) in METADATA}
    kinds = {kind: [path for path in paths if path not in metadata] for kind, paths in all_kinds.items()}
    kinds = {kind: paths for kind, paths in kinds.items() if paths}
    others = kinds.pop("others", [])
    if not kinds:
        unread = f"; it does hold {_listed(others)}" if others else ""
        raise FileNotFoundError(f"{source} holds no images: no .png, .jpg, ..., {', '.join(TABLES)} file{unread}")
    if len(kinds) > 1:
        raise ValueError(f"{source} holds files of several kinds ({', '.join(sorted(kinds))}); give a folder of one")
    if others:
        _warn(f"{source}: left out {_count(others, 'file')} that Pillow cannot read as images: {_listed(others)}")
    split = "+".join(
        re.sub(r"\w+", lambda name: SPLITS.get(name[0], name[0]), part, count=1) for part in split.split("+")
    )
    kind, paths = kinds.popitem()
    if kind != "images":
        return _open_tables(source, root, kind, paths, split, streaming)
    _warn_of_empty_folders(source, folders, paths)
    rows = _select(_open_images(source, root, paths, sorted(metadata)), split, source)
    return as_stream(rows) if streaming else rows


def as_stream(rows: datasets.Dataset) -> datasets.IterableDataset:
    """Returns the same rows in the same order as a stream, in shards that processes and workers divide among themselves."""
    return rows.to_iterable_dataset(num_shards=max(1, min(SHARDS, len(rows))))


def picture_endings() -> set[str]:
    """Returns the endings, such as ".png", of files that Pillow and its registered plugins can decode."""

    def decodes(format):
        opener = Image.OPEN.get("JPEG" if format == "MPO" else format, [None])[0]
        recognized_only = isinstance(opener, type) and issubclass(opener, ImageFile.StubImageFile) or format == "MPEG"
        return opener and not recognized_only

    return {ending for ending, format in Image.registered_extensions().items() if decodes(format)}


def in_order(names: Iterable[str]) -> list[str]:
    """Sorts names of labels: by value if all are integers ("2" before "11"), otherwise alphabetically."""
    names = sorted(names)
    if all(re.fullmatch(r"[+-]?[0-9]{1,1000}", name) for name in names):
        names.sort(key=int)
    return names


def check_tars(paths: Iterable[str]) -> None:
    """Raises ValueError for a truncated or damaged .tar, of which a reader would silently read only the beginning."""
    for path in paths:
        if _ending(path) != ".tar":
            continue
        try:
            with tarfile.open(path) as tar:
                tar.getmembers()
                tar.fileobj.seek(tar.offset)
                ends_with_zeros = not any(tar.fileobj.read(tarfile.BLOCKSIZE))
        except (tarfile.TarError, EOFError, zlib.error, ValueError) as error:
            raise ValueError(f"{path} is truncated or corrupt ({error}); download it again") from error
        if not ends_with_zeros:
            raise ValueError(f"{path} is corrupt after its byte {tar.offset}; download it again")


def load_tables(
    kind: str, data_files: str | dict, split: str, streaming: bool
) -> datasets.Dataset | datasets.IterableDataset:
    """Opens files with a loader of `TABLES`. Members of a .tar are images if Pillow can decode them."""
    rows = datasets.load_dataset(kind, data_files=data_files, split=split, streaming=streaming)
    if kind == "webdataset":
        endings = picture_endings()
        for name, feature in rows.features.items():
            if feature == datasets.Value("binary") and _ending(f"x.{name}") in endings:
                rows = rows.cast_column(name, datasets.Image())
    return rows


@functools.cache  # warn once, also if training and held-out images are in one folder
def _warn(message):
    logger.warning("%s", message)


def _listed(paths):
    shown = ", ".join(path if path.isprintable() else repr(path) for path in paths[:3])
    return shown + (", ..." if len(paths) > 3 else "")


def _count(items, noun):
    return f"{len(items)} {noun}{'' if len(items) == 1 else 's'}"


def _ending(path):
    return os.path.splitext(path)[1].lower()


def _top(path):
    """The top-level folder of a path; "" for a file beside the top-level folders."""
    return path.split("/")[0] if "/" in path else ""


def _walk(root):
    """Returns the files and the folders below a folder as sorted relative paths, without hidden ones and `SYSTEM_FOLDERS`."""
    files, folders, queue = [], [], [""]
    while queue:
        folder = queue.pop()
        with os.scandir(os.path.join(root, folder).rstrip("/") or "/") as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name in SYSTEM_FOLDERS:
                    continue
                path = f"{folder}/{entry.name}" if folder else entry.name
                if entry.is_dir():
                    if entry.is_symlink():
                        raise ValueError(
                            f"{entry.path} is a link to a folder, which is not followed; link its files, or move it there"
                        )
                    folders.append(path)
                    queue.append(path)
                elif entry.is_file() or not os.path.exists(entry.path):  # a broken link counts as a broken image
                    files.append(path)
                else:
                    raise ValueError(f"{entry.path} is neither a file nor a folder; remove it")
    try:
        "".join(files + folders).encode()
    except UnicodeEncodeError:
        name = next(path for path in files + folders if path != path.encode(errors="replace").decode())
        raise ValueError(f"{os.fsencode(os.path.join(root, name))} is no name in UTF-8; rename it") from None
    return sorted(files), sorted(folders)


def _warn_of_empty_folders(source, folders, paths):
    with_images = {""}
    for path in paths:
        while (path := os.path.dirname(path)) not in with_images:
            with_images.add(path)
    empty = [path for path in folders if path not in with_images and os.path.dirname(path) in with_images]
    if empty:
        _warn(f"{source}: {_count(empty, 'folder')} without images, which makes no class: {_listed(empty)}")


def _splits_of_folders(source, paths):
    """Returns split -> paths by the top-level folders; {} unless all of these are named after a split."""
    names = {_top(path) for path in paths} - {""}
    if not names or not all(name.lower() in SPLITS for name in names):
        return {}
    by_split = collections.defaultdict(list)
    for path in paths:
        by_split[SPLITS.get(_top(path).lower())].append(path)
    if left_out := by_split.pop(None, None):
        folders = ", ".join(sorted(names))
        _warn(f"{source}: left out {_count(left_out, 'file')} beside the splits {folders}: {_listed(left_out)}")
    return dict(by_split)


def _split_words(names):
    """Returns the splits that whole words within the names stand for."""
    return {SPLITS[word] for name in names for word in re.split("[^a-z]+", name.lower()) if word in SPLITS}


def _open_tables(source, root, kind, paths, split, streaming):
    if not streaming:
        check_tars(os.path.join(root, path) for path in paths)
    by_split = _splits_of_folders(source, paths)
    if not by_split:
        names = [TABLE_NAME.fullmatch(os.path.splitext(os.path.basename(path))[0]) for path in paths]
        splits = [name and SPLITS.get(name[1].lower()) for name in names]
        if not all(splits):
            splits = ["train"] * len(paths)
            if _split_words(paths) - {"train"}:
                _warn(f'{source}: every file is read as "train", as not all are named after a split: {_listed(paths)}')
        for path, name in zip(paths, splits):
            by_split.setdefault(name, []).append(path)
    data_files = {name: [glob.escape(f"{root}/{path}") for path in paths] for name, paths in by_split.items()}
    return load_tables(kind, data_files, split, streaming)


def _open_images(source, root, paths, metadata):
    """Returns split -> rows."""
    split_folders = _splits_of_folders(source, paths)
    tops = sorted({_top(path) for path in paths} - {""})
    if not split_folders and len(_split_words(tops)) > 1:
        _warn(
            f'{source}: every image is read as "train", as not all of its folders are named after a split: {_listed(tops)}'
        )
    by_split = split_folders or {"train": paths}

    def describes(path, split):
        """Whether a metadata file is for a split: one that lies beside the folders of splits is for all."""
        return not (split_folders and _top(path)) or SPLITS.get(_top(path).lower()) == split

    metadata = {split: [path for path in metadata if describes(path, split)] for split in by_split}
    class_depth = 1 if split_folders else 0  # where folders of classes begin in a path
    undescribed = [path for split, paths in by_split.items() if not metadata[split] for path in paths]
    folders = {path: "/".join(path.split("/")[class_depth:-1]) for path in undescribed}
    labels = _labels(source, folders)
    names = in_order(set(labels.values()))
    rows = {}
    for split, paths in by_split.items():
        if metadata[split]:
            rows[split] = _described_rows(source, root, paths, metadata[split], split if split_folders else None)
        else:
            rows[split] = _rows(root, paths, [labels.get(folders[path]) for path in paths], names)
    return rows


def _labels(source, folders):
    """Returns folder -> label. `folders` maps an image to its folder, or to "" if it is outside of the class folders."""
    labeled = sorted(set(folders.values()) - {""})
    unlabeled = [path for path, folder in folders.items() if not folder]
    if labeled and unlabeled:
        _warn(f"{source}: no label for {_count(unlabeled, 'image')} beside the class folders: {_listed(unlabeled)}")
    if len({folder.count("/") for folder in labeled}) > 1:
        _warn(
            f"{source}: images lie at several depths; each of the {len(labeled)} folders that hold some is a class: "
            f"{_listed(labeled)}"
        )
    names = {folder: os.path.basename(folder) for folder in labeled}
    return names if len(set(names.values())) == len(names) else {folder: folder for folder in labeled}


def _rows(root, paths, labels, names):
    """Returns a data set with the paths of its images, and with their labels if there are `names` of classes."""
    features, files = {"image": datasets.Image()}, pa.array([f"{root}/{path}" for path in paths], pa.string())
    columns = [pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), files], ["bytes", "path"])]
    if names:
        features["label"] = datasets.ClassLabel(names=names)
        ids = {name: i for i, name in enumerate(names)}
        columns.append(pa.array([ids.get(label) for label in labels], pa.int64()))
    features = datasets.Features(features)
    table = pa.Table.from_arrays(columns, schema=features.arrow_schema)
    return datasets.Dataset(table, info=datasets.DatasetInfo(features=features))


def _described_rows(source, root, paths, metadata, split):
    """Returns the rows that metadata files list; those of `split` only, unless it is None."""
    try:
        data_files = [glob.escape(f"{root}/{path}") for path in metadata]
        rows = datasets.load_dataset("imagefolder", data_files=data_files, split="train")
    except Exception as error:  # the readers of csv, json and parquet raise classes of their own
        raise ValueError(f"{source}: {_listed(metadata)} cannot be read: {error.__cause__ or error!r}") from error
    images = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    columns = [pc.struct_field(rows.data[name], "path").to_pylist() for name in images]
    outside = [path for column in columns for path in column if path and not _is_below(path, root)]
    if outside:  # which datasets before 5.2 opens
        raise ValueError(
            f"{source}: {_listed(metadata)} cannot be read: {outside[0]} is not in the folder; remove that row"
        )
    if columns and split is not None:
        splits = [SPLITS.get(_top(os.path.relpath(path or root, root)).lower(), split) for path in columns[0]]
        rows = rows.select([i for i, row_split in enumerate(splits) if row_split == split])
    described = set().union(*columns)
    if left_out := [path for path in paths if f"{root}/{path}" not in described]:
        _warn(
            f"{source}: left out {len(left_out)} of {_count(paths, 'image')}, which {_listed(metadata)} does not name: "
            f"{_listed(left_out)}"
        )
    return rows


def _is_below(path, root):
    """Whether a path without links leads to something in the folder `root`."""
    return os.path.normpath(path).startswith(os.path.join(root, ""))


def _select(splits, split, source):
    """Returns the rows of a split or slice. `splits` maps the name of a split to its rows."""
    try:
        spans = datasets.ReadInstruction.from_spec(split).to_absolute(
            {name: len(rows) for name, rows in splits.items()}
        )
    except ValueError as error:
        raise ValueError(
            f"split={shown(split)} is not a split or slice of {source}; it has {', '.join(splits)}"
        ) from error
    return datasets.concatenate_datasets([splits[span.splitname].select(range(span.from_, span.to)) for span in spans])
