"""The keys of a network and of a process, read from the source of their classes, so that torch need not be imported."""

import ast
import functools
import json
from pathlib import Path

from ddpm_hf.training.config import RunConfig

PACKAGE = Path(__file__).parents[1]

# section -> process, or "" -> module of the package and class
CLASSES = {
    "unet": {"": ("models/unet", "DDPMUNet")},
    "classifier": {"": ("models/classifier", "NoisyClassifier")},
    "scheduler": {
        "ddpm": ("schedulers/ddpm", "VariationalDDPMScheduler"),
        "vp, subvp": ("schedulers/sde_samplers", "VPSDEScheduler"),
        "ve": ("schedulers/sde_samplers", "VESDEScheduler"),
    },
}


def section_keys(kind: type[RunConfig], section: str, process: str | None = None) -> set[str]:
    """The keys that a section takes with a process, or with any of them."""
    sources = [source for names, source in CLASSES[section].items() if process is None or process in names.split(", ")]
    return {key for source in sources for key in signature(*source)} - {*kind.DERIVED}


@functools.cache
def signature(module: str, name: str) -> dict[str, str]:
    """The arguments of a class's constructor and their defaults, as they are written in its source."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    arguments = next(node.args for node in body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    names = [argument.arg for argument in arguments.args[1:]]
    defaults = [as_argument(ast.literal_eval(default)) for default in arguments.defaults]
    return dict(zip(names, ["required"] * (len(names) - len(defaults)) + defaults))


def as_argument(value) -> str:
    """A value as it is written on the command line."""
    return json.dumps(value, separators=(",", ":")).replace('"', "")
