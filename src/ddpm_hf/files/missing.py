"""Mistyped paths: what to say of a folder that does not exist, before its name is looked for on the Hub; folders of runs."""

import difflib
import os
import re
from pathlib import Path

from ddpm_hf.arguments import shown

HUB_ID = re.compile(r"\w[\w.-]{0,95}(/\w[\w.-]{0,95})?")  # "name" or "user/name"


def missing_path(name: str) -> str | None:
    """A sentence about a path that does not exist, with the nearest one that does.

    Returns:
        None for a path that exists, and for an id on the Hub, "user/name", unless there is a folder "user" here.
    """
    path = Path(os.path.expanduser(name))
    if os.path.lexists(path) or (HUB_ID.fullmatch(name) and "/" in name and not path.parent.is_dir()):
        return None
    return f"there is no folder or file {shown(name)} here{did_you_mean_path(path)}"


def did_you_mean_path(path: Path) -> str:
    """The end of a message about a path that does not exist: the nearest one that does, or nothing."""
    close = nearest_path(path)
    return f"; did you mean {shown(str(close))}?" if close else ""


def nearest_path(path: Path) -> Path | None:
    """The existing path that differs from `path` in the spelling of one part; None if there is none."""
    candidates = [path, *path.parents]
    missing, folder = next((part, part.parent) for part in candidates if part.parent.is_dir() or part == part.parent)
    try:
        names = os.listdir(folder)
    except OSError:  # not a folder, or not readable
        return None
    remainder = path.relative_to(missing)
    names = [name for name in names if name[:1] != "." and os.path.exists(folder / name / remainder)]
    close = difflib.get_close_matches(missing.name, names, n=1)
    return folder / close[0] / remainder if close else None


def pipeline_of_run(folder: str | os.PathLike) -> Path | None:
    """The saved pipeline in the folder of a run; None for any other folder, that of a pipeline included."""
    pipeline = Path(folder) / "pipeline"
    is_run = (pipeline / "model_index.json").is_file() and not (Path(folder) / "model_index.json").is_file()
    return pipeline if is_run else None


def can_be_on_the_hub(name: str) -> bool:
    """Whether a name has the form of an id on the Hub."""
    return HUB_ID.fullmatch(name) is not None
