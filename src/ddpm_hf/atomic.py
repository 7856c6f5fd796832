"""Files and folders that are written whole or not at all, and never through a link.

Every file that this package writes goes through here: a name then always stands for one whole file, a killed process loses
nothing, and a folder that somebody else has made cannot redirect a write to a file outside it.
"""

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


def _temporary(path: Path) -> Path:
    """A name beside `path` that nobody can have guessed; `leftovers` finds it after a kill."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def leftovers(path: str | os.PathLike) -> list[Path]:
    """Temporary files and folders of `path` that a killed process has left behind."""
    path = Path(path)
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{16}}\.tmp")
    names = os.listdir(path.parent) if path.parent.is_dir() else []
    return [path.with_name(name) for name in names if pattern.fullmatch(name)]


@contextlib.contextmanager
def replacing_file(path: str | os.PathLike) -> Iterator[Path]:
    """A new, empty file beside `path` to write to; it takes the name `path` when the context ends without an error.

    The file is created exclusively, under a random name, with the permissions of the user's umask. A link at `path` is
    replaced, not followed. After an error nothing is left, and `path` is as it was.

    Raises:
        OSError: the folder is missing or not writable, the disk is full, or `path` is a folder.
    """
    path = Path(path)
    temporary = _temporary(path)
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0)
    os.close(os.open(temporary, flags, 0o666))
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike, text: str) -> Path:
    """Writes a UTF-8 text file with "\\n" line ends by `replacing_file`; returns its path."""
    return write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | os.PathLike, content: bytes) -> Path:
    """Writes a file by `replacing_file`; returns its path."""
    with replacing_file(path) as temporary:
        temporary.write_bytes(content)
    return Path(path)


@contextlib.contextmanager
def replacing_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """A new, empty folder beside `folder` to write to; it takes its name when the context ends without an error.

    Its files are on the disk before it does. A folder of that name is moved aside (`moved_aside`) for the moment that it takes
    to put the new one in its place: of a process that is killed then, `restore_folder` brings it back. After an error nothing
    is left.

    Raises:
        OSError: the parent folder is missing or not writable, or the disk is full.
    """
    folder = Path(folder)
    temporary = _temporary(folder)
    os.mkdir(temporary)
    try:
        yield temporary
        flush_to_disk(temporary)
        old = moved_aside(folder)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk must not stay full
        raise
    shutil.rmtree(old, ignore_errors=True)


def moved_aside(folder: str | os.PathLike) -> Path:
    """Where `replacing_folder` keeps the previous folder while the new one takes its place."""
    folder = Path(folder)
    return folder.with_name(f".{folder.name}.old")


def restore_folder(folder: str | os.PathLike) -> None:
    """Brings back the previous folder where a process was killed inside `replacing_folder`, before the new one was in place."""
    if (old := moved_aside(folder)).is_dir() and not Path(folder).exists():
        os.replace(old, folder)


def flush_to_disk(folder: str | os.PathLike) -> None:
    """Waits until the files of a folder are on the disk, so that a name given to it afterwards stands for a whole folder."""
    for path in Path(folder).rglob("*"):
        if path.is_file() and not path.is_symlink():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
