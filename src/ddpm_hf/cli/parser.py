"""Options of a command: one line each in --help, and one line for a mistake, with the nearest name. Imports nothing slow."""

import argparse
import contextlib
import functools
import json
import math
import re
import sys
import textwrap
from collections.abc import Callable, Iterator

from ddpm_hf.command_help import command_words, did_you_mean, format_examples, help_width
from ddpm_hf.errors import UserError
from ddpm_hf.files.missing import can_be_on_the_hub, missing_path, pipeline_of_run
from ddpm_hf.files.paths import BUILT_IN_DATA as BUILT_IN, unreadable_file


class Parser(argparse.ArgumentParser):
    """Parser of a command's options.

    Args:
        program: what the command calls itself in messages: "ddpm-hf sample", or "sample.py" for the script in training/.
        usage: the arguments after the program's name.
        summary: sentences, which are wrapped.
        examples: commands with a comment each, as (arguments, comment).
        section: name of the options --SECTION.KEY VALUE, which are parsed into the dictionary SECTION_settings.
    """

    def __init__(
        self, program: str, usage: str, summary: str, examples: list[tuple[str, str]], section: str | None = None
    ):
        self.section = section
        self.command = command_words(program)  # how a shell calls it
        width = help_width()
        summary = textwrap.fill(" ".join(summary.split()), width)
        super().__init__(
            prog=program,
            usage=f"{' '.join(self.command)} {usage}",
            description="\n\n".join([summary, format_examples(" ".join(self.command), examples)]),
            formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=30, width=width),
            epilog="In parentheses: the default, or what happens without the option.",
            add_help=False,
            allow_abbrev=False,
        )

    def group(self, title: str) -> Callable[..., argparse.Action]:
        """Begin a group of options in --help; returns the function that adds one."""
        return self.add_argument_group(title).add_argument

    def parse_args(self, args=None, namespace=None):
        """As argparse; --some-option is --some_option, and an unknown option is answered with the nearest one."""
        words = [_with_underscores(word) for word in args or []]
        settings = self._take_settings(words) if self.section else None
        option_names = [name for action in self._actions for name in action.option_strings]
        for word in words[: words.index("--") if "--" in words else None]:
            name = word.partition("=")[0]
            if name.startswith("--") and name not in option_names:
                self.error(f"unknown option {name[:60]!r}{did_you_mean(name[:60], option_names) or '; see --help'}")
        arguments = super().parse_args(words, namespace)
        if settings is not None:
            setattr(arguments, f"{self.section}_settings", settings)
        return arguments

    def _take_settings(self, words):
        """Take --SECTION.KEY VALUE and --SECTION.KEY=VALUE out of the words; return them as a dictionary."""
        settings, start = {}, f"--{self.section}."
        for place in reversed([place for place, word in enumerate(words) if word.startswith(start)]):
            name, equals, value = words[place].partition("=")
            if not equals and (place + 1 == len(words) or words[place + 1].startswith("--")):
                self.error(f"{name} needs a value")
            settings[name.removeprefix(start)] = json_or_text(value if equals else words.pop(place + 1))
            del words[place]
        return dict(reversed(settings.items()))

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """For argparse: a reader of finite numbers from `low` to `high`."""

    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or value == math.inf:
            name = "an integer" if kind is int else "a number"
            end = " or more" if high == math.inf else f" to {high}"
            raise argparse.ArgumentTypeError(f"{text[:40]} must be {name}, {low}{end}")
        return value

    return read


SEED = number(int, -(2**63), 2**64 - 1)  # what torch takes


def choose_device(name: str | None) -> str:
    """Return the device of this name; without a name the accelerator, or else the CPU.

    Raises:
        ValueError: torch cannot use it.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name} cannot be used: {str(error).strip().splitlines()[0]}") from None
    return name


def check_path(program: str, name: str, kind: str, subject: str = "") -> None:
    """Say at once that a folder does not exist: the Hub, which is asked for its name then, may take long to answer.

    Args:
        kind: what it is a folder of, "pipeline" or "data set".
        subject: begins the error's message.

    Raises:
        UserError: the name cannot be an id on the Hub either, or a data set is a file of another kind, such as a picture.
    """
    if kind == "data set" and (problem := unreadable_file(name)):
        raise UserError(f"{subject}{problem}")
    problem = None if name in BUILT_IN else missing_path(name)
    if problem and not can_be_on_the_hub(name):
        raise UserError(f"{subject}{problem}")
    if problem:
        end = "" if problem.endswith("?") else "."
        print(f"{program}: {problem}{end} Looking for a {kind} of this name on the Hub", file=sys.stderr, flush=True)


def find_pipeline(program: str, name: str) -> str:
    """The folder or Hub id of the pipeline that a command is given; for the folder of a run, its pipeline/.

    Raises as `check_path`.
    """
    check_path(program, name, "pipeline")
    return str(pipeline_of_run(name) or name)


@contextlib.contextmanager
def naming_options(arguments: argparse.Namespace, options: dict[str, str]) -> Iterator[None]:
    """Within this context an error about an argument of a call names the option that set it.

    Args:
        options: argument -> option, such as "num_inference_steps" -> "--steps".
    """
    try:
        yield
    except ValueError as error:
        name, equals, message = str(error).partition("=")
        value = getattr(arguments, options.get(name, "").removeprefix("--"), None)
        if not equals or value is None:
            raise
        end = re.sub(r"^(\[.*?\]|[^\s:;,]+)", "", message)  # without the argument's value
        raise UserError(f"{options[name]} {value}{end}") from error


def hide_progress_in_logs() -> None:
    """Switch off the libraries' progress bars where stderr is no terminal: a log would have a line for each update.

    Call it when the libraries have been imported. Our own bars follow the same rule, tqdm's `disable=None`.
    """
    if sys.stderr.isatty():
        return
    from diffusers.utils.logging import disable_progress_bar
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bar()
    disable_progress_bars()
    if "datasets" in sys.modules:  # which sampling does not need
        sys.modules["datasets"].disable_progress_bars()


def json_or_text(text):
    """A value of the command line: a number, true, false, null or a list, or else a text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return {"True": True, "False": False, "None": None}.get(text, text)


def _with_underscores(word):
    """--some-option=a-b as --some_option=a-b; other words as they are."""
    name, equals, value = word.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if name[:2] == "--" and name[2:] else word
