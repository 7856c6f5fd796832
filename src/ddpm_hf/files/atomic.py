"""Atomic writes of files and folders, never through a link.

Every file that this package writes goes through here: files are always complete, also after a process was killed, and an
untrusted folder cannot redirect a write to a file outside it.
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
    """Returns an unpredictable name beside `path`; `leftovers` lists such names after a kill."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def final_name(path: str | os.PathLike) -> str:
    """Returns the final name of a file or folder, also while it is being written."""
    return re.sub(r"^\.(.+)\.[0-9a-f]{16}\.tmp$", r"\1", Path(path).name)


def leftovers(folder: str | os.PathLike) -> list[Path]:
    """Lists temporary files and folders in `folder` that remain from a killed process."""
    folder = Path(folder)
    names = os.listdir(folder) if folder.is_dir() else []
    return [folder / name for name in names if re.fullmatch(r"\..+\.[0-9a-f]{16}\.tmp", name)]


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Removes `leftovers`, as far as permissions allow. No other process may be writing in `folder`."""
    for path in leftovers(folder):
        _remove(path)


def _remove(path):
    """Removes a file, a link or a folder if it exists; ignores errors."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def replacing_file(path: str | os.PathLike, flush: bool = True) -> Iterator[Path]:
    """Replaces a file atomically: yields a new file to write to, which is renamed to `path` when the context ends.

    The file is created exclusively, under a random name, with the permissions of the user's umask. A link at `path` is
    replaced, not followed. The content is flushed to the disk before the rename, unless `flush` is False, for thousands of
    small files: these may be incomplete after a power cut. After an error the new file is removed, and `path` is unchanged.

    Raises:
        OSError: the folder is missing or not writable, the disk is full, or `path` is a folder.
    """
    path = Path(path)
    temporary = _temporary(path)
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0)
    os.close(os.open(temporary, flags, 0o666))
    try:
        yield temporary
        if flush:
            _flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if flush:
        _flush(path.parent)


@contextlib.contextmanager
def full_disk_as_oserror(path: str | os.PathLike) -> Iterator[None]:
    """Within this context what torch and safetensors raise when they cannot write becomes an OSError that names `path`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError":
            raise OSError(
                f"{path} cannot be written, as on a full disk: {' '.join(str(error).split())[:200]}"
            ) from error
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
    """Replaces a folder: yields a new folder to write to, which is renamed to `folder` when the context ends.

    Its files are flushed to the disk before the rename. A previous folder or link is first renamed to `moved_aside`; if the
    process is killed between the two renames, `restore_folder` brings it back. After an error the new folder is removed.

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
    """Returns the path to which `replacing_folder` moves the previous folder."""
    folder = Path(folder)
    return folder.with_name(f".{folder.name}.old")


def restore_folder(folder: str | os.PathLike) -> None:
    """Restores the previous folder if a process was killed inside `replacing_folder` before the new one was in place.

    If the new one is in place, the previous one is removed.
    """
    old = moved_aside(folder)
    if os.path.lexists(folder):
        _remove(old)
    elif os.path.lexists(old):
        os.replace(old, folder)


def remove_folder(folder: str | os.PathLike) -> None:
    """Removes a folder after renaming it: a killed process leaves a temporary folder, never an incomplete one of this name.

    Raises:
        OSError: it is missing or a link, or a file cannot be removed.
    """
    temporary = _temporary(Path(folder))
    os.replace(folder, temporary)
    shutil.rmtree(temporary)


def flush_to_disk(folder: str | os.PathLike) -> None:
    """Flushes a folder and all its files to the disk."""
    for path in (*Path(folder).rglob("*"), Path(folder)):
        if not path.is_symlink():
            _flush(path)


def _flush(path):
    """Flushes a file's content, or a folder's list of names, to the disk."""
    # some systems cannot flush folders: there a power cut can lose a rename
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def is_writable(folder: str | Path) -> bool:
    """Whether a file can be created in a folder; it is tried, because permissions alone do not decide."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def check_output_folder(folder: str | Path, name: str) -> None:
    """Check that files may be written to a folder, or that it may be made; nothing is changed.

    Args:
        name: what messages call it.

    Raises:
        ValueError: it is a file, its parent is missing, or it is not writable.
    """
    folder = Path(folder)
    parent = folder.absolute().parent
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f"{name} is a file; give a folder")
    if not parent.is_dir():
        raise ValueError(f"{name}: there is no folder {parent}; make it first")
    if not is_writable(folder if folder.exists() else parent):
        raise ValueError(f"{name} may not be written to; give another folder")
