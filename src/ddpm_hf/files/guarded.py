"""Reads untrusted files: bounded in size, only inside their folder, with every value checked."""

import contextlib
import json
import os
import re
import reprlib
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

# largest text file in bytes; a config with the betas of 4,000 steps has 0.1 million
TEXT_BYTES = 4 * 2**20


PICTURE_BYTES = 64 * 2**20


JSON_DEPTH, DIGITS = 16, 40  # most levels of nesting, and digits of a number


def one_line(error: BaseException, most: int = 500) -> str:
    """Returns an error's message in one line of up to `most` characters, with its type unless it is a ValueError or OSError."""
    text = " ".join(str(error).split())
    text = text if text and isinstance(error, (ValueError, OSError)) else f"{type(error).__name__} {text}".strip()
    return text if len(text) <= most else f"{text[: most - 4]} ..."


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within this context an error becomes a ValueError of one line that names `path`; OSError and MemoryError pass."""
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:
        text = one_line(error)
        raise ValueError(text if str(path.parent) in text else f"{path}: {text}") from error


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path, with links resolved, is inside `folder`; snapshots of the Hub's cache may link to its blobs."""
    real, folder = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    snapshots = [parent for parent in folder.parents if parent.name == "snapshots"]
    return real.is_relative_to(folder) or any(real.parent == parent.parent / "blobs" for parent in snapshots)


def check_file(path: Path, folder: Path, most: int | None = TEXT_BYTES) -> Path:
    """Returns `path` if it is a regular file inside `folder` with at most `most` bytes.

    Raises:
        ValueError: it is a link to outside of the folder, no regular file, or too large.
        FileNotFoundError: it is missing.
    """
    if not is_inside(path, folder):
        raise ValueError(f"{path} is a link to outside of {folder}; put a copy of the file in its place")
    try:
        status = path.stat()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing; save the pipeline again") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is a {'folder' if path.is_dir() else 'device or pipe'}, not a file; remove it")
    if most is not None and status.st_size > most:
        raise ValueError(f"{path} has {status.st_size:,} bytes; at most {most:,} are allowed")
    return path


def read_text(path: Path, folder: Path | None = None) -> str:
    """Reads a UTF-8 text file inside `folder`, by default its own. Raises as `check_file`; ValueError if it is not UTF-8."""
    try:
        return check_file(path, folder or path.parent).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); write it again") from None


def read_json(path: Path, folder: Path | None = None) -> dict:
    """Reads a JSON object with unique keys, bounded numbers and bounded depth. Raises as `read_text`, and ValueError."""
    text = read_text(path, folder)
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_int=_number(int), parse_float=_number(float))
        _check_depth(value)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair cannot be written
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({one_line(error)}); save the pipeline again") from None
    if not isinstance(value, dict):
        raise ValueError(
            f"{path} holds {reprlib.repr(value)}, not an object of keys and values; save the pipeline again"
        )
    return value


def _object(pairs):
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {reprlib.repr(twice)} is there twice")
    return values


def _number(kind):
    def parse(digits):
        if len(digits) > DIGITS:
            raise ValueError(f"a number has {len(digits):,} digits")
        return kind(digits)

    return parse


def _check_depth(value, depth=0):
    if depth > JSON_DEPTH:
        raise ValueError(f"it is nested more than {JSON_DEPTH} levels deep")
    if isinstance(value, (dict, list)):
        for entry in value.values() if isinstance(value, dict) else value:
            _check_depth(entry, depth + 1)


class Kind(NamedTuple):
    """The kind of value that a key of a JSON file takes, in words and as a test."""

    words: str
    fits: Callable[[Any], bool]

    def __or__(self, other):
        return Kind(f"{self.words} or {other.words}", lambda value: self.fits(value) or other.fits(value))


def _matches(pattern):
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value, re.ASCII) is not None


NULL = Kind("null", lambda value: value is None)


TEXT = Kind("text of 1 to 500 characters", lambda value: isinstance(value, str) and 0 < len(value) <= 500)


WORD = Kind("a word of letters, digits and . _ + -", _matches(r"[\w.+-]{1,100}"))


COUNT = Kind("an integer, 0 or more", lambda value: type(value) is int and 0 <= value < 2**63)


INTEGER = Kind("an integer", lambda value: type(value) is int and abs(value) < 2**64)


NUMBER = Kind("a finite number", lambda value: type(value) in (int, float) and abs(value) < 1e39)


SHARE = Kind("a number in [0, 1)", lambda value: NUMBER.fits(value) and 0 <= value < 1)


def check_values(values: dict, schema: dict[str, Kind], path: Path, mend: str = "save the pipeline again") -> dict:
    """Returns `values` with None for missing keys of the schema. Raises ValueError for the first value that does not fit."""
    values = values | {key: None for key in schema if key not in values}
    for key, kind in schema.items():
        if not kind.fits(values[key]):
            raise ValueError(f"{path}: {key}={reprlib.repr(values[key])} must be {kind.words}; {mend}")
    return values
