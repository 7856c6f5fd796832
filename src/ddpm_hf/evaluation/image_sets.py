"""Generated images in a folder, an .npz or a .parquet file, and real images of a data set, read in blocks as 8-bit pixels."""

import hashlib
import math
import os
import struct
import threading
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image

from ddpm_hf.arguments import shown
from ddpm_hf.data.dataset import image_column
from ddpm_hf.data.folders import load_tables, picture_endings
from ddpm_hf.data.pixels import decode_image, image_to_pixels
from ddpm_hf.evaluation.images import prepared_images, subset_rows
from ddpm_hf.files.guarded import one_line
from ddpm_hf.files.missing import did_you_mean_path

MOST_HASHED = 1000  # rows whose images are in memory while a data set is hashed


class ImageSet:
    """Images of one size, of which only the rows that are asked for are in memory.

    Attributes:
        size: (height, width).
        channels: 1 (grey), 3 (RGB) or 4 (RGBA).
        description: facts for records and for finding stored features: "images", the public name of their source,
            "count", "size", "channels", "fingerprint", a digest of the source; of real images also how they are prepared.
        is_sequential: whether only one thread should read, in order, as it is much faster so or threads disturb each other.
    """

    size: tuple[int, int]
    channels: int
    description: dict[str, Any]
    is_sequential = False

    def __len__(self) -> int:
        return self.description["count"]

    def read(self, rows: range | slice) -> torch.Tensor:
        """Read neighboring images: uint8 (B, C, H, W).

        Raises:
            ValueError: a broken image, or one of another size or number of channels. The message names it.
        """
        rows = range(len(self))[rows] if isinstance(rows, slice) else rows
        return self._read(rows) if len(rows) else torch.empty((0, self.channels, *self.size), dtype=torch.uint8)

    def name_of(self, row: int) -> str:
        """What errors call an image."""
        return f"image {row} of {self.description['images']}"

    def _read(self, rows: range) -> torch.Tensor:
        raise NotImplementedError

    def _describe(self, images: str, count: int, fingerprint: str, **facts) -> None:
        self.description = dict(
            images=images,
            count=count,
            size=list(self.size),
            channels=self.channels,
            fingerprint=fingerprint,
            **facts,
        )


def open_images(path: str | os.PathLike, name: str = "images", names: list[str] | None = None) -> ImageSet:
    """Open generated images.

    A folder's pictures are sorted by their names, with those of its sub-folders. A picture's own number of channels is kept:
    1 for grey ones, 4 for transparent ones, else 3; all must agree. Of 16 bits the upper 8 are read.

    Args:
        path: a folder of pictures; an .npz file of ADM's layout (`arr_0`, uint8 (N, H, W, C)); a .parquet file with one
            column of images.
        name: what errors call the argument.
        names: of a folder only these pictures, in this order; None for all of them.

    Raises:
        ValueError: nothing of this kind, or no images; the message says what to do.
    """
    path = Path(os.path.expanduser(path))
    if path.is_dir():
        return _Folder(path, name, names)
    if not path.is_file():
        raise ValueError(f"{name}={shown(str(path))}: there is no such folder or file{did_you_mean_path(path)}")
    kinds = {".npz": _Array, ".parquet": _Table}
    if path.suffix.lower() not in kinds:
        raise ValueError(f"{name}={shown(str(path))} must be a folder of pictures, an .npz or a .parquet file")
    return kinds[path.suffix.lower()](path, name)


class _Pictures(ImageSet):
    """Pictures in any format that Pillow reads; the first one decides size and channels."""

    def _open(self, source: str, mend: str) -> None:
        self.source, self.mend = source, mend
        first = self._picture(0)
        self.size, self.channels = first.size[::-1], _channels(first)
        self.to_pixels = image_to_pixels(self.size, self.channels)

    def _read(self, rows):
        return torch.stack([self._pixels(row, encoded) for row, encoded in zip(rows, self._encoded(rows))])

    def _pixels(self, row, encoded):
        picture = self._picture(row, encoded)
        if picture.size[::-1] != self.size:
            (width, height), (first_height, first_width) = picture.size, self.size
            raise ValueError(
                f"{self.name_of(row)} has {width}x{height} pixels, {self.name_of(0)} has {first_width}x{first_height}; "
                f"{self.mend} of one size"
            )
        if _channels(picture) != self.channels:
            raise ValueError(
                f"{self.name_of(row)} has {_channels(picture)} channels, {self.name_of(0)} has {self.channels}; "
                f"{self.mend} of one kind"
            )
        try:
            return self.to_pixels(picture)
        except ValueError as error:  # 32 bits
            raise ValueError(f"{self.name_of(row)}: {one_line(error)}") from None

    def _picture(self, row: int, encoded: dict | None = None) -> Image.Image:
        try:
            return decode_image(**(encoded or self._encoded(range(row, row + 1))[0]))
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders raise many classes for damaged files
            raise ValueError(
                f"{self.name_of(row)} cannot be read as a picture ({one_line(error, 200)}); make it again, or remove it"
            ) from None

    def _encoded(self, rows: range) -> Sequence[dict]:
        """The arguments of `decode_image`."""
        raise NotImplementedError


