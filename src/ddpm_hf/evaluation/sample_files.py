"""Samples on the disk: a folder of PNG files, one for each seed, which is also packed as .npz (ADM) or .parquet (datasets)."""

import contextlib
import csv
import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from ddpm_hf.arguments import shown
from ddpm_hf.files.atomic import check_output_folder, remove_leftovers, replacing_file, write_text

RECORD, TABLE = "samples.json", "metadata.csv"  # the second is read by datasets' "imagefolder"
PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
PACKED = (".npz", ".parquet")
ROWS = 256  # of a parquet row group


class SampleFolder:
    """A folder of samples: 00000017.png is the image of seed 17, samples.json says what all of them were drawn with.

    Several processes may write into it at once.

    Args:
        folder: it is created by `begin`.
        record: what determines the images beside their seeds; values that JSON has.
    """

    def __init__(self, folder: Path, record: dict):
        self.folder, self.record = Path(folder), json.loads(json.dumps(record))

    def check(self) -> None:
        """Check that samples with this record may be written to the folder; nothing is changed.

        Raises:
            ValueError: it is a file, is not writable, or holds other files, or samples that were drawn with other settings.
        """
        folder = self.folder
        check_output_folder(folder, str(folder))
        if not folder.exists() or not any(folder.iterdir()):
            return
        found = read_record(folder)
        if found is None:
            raise ValueError(f"{folder} holds other files and no {RECORD}; give an empty folder")
        for key in sorted({*found, *self.record} - {"pipeline"}):  # a moved pipeline is the same
            if found.get(key) != self.record.get(key):
                text = f"{key}={shown(found.get(key))}, not {shown(self.record.get(key))}"
                raise ValueError(f"{folder} holds samples of another run, with {text}; give another folder")

    def begin(self) -> None:
        """Create the folder with its record. Raises as `check`."""
        self.check()
        self.folder.mkdir(exist_ok=True)
        if not (self.folder / RECORD).exists():
            write_text(self.folder / RECORD, json.dumps(self.record, indent=1) + "\n")

    def path(self, seed: int) -> Path:
        """The file of a seed's image."""
        return self.folder / f"{seed:08d}.png"

    def finished(self) -> set[int]:
        """The seeds whose images are in the folder, complete or not."""
        with os.scandir(self.folder) as entries:
            names = (re.fullmatch(r"(\d{8,})\.png", entry.name) for entry in entries)
            return {int(match[1]) for match in names if match}

    def missing(self, seeds: Iterable[int]) -> list[int]:
        """Those of the seeds whose images are not complete, as after a power cut."""
        finished = self.finished()
        return [seed for seed in seeds if seed not in finished or not _is_complete(self.path(seed))]

    def write(self, seed: int, image: Image.Image) -> None:
        """Write the image of a seed: the whole file or none. It is not flushed to the disk, which `missing` accounts for."""
        with replacing_file(self.path(seed), flush=False) as temporary:
            image.save(temporary, format="PNG")

    def finish(self, labels: dict[int, int] | None, class_names: list[str] | None) -> None:
        """Write the table of file names, seeds and labels; no process may be writing images.

        Args:
            labels: seed -> label, of every image in the folder; None without classes.
            class_names: the names of the labels; None if they are unknown.
        """
        remove_leftovers(self.folder)
        columns = ["file_name", "seed", *(["label"] if labels else []), *(["class"] if labels and class_names else [])]
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(columns)
        for seed in sorted(self.finished()):
            row = [self.path(seed).name, seed]
            if labels:
                row += [labels[seed], *([class_names[labels[seed]]] if class_names else [])]
            table.writerow(row)
        write_text(self.folder / TABLE, text.getvalue())

    def pack(
        self, path: Path, seeds: list[int], labels: dict[int, int] | None, class_names: list[str] | None = None
    ) -> None:
        """Write the images of the seeds, in this order, to one .npz or .parquet file, atomically and image by image.

        .npz has the layout of ADM's evaluation: uint8 `arr_0` (N, H, W, C), and with classes int64 `arr_1` (N,). A .parquet
        file has the columns image, seed and, with classes, label, and is opened by `datasets`.
        """
        with replacing_file(path) as temporary:
            if path.suffix == ".npz":
                self._pack_npz(temporary, seeds, labels)
            else:
                self._pack_parquet(temporary, seeds, labels, class_names)

    def _pack_npz(self, path, seeds, labels):
        shape = _pixels(self.path(seeds[0])).shape
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(seeds), *shape)}
        with zipfile.ZipFile(path, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for seed in seeds:
                    member.write(_pixels(self.path(seed)).tobytes())
            if labels:
                with archive.open("arr_1.npy", "w") as member:
                    np.lib.format.write_array(member, np.array([labels[seed] for seed in seeds], dtype=np.int64))

    def _pack_parquet(self, path, seeds, labels, class_names):
        import datasets
        import pyarrow
        import pyarrow.parquet

        features = {"image": datasets.Image(), "seed": datasets.Value("int64")}
        if labels:
            features["label"] = datasets.ClassLabel(names=class_names) if class_names else datasets.Value("int64")
        schema = datasets.Features(features).arrow_schema
        with pyarrow.parquet.ParquetWriter(path, schema) as writer:
            for start in range(0, len(seeds), ROWS):
                group = seeds[start : start + ROWS]
                files = [self.path(seed) for seed in group]
                rows = {"image": [{"bytes": file.read_bytes(), "path": file.name} for file in files], "seed": group}
                if labels:
                    rows["label"] = [labels[seed] for seed in group]
                writer.write_table(pyarrow.table(rows, schema=schema))


def read_record(folder: Path) -> dict | None:
    """The content of a folder's samples.json; None without a valid one."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def record_key(record: dict) -> str:
    """Eight digits that tell samples of different records apart; the pipeline's name does not count."""
    facts = {key: value for key, value in record.items() if key != "pipeline"}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]


def _is_complete(path):
    with contextlib.suppress(OSError), open(path, "rb") as file:
        file.seek(-len(PNG_END), os.SEEK_END)
        return file.read() == PNG_END
    return False


def _pixels(path):
    """(H, W, C) uint8."""
    with Image.open(path) as image:
        pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels
