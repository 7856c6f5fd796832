"""Files and folders that are written whole or not at all, and never through a link.

Every file that this package writes goes through here: a name then always stands for one whole file, a killed process loses
nothing, and a folder that somebody else has made cannot redirect a write to a file outside it.
"""

import contextlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def _temporary(path: Path) -> Path:
    """A name beside `path` that nobody can guess; `leftovers` finds it after a kill."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def final_name(path: str | os.PathLike) -> str:
    """The name that a file or folder will have, also while it is being written."""
    return re.sub(r"^\.(.+)\.[0-9a-f]{16}\.tmp$", r"\1", Path(path).name)


def leftovers(folder: str | os.PathLike) -> list[Path]:
    """Temporary files and folders that a killed process has left behind in `folder`."""
    folder = Path(folder)
    names = os.listdir(folder) if folder.is_dir() else []
    return [folder / name for name in names if re.fullmatch(r"\..+\.[0-9a-f]{16}\.tmp", name)]


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Removes what `leftovers` finds. No other process may be writing in `folder`; what cannot be removed stays."""
    for path in leftovers(folder):
        _remove(path)


def _remove(path):
    """Removes a file, a link or a folder, if it is there and may be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def replacing_file(path: str | os.PathLike) -> Iterator[Path]:
    """A new, empty file beside `path` to write to; it takes the name `path` when the context ends without an error.

    The file is created exclusively, under a random name, with the permissions of the user's umask. A link at `path` is
    replaced, not followed. The content is on the disk before the name. After an error nothing is left, and `path` is as it was.

    Raises:
        OSError: the folder is missing or not writable, the disk is full, or `path` is a folder.
    """
    path = Path(path)
    temporary = _temporary(path)
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0)
    os.close(os.open(temporary, flags, 0o666))
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush(path.parent)


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

    Its files are on the disk before it does, and the name is when this ends. A folder of that name, or a link, is moved aside
    (`moved_aside`) for the moment that it takes to put the new one in its place: of a process that is killed then,
    `restore_folder` brings it back. After an error nothing is left.

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
        _remove(old)
        if os.path.lexists(folder):
            os.replace(folder, old)
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk must not stay full
        raise
    _flush(folder.parent)
    _remove(old)


def moved_aside(folder: str | os.PathLike) -> Path:
    """Where `replacing_folder` keeps the previous folder while the new one takes its place."""
    folder = Path(folder)
    return folder.with_name(f".{folder.name}.old")


def restore_folder(folder: str | os.PathLike) -> None:
    """Brings back the previous folder where a process was killed inside `replacing_folder`, before the new one was in place.

    Where the new one is in place, the previous one is removed.
    """
    old = moved_aside(folder)
    if os.path.lexists(folder):
        _remove(old)
    elif os.path.lexists(old):
        os.replace(old, folder)


def remove_folder(folder: str | os.PathLike) -> None:
    """Removes a folder. Its name is gone at once: a killed process leaves a temporary name, never a part under this one.

    Raises:
        OSError: it is missing or a link, or a part of it cannot be removed.
    """
    temporary = _temporary(Path(folder))
    os.replace(folder, temporary)
    shutil.rmtree(temporary)


def flush_to_disk(folder: str | os.PathLike) -> None:
    """Waits until a folder and all that is in it are on the disk, so that a name given to it afterwards stands for all."""
    for path in (*Path(folder).rglob("*"), Path(folder)):
        if not path.is_symlink():
            _flush(path)


def _flush(path):
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    # some systems cannot do it for folders: all is as whole there, but not after a power cut
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def is_writable(folder: str | Path) -> bool:
    """Whether a file can be made in a folder. It is tried, as permissions alone do not decide it."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
