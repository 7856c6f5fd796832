"""How many steps fit into `minutes`, from the measured rate of the real network on this machine."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ddpm_hf.training.config import RunConfig, image_size, keys_of
from ddpm_hf.training.devices import compile_network, is_compiled
from ddpm_hf.training.finite_steps import FiniteSteps
from ddpm_hf.training.inputs import count_held_out
from ddpm_hf.training.messages import print_above_progress_bar
from ddpm_hf.training.optimizer import prepare
from ddpm_hf.training.resume import PLANNED, with_plan_of_run
from ddpm_hf.training.task import Task, train_on_batch

TIMED_STEPS = 10
TIMED_SECONDS = 5.0
MEASURING_SHARE = 0.15  # of the time, for sheets of samples and held-out measurements
MOST_MEASUREMENTS = 10
FEW_STEPS = 1000
FEWEST_EVAL_SAMPLES = 256
SMALLEST_EMA_DECAY, LARGEST_EMA_DECAY = 0.9, 0.9999


@dataclasses.dataclass(frozen=True)
class Rate:
    """Seconds that a run's work takes on this machine."""

    step: float
    """One optimizer step."""
    evaluation: float
    """The network's output for one image."""
    sample: float = 0.0
    """One sample of `eval_metrics` and its features, shared out among the processes."""
    comparison: float = 0.0
    """The rest of a measurement of `eval_metrics`."""


def with_plan(config: RunConfig, accelerator: Accelerator, make_task: Callable[[RunConfig], Task]) -> RunConfig:
    """Return the config with the steps that fit into its `minutes`, the same in all processes, and print the plan.

    A config without `minutes`, or with the plan of the run that it resumes, is returned as it is.
    """
    config = with_plan_of_run(config)
    if config.minutes is None or config.planned:
        return config
    began, given = time.perf_counter(), config
    if config.eval_every and (held_out := count_held_out(config)):
        config = _with_explicit(config, eval_images=min(config.eval_images, held_out))
    rate = measure_rate(config, accelerator, make_task)
    (spent,) = gather_object([time.perf_counter() - began])[:1]
    planned = plan(config, rate, 60 * config.minutes - spent)
    if accelerator.is_main_process:
        print_above_progress_bar(f"{config.program}: {describe(planned, rate, before=given)}")
    return planned


