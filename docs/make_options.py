"""Write docs/options.md, the tables of the options of all commands: python docs/make_options.py"""

import dataclasses
import inspect
import json
from pathlib import Path

from ddpm_hf import DDPMUNet, NoisyClassifier, VariationalDDPMScheduler, VESDEScheduler, VPSDEScheduler
from ddpm_hf.cli import convert, evaluate, optimize_chain, push, sample
from ddpm_hf.training.config import ClassifierConfig, TrainConfig, keys_of

PAGE = Path(__file__).with_name("options.md")
HEAD = """# Options

You want to know what you can set, and which value holds if you do not. `ddpm-hf train --help`, and `--help` of the
other commands, print the same.

- The keys of `train` and `train-classifier` are options of the command (`--steps 500`) and keys of a YAML file
  (`steps: 500`).
- The keys of `unet`, `classifier` and `scheduler` are options with a dot: `--unet.dropout 0.1`.
- Defaults in *italics* are those of runs with a preset, if the preset does not set the key. Without a preset the run
  chooses the value for your data: see [settings](training.md#settings).
- In the names of options, hyphens and underscores are the same.

`python docs/make_options.py` writes this page from the code.
"""
COMMANDS = {
    "sample": sample.make_parser,
    "evaluate": evaluate.make_parser,
    "optimize-chain": optimize_chain.make_parser,
    "convert": convert.make_parser,
    "push": push.make_parser,
}
SECTIONS = {
    "unet": DDPMUNet,
    "classifier": NoisyClassifier,
    "scheduler": VariationalDDPMScheduler,
    "scheduler, for process vp or subvp": VPSDEScheduler,
    "scheduler, for process ve": VESDEScheduler,
}


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def format_value(default) -> str:
    """Format a default value as on the command line."""
    return f"`{json.dumps(default).replace(chr(34), '')}`"


def option_rows(config_class) -> dict[str, list[list[str]]]:
    """Return the rows (option, default, meaning) of a config's keys, by group."""
    groups = {}
    for field in keys_of(config_class):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        text = f"*{format_value(default)}*" if field.metadata["from_data"] else format_value(default)
        row = [f"`--{field.name}`", text, field.metadata["help"]]
        groups.setdefault(field.metadata["group"], []).append(row)
    return groups


def config_tables(groups: dict[str, list[list[str]]]) -> str:
    head = ["option", "default", "meaning"]
    return "\n".join(f"**{name}**\n\n{table(head, rows)}" for name, rows in groups.items())


def parser_table(parser) -> str:
    rows = []
    for action in parser._actions:
        if action.dest != "help":
            name = action.option_strings[0] if action.option_strings else action.metavar or action.dest
            metavar = action.metavar if isinstance(action.metavar, str | None) else " ".join(action.metavar)
            values = f" {metavar}" if action.option_strings and action.nargs != 0 and metavar else ""
            rows.append([f"`{name}{values}`", (action.help or "") % {"default": action.default}])
    return table(["option", "meaning (default)"], rows)


def section_table(owner: type) -> str:
    derived = {"self", *TrainConfig.DERIVED, *ClassifierConfig.DERIVED}
    parameters = inspect.signature(owner.__init__).parameters.values()
    rows = [
        [f"`{parameter.name}`", "required" if parameter.default is parameter.empty else format_value(parameter.default)]
        for parameter in parameters
        if parameter.name not in derived
    ]
    return table(["key", "default"], rows)


def page() -> str:
    keys, classifier_keys = option_rows(TrainConfig), option_rows(ClassifierConfig)
    classifier_only = {
        name: [row for row in rows if row not in keys.get(name, [])] for name, rows in classifier_keys.items()
    }
    common = {row[0] for rows in classifier_keys.values() for row in rows} - {
        row[0] for rows in classifier_only.values() for row in rows
    }
    introduction = (
        "It takes these keys of `ddpm-hf train`, with the same defaults: " + ", ".join(sorted(common)) + ". Its own:"
    )
    blocks = [HEAD, "## ddpm-hf train", config_tables(keys), "## ddpm-hf train-classifier", introduction]
    blocks += [config_tables({name: rows for name, rows in classifier_only.items() if rows})]
    for name, make_parser in COMMANDS.items():
        blocks += [f"## ddpm-hf {name}", parser_table(make_parser())]
    for name, owner in SECTIONS.items():
        blocks += [f"## Keys of {name}", section_table(owner)]
    return "\n".join(block if block.endswith("\n") else f"{block}\n" for block in blocks)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
