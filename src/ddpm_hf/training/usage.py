"""What --help prints of a training script. Imports nothing slow: keys of networks and processes are read from their source."""

import argparse
import ast
import dataclasses
import functools
import inspect
import json
import textwrap
import types
import typing
from pathlib import Path

from ddpm_hf.training.config import RunConfig, TrainConfig, sections_of

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


METAVARS = {bool: "[true|false]", int: "INT", float: "NUMBER", str: "TEXT", dict: "KEYS", list: "LIST"}


def usage(kind: type[RunConfig]) -> str:
    """The help of the script of a kind of config: its keys by group, those of its sections, and its presets."""
    parser = argparse.ArgumentParser(
        prog=f"python training/{kind.PROGRAM}",
        usage="%(prog)s [--config PRESET | FILE.yaml] [--KEY VALUE ...] [--dry_run]",
        description=inspect.cleandoc(kind.DESCRIPTION),
        epilog="\n\n".join([*(_section(kind, name) for name in sections_of(kind)), _presets(kind)]),
        formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=34, width=128),
        add_help=False,
    )
    start = parser.add_argument_group("what to run")
    text = "a preset, or a .yaml file, whose `base:` may name another (digits if neither this nor --data is given)"
    start.add_argument("--config", metavar="TEXT", help=text)
    start.add_argument("--dry_run", action="store_true", help="print the whole config and the network's size, and stop")
    start.add_argument("-h", "--help", action="store_true", help="print this")
    groups = {}
    for field in dataclasses.fields(kind):
        if not field.init:
            continue
        name, text = field.metadata["group"], field.metadata["help"]
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        told = f"{text} ({_default(field)})".replace("%", "%%")
        groups[name].add_argument(f"--{field.name}", metavar=_metavar(field.type), help=told)
    return parser.format_help().rstrip()


WITHOUT_PRESET = {"sample_steps": "100", "eval_every": "1000, for runs of 1000 steps or more"}


def _default(field):
    if field.name == "output_dir":
        return f"runs/NAME of the {'preset or the data' if field.default == 'runs/digits' else 'data, and -classifier'}"
    shown = _shown(field.default if field.default is not dataclasses.MISSING else field.default_factory())
    if not field.metadata["found"]:
        return shown
    return f"{shown}; without a preset: {WITHOUT_PRESET.get(field.name, 'from the data')}"


def _shown(value):
    """As it is written on the command line."""
    return json.dumps(value, separators=(",", ":")).replace('"', "")


def _metavar(kind):
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return "|".join(METAVARS[typing.get_origin(each) or each] for each in kinds if each is not types.NoneType)


def _section(kind, section):
    parts = []
    for process, where in CLASSES[section].items():
        if process not in ("", "ddpm") and kind is not TrainConfig:
            continue
        keys = [f"{name}={default}" for name, default in _signature(*where).items() if name not in kind.DERIVED]
        head = f"--{section}.KEY VALUE, keys of {where[1]}{f' (process {process})' if process else ''}:"
        wrapped = textwrap.wrap("  ".join(keys), 124, break_long_words=False, break_on_hyphens=False)
        parts += [head, *(f"  {line}" for line in wrapped)]
    return "\n".join(parts)


def _presets(kind):
    lines = ["presets, of training/configs:"]
    for path in sorted(kind.PRESETS.glob("*.yaml")):
        comment = path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        lines.append(f"  {path.stem:<22}{textwrap.shorten(comment, 102, placeholder=' ...').rstrip(',;:')}")
    return "\n".join(lines)


def section_keys(kind: type[RunConfig], section: str) -> set[str]:
    """The keys that a section takes, of whatever process."""
    return {key for where in CLASSES[section].values() for key in _signature(*where)} - {*kind.DERIVED}


@functools.cache
def _signature(module, name):
    """The keys of a class and their defaults as they stand in its source."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    arguments = next(node.args for node in body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    names = [each.arg for each in arguments.args[1:]]
    defaults = [_shown(ast.literal_eval(each)) for each in arguments.defaults]
    return dict(zip(names, ["required"] * (len(names) - len(defaults)) + defaults))