def plan(config: RunConfig, rate: Rate, seconds: float) -> RunConfig:
    """Return the config with the steps that fit into the seconds, and the values that depend on their number.

    Explicit keys stay. Otherwise the learning rate falls along a cosine after a warm-up of 5 % of the steps, the average of
    the weights spans the last tenth of them, and sheets, measurements and checkpoints are spread evenly over the run, with
    one of each at its end. They get `MEASURING_SHARE` of the time, with fewer images if that is short. A sheet has as many
    samples of each class, and `eval_metrics` draw at least `FEWEST_EVAL_SAMPLES`.
    """
    config = _with_explicit(config, sample_raw=0)
    available = MEASURING_SHARE * seconds
    share = available / max(_seconds_of_measurement(config, rate), 1e-9)
    if share < 1:
        least = {"sample_count": 4, "eval_images": 4, "eval_samples": FEWEST_EVAL_SAMPLES}
        images = {key: getattr(config, key) for key in least if hasattr(config, key)}
        if not getattr(config, "eval_metrics", None):
            images.pop("eval_samples", None)
        config = _with_explicit(
            config, **{key: min(count, max(least[key], int(share * count))) for key, count in images.items()}
        )
    if config.label_column and config.classes and config.classes <= getattr(config, "sample_count", 0):
        config = _with_explicit(config, sample_count=config.sample_count // config.classes * config.classes)
    measurement = _seconds_of_measurement(config, rate)
    count = min(MOST_MEASUREMENTS, max(1, int(share)))
    steps = max(1, int((seconds - count * measurement) / rate.step))
    every = max(1, steps // count)
    steps -= steps % every
    return _with_explicit(
        dataclasses.replace(config, planned=True),
        steps=steps,
        lr_schedule="cosine",
        lr_warmup_steps=min(steps // 20, 1000),
        ema_decay=min(max(1 - 10 / steps, SMALLEST_EMA_DECAY), LARGEST_EMA_DECAY),
        checkpoint_every=every,
        sample_every=every,
        eval_every=every if config.eval_every else 0,
    )


def _with_explicit(config, **values):
    """Return the config with these values, except explicit or unknown keys."""
    keys = {field.name for field in keys_of(config)} - config.explicit
    return dataclasses.replace(config, **{key: value for key, value in values.items() if key in keys})


def describe(config: RunConfig, rate: Rate, before: RunConfig) -> str:
    """The plan in words, for the user: the steps, and every other value that differs from the config `before`."""
    steps = f"{config.steps:,} step{'s' if config.steps > 1 else ''}"
    time = "1 minute is" if config.minutes == 1 else f"{config.minutes:g} minutes are"
    lines = [f"{time} enough for {steps} of {rate.step:.3g} s"]
    keys = [field.name for field in keys_of(config) if field.name in PLANNED - {"steps"}]
    values = {key: getattr(config, key) for key in keys if getattr(config, key) != getattr(before, key)}
    if values:
        texts = (
            f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in values.items()
        )
        lines.append(f"  planned with them: {', '.join(texts)}")
    if config.steps < FEW_STEPS:
        channels = config.network.get("block_out_channels")
        halved = (
            f" (--{config.NETWORK}.block_out_channels {','.join(str(c // 2) for c in channels)})" if channels else ""
        )
        lines.append(
            f"  {steps} {'are' if config.steps > 1 else 'is'} few: more --minutes, a smaller --image_size, "
            f"a smaller network{halved} or --mixed_precision bf16 would allow more"
        )
    return "\n".join(lines)


def measure_rate(config: RunConfig, accelerator: Accelerator, make_task: Callable[[RunConfig], Task]) -> Rate:
    """Time a few steps of the run's network, optimizer and loss on random images, evaluations of the network, `eval_metrics`.

    The slowest process counts. Their state is discarded: the run builds a new network from its own seed.
    """
    task = make_task(config)
    network, optimizer, _ = prepare(task, accelerator)
    if is_compiled(config):
        compile_network(task.network, config, accelerator.device)
    batch = _random_batch(config, accelerator.device)
    finite = FiniteSteps(accelerator.device, config.max_steps_skipped)

    def step():
        for _ in range(config.gradient_accumulation_steps):
            loss, _ = train_on_batch(task, network, optimizer, accelerator, batch, finite)
        loss.losses.sum().item()  # waits for the device

    steps = [_seconds(step)]  # which warms up
    while len(steps) < 2 or (len(steps) <= TIMED_STEPS and sum(steps[1:]) < TIMED_SECONDS):
        steps.append(_seconds(step))
    seconds = statistics.median(steps[1:])
    # the backward pass costs two forward passes
    evaluation = seconds / (3 * config.gradient_accumulation_steps * config.batch_size)
    rates = gather_object([(seconds, evaluation, *task.time_sample_metrics(accelerator))])
    accelerator.free_memory(network, optimizer)
    return Rate(*map(max, zip(*rates)))


def _random_batch(config, device):
    shape = (config.batch_size, config.channels, *image_size(config))
    levels = config.scheduler.get("levels", 256)
    batch = {"pixels": torch.randint(min(levels, 256), shape, dtype=torch.uint8, device=device)}
    if config.label_column is not None:
        batch["class_labels"] = torch.randint(config.classes, (config.batch_size,), device=device)
    return batch


def _seconds(function):
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def _seconds_of_measurement(config, rate):
    """Return the seconds of one sheet and one measurement of held-out images and samples."""
    return sum(_evaluations(config)) * rate.evaluation + _seconds_of_samples(config, rate)


def _evaluations(config):
    """Return the network evaluations of one sheet and of one measurement of held-out images."""
    steps = getattr(config, "sample_steps", None) or config.scheduler.get("num_train_timesteps", 1000)
    sheets = getattr(config, "sample_count", 0) * steps * (1 + bool(getattr(config, "sample_raw", 0)))
    held_out = config.eval_images * getattr(config, "eval_evaluations", 8) if config.eval_every else 0
    return sheets, held_out


def _seconds_of_samples(config, rate):
    """Return the seconds of one measurement of `eval_metrics`."""
    return config.eval_samples * rate.sample + rate.comparison if getattr(config, "eval_metrics", None) else 0.0


def cost_of_sample_metrics(config: RunConfig, rate: Rate) -> str:
    """What `eval_metrics` cost, in words: seconds, and the share of the run's time."""
    (sheet, held_out), samples = _evaluations(config), _seconds_of_samples(config, rate)
    sheets = config.steps // config.sample_every if config.sample_every else 0
    count = math.ceil(config.steps / config.eval_every)
    total = config.steps * rate.step + (sheets * sheet + count * held_out) * rate.evaluation + count * samples
    times = f"{count} measurements are" if count > 1 else "1 measurement is"
    return (
        f"# fd takes about {samples:.3g} s ({config.eval_samples:,} samples {samples - rate.comparison:.3g} s, comparison "
        f"{rate.comparison:.3g} s); {times} {count * samples / total:.0%} of the run's {_in_words(total)}"
    )


def _in_words(seconds):
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
