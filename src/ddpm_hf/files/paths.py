"""Names of data sets and pipelines that may be paths: in one spelling, and what is wrong with a file. Imports nothing slow."""

import os
from pathlib import Path

from ddpm_hf.arguments import shown

BUILT_IN_DATA = ("digits", "mnist")  # of data.sources, which is slow to import
# endings of files that hold many images -> their loader in `datasets`
TABLES = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}


def normal_name(name: str) -> str:
    """The name of an existing file or folder without `~`, `./` and slashes at its end; other names as they are.

    A folder that is called as a built-in data set keeps its `./`, without which it would be that data set.
    """
    path = os.path.expanduser(name)
    if not name or not os.path.lexists(path) or name in BUILT_IN_DATA:
        return path
    normal = str(Path(path))
    return os.path.join(".", normal) if normal in BUILT_IN_DATA else normal


def is_same_source(name: object, other: object) -> bool:
    """Whether two names are the same, or lead to the same existing file or folder."""
    if name == other or not isinstance(name, str) or not isinstance(other, str):
        return name == other
    names = [normal_name(name), normal_name(other)]
    if any(name in BUILT_IN_DATA or not os.path.lexists(name) for name in names):
        return False
    return os.path.abspath(names[0]) == os.path.abspath(names[1])


def unreadable_file(name: str) -> str | None:
    """What is wrong with the name of a data set that is a file, in words; None for every other name."""
    if name in BUILT_IN_DATA or not os.path.isfile(name) or name.lower().endswith((*TABLES,)):
        return None
    folder = os.path.dirname(name) or "."
    return f"{shown(name)} is a file; give its folder, {shown(folder)}, or a {', '.join([*TABLES][:2])} or .tar file"