class _Folder(_Pictures):
    def __init__(self, folder: Path, name: str, names: list[str] | None):
        self.names = _pictures_in(folder) if names is None else names
        if not self.names:
            raise ValueError(
                f"{name}={shown(str(folder))} holds no pictures (.png, .jpg, ...); give a folder with some"
            )
        self.folder = folder
        self._open(str(folder), "give a folder")
        digest = hashlib.sha256()
        for file in self.names:
            status = (folder / file).stat()
            digest.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\0".encode(errors="surrogateescape"))
        self._describe(folder.resolve().name, len(self.names), digest.hexdigest()[:16])

    def name_of(self, row: int) -> str:
        return str(self.folder / self.names[row])

    def _encoded(self, rows):
        return [{"bytes": None, "path": str(self.folder / self.names[row])} for row in rows]


def _pictures_in(folder):
    """The names of all pictures, sorted, without hidden ones."""
    endings = picture_endings()
    paths = [path for path in folder.rglob("*") if path.suffix.lower() in endings and path.is_file()]
    names = [path.relative_to(folder).as_posix() for path in paths]
    return sorted(name for name in names if not any(part.startswith(".") for part in name.split("/")))


class _Table(_Pictures):
    def __init__(self, path: Path, name: str):
        try:
            rows = load_tables("parquet", str(path), "train", False)
        except Exception as error:  # pyarrow's and datasets' own classes
            raise ValueError(
                f"{name}={shown(str(path))} cannot be read ({one_line(error.__cause__ or error, 200)})"
            ) from None
        try:
            self.column = image_column(rows)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if not len(rows):
            raise ValueError(f"{name}={shown(str(path))} has no rows; give a file with images")
        self.rows = rows.select_columns([self.column]).cast_column(self.column, datasets.Image(decode=False))
        self.path = path
        self._open(str(path), "give a file")
        self._describe(path.name, len(self.rows), _file_fingerprint(path))

    def name_of(self, row: int) -> str:
        return f"image {row} of {self.path}"

    def _encoded(self, rows):
        found = self.rows[rows.start : rows.stop : rows.step][self.column]
        if None in found:
            raise ValueError(f"{self.name_of(rows[found.index(None)])} is empty; remove the row")
        return found


def _channels(picture: Image.Image) -> int:
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        return 4
    return 1 if picture.mode in ("1", "L", "I", "F") or picture.mode.startswith("I;16") else 3


def _file_fingerprint(path: Path) -> str:
    status = path.stat()
    return hashlib.sha256(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}".encode()).hexdigest()[:16]


class _Array(ImageSet):
    """The member `arr_0` of an .npz; an uncompressed one is mapped into memory, of a compressed one the rows are inflated."""

    def __init__(self, path: Path, name: str):
        self.path, self.lock, self.stream, self.row = path, threading.Lock(), None, 0
        text = f"{name}={shown(str(path))}"
        shape, dtype, is_fortran, info, header = open_member(path, "arr_0")
        if dtype != np.uint8:
            raise ValueError(f"{text}: arr_0 has {dtype}, not uint8; write pixels 0 to 255 as uint8")
        if len(shape) != 4 or shape[3] not in (1, 3, 4) or is_fortran:
            order = " in Fortran's order" if is_fortran else ""
            raise ValueError(
                f"{text}: arr_0 has shape {shape}{order}; write uint8 (N, H, W, C) in C's order, with 1, 3 or 4 channels"
            )
        if 0 in shape:
            raise ValueError(f"{text}: arr_0 has shape {shape}, no images; give a file with some")
        self.size, self.channels, self.shape = shape[1:3], shape[3], shape
        if info.file_size - header != math.prod(shape):
            raise ValueError(f"{text}: arr_0 is truncated; make it again")
        self.start = None
        if info.compress_type == zipfile.ZIP_STORED:
            with open(path, "rb") as file:  # the local header has its own lengths of name and extra field
                file.seek(info.header_offset + 26)
                self.start = info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4))) + header
        self.header, self.is_sequential = header, self.start is None
        self._describe(path.name, shape[0], _file_fingerprint(path))

    def name_of(self, row: int) -> str:
        return f"image {row} of {self.path}"

    def _read(self, rows):
        if self.start is not None:
            pixels = np.memmap(self.path, np.uint8, "r", self.start, self.shape)
            pixels = np.array(pixels[rows.start : rows.stop : rows.step])
        else:
            with self.lock:
                pixels = self._inflated(rows)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()

    def _inflated(self, rows):
        bytes_per_image = math.prod(self.shape[1:])
        if self.stream is None or rows.start < self.row:
            self.stream = zipfile.ZipFile(self.path).open("arr_0.npy")  # noqa: SIM115
            self.stream.read(self.header)
            self.row = 0
        try:
            self.stream.seek((rows.start - self.row) * bytes_per_image, os.SEEK_CUR)
            content = self.stream.read((rows[-1] + 1 - rows.start) * bytes_per_image)
            self.row = rows[-1] + 1
            return np.frombuffer(bytearray(content), np.uint8).reshape(-1, *self.shape[1:])[:: rows.step]
        except Exception as error:  # zlib's and zipfile's
            raise ValueError(f"{self.path} is damaged ({one_line(error, 200)}); make it again") from None


