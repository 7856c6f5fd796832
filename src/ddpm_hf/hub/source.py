"""The source that is published beside weights: a pipeline and its parts in one file that needs no package."""

import importlib
import inspect
import os
import re

from ddpm_hf.files.atomic import write_text


def write_source(module: str, folder: str | os.PathLike, name: str = "pipeline") -> None:
    """Writes `self_contained_source` of a module as <folder>/<name>.py."""
    os.makedirs(folder, exist_ok=True)
    write_text(os.path.join(folder, f"{name}.py"), self_contained_source(module))


def self_contained_source(module: str) -> str:
    """The source of a module and of those of this package that it imports, as one that imports nothing of this package."""
    sources = {}

    def add(name):
        text = inspect.getsource(importlib.import_module(name)).strip()
        for part in re.findall(r"^from (ddpm_hf\.[\w.]+) import", text, flags=re.MULTILINE):
            if part not in sources:
                add(part)
        sources[name] = text

    add(module)
    return (
        re.sub(
            r"^from ddpm_hf\.[\w.]+ import (\([^)]+\)|[\w, ]+)\n",
            "",
            "\n\n\n".join(sources.values()),
            flags=re.MULTILINE,
        )
        + "\n"
    )
