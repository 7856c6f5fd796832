"""Training as a command: the config is checked before anything is computed, and errors are one line."""

import multiprocessing
import signal
import sys
from collections.abc import Callable

import torch
from accelerate import PartialState
from safetensors import SafetensorError

from ddpm_hf.errors import UserError
from ddpm_hf.training.config import RunConfig, TrainConfig, as_yaml
from ddpm_hf.training.devices import leave, open_accelerator
from ddpm_hf.training.header import print_header
from ddpm_hf.training.interrupts import Stopped, find_dead_workers_when_reading
from ddpm_hf.training.loop import TASKS, train
from ddpm_hf.training.plan import cost_of_sample_metrics, measure_rate, with_plan
from ddpm_hf.training.rank import is_main_process
from ddpm_hf.training.resolve import resolve, show_settings_of_run


def main(config: RunConfig, dry_run: bool, train: Callable[[RunConfig], object] = train) -> None:
    """Check a config with the network that it describes; print it in a dry run, else train and end the process."""
    try:
        config = resolve(config)
        with torch.device("meta"):  # no weights yet, but every check
            task = TASKS[type(config)](config)
    except (UserError, ValueError, TypeError) as error:
        sys.exit(f"{config.program}: {' '.join(str(error).split())}")
    if dry_run:
        if config.facts:
            print_header(config, task.network.num_parameters())
        show_settings_of_run(config)
        _show_dry_run(config, task)
    else:
        run(train, config)


def _show_dry_run(config, task):
    """Print the config and its cost; what has to be timed for that is timed."""
    make_task, cost = TASKS[type(config)], ""
    try:
        if config.minutes is not None or getattr(config, "eval_metrics", None):
            accelerator = open_accelerator(config)
            config = with_plan(config, accelerator, make_task)
            if getattr(config, "eval_metrics", None):
                cost = f"\n{cost_of_sample_metrics(config, measure_rate(config, accelerator, make_task))}"
    except UserError as error:
        sys.exit(f"{config.program}: {' '.join(str(error).split())}")
    if is_main_process():
        print(as_yaml(config), end="")
        print(_size_of_run(config, task) + cost)


def _size_of_run(config, task):
    parameters, images = task.network.num_parameters(), config.batch_size * config.gradient_accumulation_steps
    lines = [f"# {parameters:,} parameters, {config.steps:,} steps of {images:,} images a process"]
    if isinstance(config, TrainConfig):  # float32: weights, gradient, two moments of Adam, average
        gigabytes = 5 * 4 * parameters / 2**30
        lines.append(f"# {gigabytes:.2f} GiB for weights, gradient, optimizer and average; activations on top")
    return "\n".join(lines)


def run(train: Callable[[RunConfig], object], config: RunConfig) -> None:
    """Train and end the process, and those that read images for it; an error is printed in one line."""
    status, program = 0, config.program
    try:
        train(config)
    except Stopped as error:  # in all processes
        PartialState().wait_for_everyone()
        if PartialState().is_main_process:
            print(f"{program}: {error}", file=sys.stderr)
        status = error.status
    except (UserError, OSError, SafetensorError) as error:  # safetensors has its own for a full disk
        sys.exit(f"{program}: {' '.join(str(error).split())}")
    except KeyboardInterrupt:  # before the first step, or the second one
        print(f"{program}: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    finally:
        find_dead_workers_when_reading()
        for reader in multiprocessing.active_children():  # one may wait for a network, and ignore signals
            reader.kill()
    leave()
    sys.exit(status)
