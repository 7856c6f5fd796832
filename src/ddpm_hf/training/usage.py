"""The --help of the training commands. Imports nothing slow."""

import argparse
import dataclasses
import functools
import textwrap
import types
import typing

from ddpm_hf.command_help import command_words, format_examples, help_width
from ddpm_hf.training.config import RunConfig, TrainConfig, keys_of, sections_of
from ddpm_hf.training.sections import CLASSES, as_argument, signature

METAVARS = {bool: "[true|false]", int: "INT", float: "NUMBER", str: "TEXT", dict: "KEYS", list: "LIST"}


def usage(kind: type[RunConfig], program: str = "") -> str:
    """The help of a training command: the keys by group, those of the sections, and the presets."""
    program = program or kind.PROGRAM
    command, is_script = " ".join(command_words(program)), program.endswith(".py")
    # the scripts take the data as --data alone
    examples = [(f"--data {words}" if is_script and words[0] != "-" else words, text) for words, text in kind.EXAMPLES]
    launch = f"accelerate launch {command.removeprefix('python ')}" if is_script else f"accelerate launch -m {command}"
    width = help_width()
    notes = textwrap.fill(
        f"On several GPUs: {launch.replace('-m ddpm-hf', '-m ddpm_hf')} ... Every key is also a key of a YAML file. "
        "In parentheses: the value without a preset and without the key.",
        width,
        break_on_hyphens=False,
    )
    parser = argparse.ArgumentParser(
        prog=command,
        usage=f"%(prog)s {'' if is_script else '[DATA] '}[--config PRESET | FILE.yaml] [--KEY VALUE ...] [--dry_run]",
        description="\n\n".join([textwrap.fill(kind.SUMMARY, width), format_examples(command, examples), notes]),
        epilog="\n\n".join([*(_section(kind, name, width) for name in sections_of(kind)), _presets(kind, width)]),
        formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=34, width=width),
        add_help=False,
    )
    start = parser.add_argument_group("what to run")
    text = "a preset, or a .yaml file, whose `base:` may name another (digits if neither this nor --data is given)"
    start.add_argument("--config", metavar="TEXT", help=text)
    start.add_argument("--dry_run", action="store_true", help="print the whole config and the network's size, and stop")
    start.add_argument("-h", "--help", action="store_true", help="print this")
    groups = {}
    for field in keys_of(kind):
        name, text = field.metadata["group"], field.metadata["help"]
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        text = f"{text} ({_default(field)})".replace("%", "%%")
        groups[name].add_argument(f"--{field.name}", metavar=_metavar(field.type), help=text)
    return parser.format_help().rstrip()


# of the keys that follow from the data without a preset: how; see from_data.py
WITHOUT_PRESET = {
    "held_out": "0.05 where there is no test split",
    "label_column": "the only column of classes",
    "image_size": "their median shorter side, 8 to 64",
    "channels": "1 if all are grey, else 3",
    "scheduler": "those below",
    "unet": "by image size",
    "classifier": "by image size",
    "batch_size": "up to 128, by image size",
    "learning_rate": "2e-4 or less, by image size",
    "sample_steps": "100",
    "eval_every": "1000",
}


def _default(field):
    if field.name == "output_dir":
        return f"runs/NAME of the {'preset or the data' if field.default == 'runs/digits' else 'data, and -classifier'}"
    default = as_argument(field.default if field.default is not dataclasses.MISSING else field.default_factory())
    if not field.metadata["from_data"]:
        return default
    return WITHOUT_PRESET[field.name]


def _metavar(kind):
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return "|".join(METAVARS[typing.get_origin(option) or option] for option in kinds if option is not types.NoneType)


def _section(kind, section, width):
    lines = []
    for process, (module, name) in CLASSES[section].items():
        if process not in ("", "ddpm") and kind is not TrainConfig:
            continue
        keys = [f"{key}={default}" for key, default in signature(module, name).items() if key not in kind.DERIVED]
        head = f"--{section}.KEY VALUE, keys of {name}{f' (--process {process})' if process else ''}:"
        wrapped = textwrap.wrap("  ".join(keys), width - 4, break_long_words=False, break_on_hyphens=False)
        lines += [head, *(f"  {line}" for line in wrapped)]
    return "\n".join(lines)


def _presets(kind, width):
    lines = ["presets, of training/configs:"]
    for path in sorted(kind.PRESETS.glob("*.yaml")):
        comment = path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        lines.append(f"  {path.stem:<22}{textwrap.shorten(comment, width - 26, placeholder=' ...').rstrip(',;:')}")
    return "\n".join(lines)
