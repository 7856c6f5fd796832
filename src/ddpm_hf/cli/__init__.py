"""The command line: ddpm-hf train | train-classifier | sample | evaluate | optimize-chain | convert | push.

Arguments are parsed and checked before anything slow is imported, so that mistakes are reported at once.
"""

import os
import sys
import tarfile

from ddpm_hf.cli.parser import did_you_mean
from ddpm_hf.command_help import format_examples
from ddpm_hf.errors import UserError

COMMANDS = {
    "train": "train a diffusion model on a folder of pictures or another data set",
    "train-classifier": "train a classifier of noisy images, for classifier guidance",
    "sample": "draw a sheet of samples from a saved pipeline",
    "evaluate": "measure bits/dim of a data set under a saved pipeline",
    "optimize-chain": "compute the best variances and lists of timesteps for a trained network",
    "convert": "open a checkpoint of another code base as a saved pipeline, or write one",
    "push": "publish a saved pipeline on the Hub",
}
EXAMPLES = [
    ("train my_folder/", "settings follow the pictures"),
    ("train my_folder/ --minutes 30", "as many steps as fit into half an hour"),
    ("train --config digits", "a preset"),
    ("sample runs/my_folder/pipeline", "a sheet of samples"),
    ("evaluate runs/my_folder/pipeline --data my_folder/", "bits/dim of the held-out images"),
    ("convert 256x256_diffusion_uncond.pt --out adm-256", "OpenAI's checkpoint as a pipeline"),
    ("push runs/my_folder/pipeline --repo_id user/name", "publish it on the Hub"),
]


def main(argv: list[str] | None = None, program: str | None = None) -> None:
    """Run a command.

    Args:
        argv: the command and its arguments; None for `sys.argv`.
        program: the program's name in messages; None for "ddpm-hf COMMAND".
    """
    try:
        _dispatch(argv, program)
    except BrokenPipeError:  # as in `ddpm-hf --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _dispatch(argv, program):
    command, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print(help_text())
    elif command == "--version":
        from ddpm_hf import __version__

        print(f"ddpm-hf {__version__}")
    elif command in COMMANDS:
        run(command, arguments, program or f"ddpm-hf {command}")
    else:
        hint = did_you_mean(command, list(COMMANDS)) or f"; commands: {', '.join(COMMANDS)}"
        print(f"ddpm-hf: unknown command {command[:60]!r}{hint}", file=sys.stderr)
        sys.exit(2)


def run(command: str, argv: list[str], program: str) -> None:
    """Run one of the `COMMANDS`; an error that the user can mend ends the process with one line."""
    if command in ("train", "train-classifier"):
        try:
            from ddpm_hf.cli.train import main as run_training
        except UserError as error:
            sys.exit(f"{program}: {error}")
        return run_training(command, argv, program)
    if command == "sample":
        from ddpm_hf.cli.sample import main as run_command
    elif command == "evaluate":
        from ddpm_hf.cli.evaluate import main as run_command
    elif command == "optimize-chain":
        from ddpm_hf.cli.optimize_chain import main as run_command
    elif command == "convert":
        from ddpm_hf.cli.convert import main as run_command
    else:
        from ddpm_hf.cli.push import main as run_command
    try:
        run_command(argv, program)
    except (UserError, ValueError, OSError, ImportError, tarfile.TarError) as error:
        sys.exit(f"{program}: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit(f"{program}: interrupted")


def help_text() -> str:
    """The text of `ddpm-hf --help`."""
    width = max(map(len, COMMANDS)) + 2
    return "\n".join(
        [
            "usage: ddpm-hf COMMAND ...",
            "",
            "Train diffusion models on your images, sample from them, measure their likelihood, and publish them.",
            "",
            format_examples("ddpm-hf", EXAMPLES),
            "",
            "commands:",
            *(f"  {name:{width}}{text}" for name, text in COMMANDS.items()),
            "",
            "ddpm-hf COMMAND --help lists a command's options; ddpm-hf --version prints the version.",
        ]
    )
