"""SHA-256 digests of the files of a checkpoint, which reveal damage before anything is loaded."""

import hashlib
import json
from pathlib import Path

DIGESTS = "digests.json"  # file name -> SHA-256 in hexadecimal


def write_digests(folder: Path) -> None:
    """Write the digests of all files of a folder into it; to be called last, before the folder gets its name."""
    digests = {name: file_sha256(path) for name, path in _files(folder).items()}
    (folder / DIGESTS).write_text(json.dumps(digests, indent=1) + "\n", encoding="utf-8")


def check_digests(folder: Path, name: str | None = None) -> None:
    """Compare the files of a folder, or only the one called `name`, with the digests that were written with them.

    Files whose names start with a dot are ignored: file managers and network file systems create them.

    Raises:
        ValueError: a file has changed, is missing or was added, or the digests cannot be read. It names the file.
    """
    try:
        expected, files = json.loads((folder / DIGESTS).read_text(encoding="utf-8")), _files(folder)
        names = {name} if name else {*expected, *files}
    except (OSError, ValueError, TypeError, RecursionError):
        names = None
    if names is None or not isinstance(expected, dict):
        raise ValueError(f"{DIGESTS} cannot be read")
    for name in sorted(names):
        if name not in files:
            raise ValueError(f"{name} is missing")
        if name not in expected:
            raise ValueError(f"{name} is not a part of it")
        if file_sha256(files[name]) != expected[name]:
            raise ValueError(f"{name} is damaged")


def _files(folder):
    """Name -> path."""
    paths = (path for path in folder.iterdir() if path.name != DIGESTS and path.name[0] != "." and path.is_file())
    return {path.name: path for path in paths}


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