def open_member(path: Path, member: str) -> tuple[tuple[int, ...], np.dtype, bool, zipfile.ZipInfo, int]:
    """Read the header of an array in an .npz.

    Returns:
        Shape, dtype, whether it is in Fortran's order, the member of the zip file, and the length of its header in bytes.

    Raises:
        ValueError: no zip file, or no such array.
    """
    try:
        with zipfile.ZipFile(path) as file:
            names = [name.removesuffix(".npy") for name in file.namelist()]
            if member not in names:
                raise ValueError(f"{path} has no {member} (it has {', '.join(names[:8])}); save the images as {member}")
            info = file.getinfo(f"{member}.npy")
            with file.open(info) as stream:
                version = np.lib.format.read_magic(stream)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, is_fortran, dtype = read(stream)
                return shape, dtype, is_fortran, info, stream.tell()
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, RuntimeError) as error:  # the last for encrypted ones
        raise ValueError(f"{path} is no whole .npz ({one_line(error, 200)}); make it again") from None


class DataImages(ImageSet):
    """Real images, prepared as in a network's training (`prepared_images`) and scaled to 8 bits.

    The grey level p of data with `levels` levels becomes round(255 p / (levels - 1)), the same as a pipeline's picture of it:
    17 levels are spread over 0 to 255, and 65,536 levels (16 bits) are rounded to 256. Data of 256 levels is unchanged.

    Args:
        count: number of images; if the data has more, the fixed random subset of `subset_rows`.
        data: public name of the data set, and split: for the description.
        **kwargs: image_column, max_broken, max_image_pixels and channels of `prepared_images`. An image that may be left out
            (max_broken) is replaced by the next one that can be read.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        unet,
        levels: int,
        count: int | None = None,
        *,
        data: str = "the data",
        split: str = "",
        **kwargs,
    ):
        self.images, rules = prepared_images(dataset, unet, levels, **kwargs)
        self.is_sequential = kwargs.get("max_image_pixels") is not None  # `pixel_limit` is not for several threads
        total = len(self.images)
        if not total:
            raise ValueError(f"{data} has no images in {split or 'this split'}; give another one")
        self.rows = subset_rows(total)[:count] if count is not None and count < total else np.arange(total)
        self.size, self.channels, self.levels = rules["size"], rules["channels"], levels
        rules = {key: rules[key] for key in ("levels", "crop", "background")}
        self._describe(data, len(self.rows), self._fingerprint(), split=split, **rules)

    def _read(self, rows):
        pixels = torch.stack([self.images[int(row)]["pixels"] for row in self.rows[rows.start : rows.stop : rows.step]])
        if self.levels == 256:
            return pixels
        return (pixels.double() * (255 / (self.levels - 1))).round().to(torch.uint8)

    def _fingerprint(self):
        """Digest of the encoded images, of files by name, size and time of their last change."""
        digest = hashlib.sha256()
        dataset = self.images.dataset
        (column,) = dataset.column_names
        for start in range(0, len(self.rows), MOST_HASHED):
            for image in dataset[self.rows[start : start + MOST_HASHED]][column]:
                image = image or {"bytes": None, "path": None}
                name, size, time = image["path"] or "", 0, 0
                if image["bytes"] is None and os.path.isfile(name):
                    status = os.stat(name)
                    size, time = status.st_size, status.st_mtime_ns
                digest.update(f"{os.path.basename(name)}\0{size}\0{time}\0".encode(errors="surrogateescape"))
                digest.update(image["bytes"] or b"")
        return digest.hexdigest()[:16]
