"""`ddpm-hf train` and `ddpm-hf train-classifier`: data -> a trained model."""

import re
import shlex
import sys
from pathlib import Path

from ddpm_hf.cli.parser import BUILT_IN, check_path, hide_progress_in_logs
from ddpm_hf.errors import UserError
from ddpm_hf.extras import require_extra
from ddpm_hf.training.command_line import load_config
from ddpm_hf.training.config import ClassifierConfig, RunConfig, TrainConfig, keys_of
from ddpm_hf.training.rank import is_main_process


def main(command: str, argv: list[str], program: str) -> None:
    kind = TrainConfig if command == "train" else ClassifierConfig
    is_script = program.endswith(".py")
    try:
        config, dry_run = load_config(argv if is_script else with_data_option(argv, kind), kind, program)
        names = {"data": "data set", "eval_data": "data set", "init_from": "pipeline", "pipeline": "pipeline"}
        for key, kind_of_folder in names.items() if is_main_process() else ():
            name = getattr(config, key, None)
            # a resumed run has the values of its base pipeline, which is not opened again
            if name and (kind_of_folder == "data set" or not config.resolved):
                check_path(program, name, kind_of_folder, subject=f"{key}={name!r}: ")
        for module in ("datasets", "matplotlib", "psutil"):
            require_extra(module, "train", "training runs")
    except UserError as error:
        sys.exit(f"{program}: {error}")

    from ddpm_hf.training.launch import main as launch
    from ddpm_hf.training.loop import train

    hide_progress_in_logs()

    def train_and_summarize(config):
        folder = train(config)
        if is_main_process():
            print("\n".join(summary_lines(config, folder)))

    launch(config, dry_run, train if is_script or kind is ClassifierConfig else train_and_summarize)


def with_data_option(argv: list[str], kind: type[RunConfig]) -> list[str]:
    """The arguments with --data before the word that is the data: `my_folder --steps 10`, `--steps 10 my_folder`."""
    switches = {f"--{field.name}" for field in keys_of(kind) if field.type is bool} | {"--dry_run"}
    takes_value = False
    for place, word in enumerate(argv):
        if word.startswith("--"):
            takes_value = "=" not in word and word.replace("-", "_").replace("__", "--", 1) not in switches
        elif takes_value or word.startswith("-") or _is_switch_value(argv, place, word):
            takes_value = False
        else:
            return [*argv[:place], "--data", *argv[place:]]
    return argv


def _is_switch_value(argv, place, word):
    """Whether a word says true or false after a switch."""
    return (
        place > 0 and argv[place - 1].startswith("--") and word.lower() in ("true", "false", "yes", "no", "on", "off")
    )


def summary_lines(config: TrainConfig, folder: Path) -> list[str]:
    """What a finished run has made, and the commands that go on with it.

    Args:
        folder: the saved pipeline, <output_dir>/pipeline.
    """
    run = folder.parent
    measured = measured_text(run)
    lines = [measured] if measured else []
    sheets = sorted(path for path in run.glob("samples/*.png") if re.fullmatch(r"\d+", path.stem))
    if sheets:
        lines.append(f"samples      {sheets[-1]}")
    quoted, sampled = shlex.quote(str(folder)), str(folder)
    if config.loss == "vlb_continuous" and not config.low_resolution:  # which does not train the variances of a chain
        sampled = f"{folder}-chain"
        options = ["--data", config.data, *(["--split", config.split] if config.split != "train" else [])]
        options += ["--out", sampled]
        lines.append(f"variances    {shlex.join(['ddpm-hf', 'optimize-chain', str(folder), *options])}")
    lines.append(f"sample       {shlex.join(['ddpm-hf', 'sample', sampled])}")
    if not config.low_resolution:  # there is no likelihood of an upsampler
        lines.append(f"evaluate     {shlex.join(['ddpm-hf', 'evaluate', sampled, *_evaluate_options(config)])}")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", run.absolute().name).strip("-.") or "model"
    return [*lines, f"publish      ddpm-hf push {quoted} --repo_id USER/{name}"]


def _evaluate_options(config):
    """The options of `evaluate` for the images that a run held out, or without such for those that it trained on.

    The test split of a data set that comes with the package needs none.
    """
    data, split = config.data, config.split
    if config.eval_every and not config.held_out:
        data, split = config.eval_data or data, config.eval_split
    elif data in BUILT_IN and not config.held_out:
        split = "test"
    options = [] if data in BUILT_IN and data == config.data else ["--data", data]
    options += [] if split == "test" else ["--split", split]
    return options + (["--ode"] if config.process != "ddpm" else [])


def measured_text(run: Path) -> str | None:
    """The last held-out bits/dim of a run's metrics.jsonl in words; None if there is none."""
    from ddpm_hf.training.saving import last_measurement

    row = last_measurement(run)
    if row is None:
        return None
    error = row.get("bits_per_dim_standard_error")
    spread = f" +- {error:.3f}" if error is not None else ""
    return f"bits/dim     {row['bits_per_dim']:.3f}{spread} of held-out images, after step {row['step']:,}"
