"""What every run is set up with: processes, device, precision and compiler, told where accelerate would pass over something in
silence; the process, the optimizer, the folder, and the end.
"""

import contextlib
import dataclasses
import gc
import inspect
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin
from diffusers.optimization import SchedulerType, get_scheduler
from safetensors import SafetensorError

from ddpm_hf.arguments import shown
from ddpm_hf.fast.allocator import keep_freed_memory
from ddpm_hf.fast.dropout import use_fast_dropout
from ddpm_hf.fast.winograd import use_winograd
from ddpm_hf.hub.errors import HubError
from ddpm_hf.schedulers.ddpm import VARIANCE_TYPES, VariationalDDPMScheduler
from ddpm_hf.schedulers.sde_samplers import SDEScheduler, SubVPSDEScheduler, VESDEScheduler, VPSDEScheduler
from ddpm_hf.training.config import ConfigError, RunConfig, nearest
from ddpm_hf.training.interrupts import Stopped, find_dead_workers_when_reading, tell

# what each of accelerate's trackers calls a run's name; to the others the folder or the project is one
RUN_NAMES = {
    "wandb": "name",
    "trackio": "name",
    "mlflow": "run_name",
    "clearml": "task_name",
    "swanlab": "experiment_name",
}


PROCESSES = {"ddpm": VariationalDDPMScheduler, "vp": VPSDEScheduler, "subvp": SubVPSDEScheduler, "ve": VESDEScheduler}


def open_accelerator(config: RunConfig) -> Accelerator:
    """The accelerator of a run, as its launcher and its config ask for it.

    Raises:
        ConfigError: a launcher's settings that this machine or this loop cannot follow.
    """
    asked = {name: os.environ.get(f"ACCELERATE_{name}", "").lower() for name in ("USE_CPU", "MIXED_PRECISION")}
    started = int(os.environ.get("WORLD_SIZE") or 1)
    there = torch.accelerator.is_available()
    for kind in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true":
            raise ConfigError(
                f"accelerate's config asks for {kind}, which divides the network among processes; this loop's average "
                "and samples need it whole: take distributed_type MULTI_GPU, and where memory is short --gradient_checkpointing"
            )
    by_accelerate = bool(asked["MIXED_PRECISION"])
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "") if started == 1 else "all"
    named = "" if named.startswith("-") or named == "NoDevFiles" else named  # ways to ask for the CPU
    if by_accelerate and asked["USE_CPU"] != "true" and not there and (named or started > 1):
        raise ConfigError(
            f"accelerate's config asks for GPUs ({named}), torch finds none; run `accelerate config` anew, or on the CPU "
            "python training/train.py, or torchrun --nproc_per_node 2 training/train.py"
        )
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:  # so accelerate launch --cpu --num_processes 2
        tell(
            "train.py: several processes were asked for, one was started; on the CPU it is "
            "torchrun --nproc_per_node 2 training/train.py"
        )
    if asked["MIXED_PRECISION"] not in ("", "no", config.mixed_precision):
        tell(
            f"train.py: mixed_precision={config.mixed_precision} decides, not accelerate's {asked['MIXED_PRECISION']}; "
            f"--mixed_precision {asked['MIXED_PRECISION']} to have that"
        )
    try:
        accelerator = Accelerator(
            cpu=not there,  # where this is not said, several processes on the CPU do not find each other
            # a step is of so many batches, also where an epoch ends between them
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                config.gradient_accumulation_steps, sync_with_dataloader=False
            ),
            mixed_precision=config.mixed_precision,
            dynamo_backend="no",  # the network is compiled in place: names of weights stay as they are
            log_with=config.trackers or None,
            project_dir=config.output_dir,
            dataloader_config=DataLoaderConfiguration(
                use_seedable_sampler=True,
                data_seed=config.seed,
                # from pinned memory. On Apple's GPUs such a copy can read memory that is no longer there (pytorch#189690)
                non_blocking=torch.cuda.is_available(),
            ),
        )
    except ValueError as error:
        raise ConfigError(f"mixed_precision={config.mixed_precision!r}: {' '.join(str(error).split())}") from error
    if config.mixed_precision == "fp16" and not accelerator.native_amp:  # accelerate says nothing, and does nothing
        raise ConfigError(f"mixed_precision='fp16' is not for the {accelerator.device.type}; take bf16 or no")
    if started != accelerator.num_processes:
        raise ConfigError(
            f"{started} processes were started, accelerate found {accelerator.num_processes}; see the README"
        )
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    if by_accelerate or started > 1:
        _use_all_cores(accelerator)
    return accelerator


def check_keys(config: RunConfig, part: str, cls: type) -> None:
    """Gives the keys of a section of the config the types that its class takes.

    Raises:
        ValueError: a key or a value that the class does not take.
    """
    known = inspect.signature(cls).parameters
    for key in getattr(config, part):
        if key not in known:
            raise ConfigError(f"unknown key {shown(f'{part}.{key}')}{nearest(key, known)}")
    setattr(config, part, cls.__init__.check(getattr(config, part), f"{part}."))


def open_scheduler(config: RunConfig) -> VariationalDDPMScheduler | SDEScheduler:
    """The process of a run.

    Raises:
        ValueError: a key or value that it does not take.
    """
    kind = PROCESSES[getattr(config, "process", "ddpm")]
    check_keys(config, "scheduler", kind)
    variance_type = config.scheduler.get("variance_type", "fixed_small")
    if variance_type not in VARIANCE_TYPES:  # the scheduler itself only warns, as diffusers' does
        raise ConfigError(
            f"scheduler.variance_type={shown(variance_type)} is not known{nearest(variance_type, VARIANCE_TYPES)}"
        )
    return kind(**config.scheduler)


def check_schedule(config: RunConfig) -> None:
    """Raises ConfigError for a learning rate's schedule that is not known."""
    schedules = [name.value for name in SchedulerType if name.value != "piecewise_constant"]  # it needs rules
    if config.lr_schedule not in schedules:
        raise ConfigError(
            f"lr_schedule={shown(config.lr_schedule)} is not known{nearest(config.lr_schedule, schedules)}"
        )


@contextlib.contextmanager
def opening(where: str):
    """A saved pipeline that cannot be opened or does not fit, as ConfigError that begins with `where`."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{where}: {' '.join(str(error).split())}") from error


def make_optimizer(config: RunConfig, parameters) -> tuple:
    """The optimizer of a run, and the schedule of its learning rate."""
    optimizer = torch.optim.AdamW(
        parameters,
        config.learning_rate,
        betas=tuple(config.adam_betas),
        weight_decay=config.weight_decay,
        fused=True,
    )
    lr_schedule = get_scheduler(
        config.lr_schedule, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=config.steps
    )
    return optimizer, lr_schedule


def set_learning_rate(config: RunConfig, optimizer, lr_schedule) -> None:
    """The config's learning rate in place of that of the checkpoint that was loaded, where another was asked for."""
    if lr_schedule.base_lrs == [config.learning_rate]:
        return
    lr_schedule.base_lrs = [config.learning_rate]
    rate = config.learning_rate * lr_schedule.lr_lambdas[0](lr_schedule.last_epoch)
    lr_schedule._last_lr = [rate]
    for group in optimizer.param_groups:
        group |= {"initial_lr": config.learning_rate, "lr": rate}


def open_trackers(config: RunConfig, accelerator: Accelerator) -> None:
    """Starts accelerate's trackers with the run's project, name and config."""
    name = config.tracker_run or Path(config.output_dir).absolute().name
    names = {tracker: {key: name} for tracker, key in RUN_NAMES.items()}
    values = {key: str(value) for key, value in dataclasses.asdict(config).items()}
    accelerator.init_trackers(config.tracker_project, values, names)


def run(program: str, train: Callable[[RunConfig], object], config: RunConfig) -> None:
    """Trains and ends the process, and those that read images for it. What went wrong is printed in one line."""
    status = 0
    try:
        train(config)
    except Stopped as error:  # in all processes
        PartialState().wait_for_everyone()
        if PartialState().is_main_process:
            print(f"{program}: {error}", file=sys.stderr)
        status = error.status
    except (ConfigError, OSError, SafetensorError, HubError) as error:  # safetensors has its own for a full disk
        sys.exit(f"{program}: {' '.join(str(error).split())}")
    except KeyboardInterrupt:  # before the first step, or the second of them
        print(f"{program}: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    finally:
        find_dead_workers_when_reading()
        for reader in multiprocessing.active_children():  # one may wait for a network, and ignores what ends others
            reader.kill()
    leave()
    sys.exit(status)


def leave() -> None:
    """Ends the group of processes, once nothing refers to the network any more.

    Where DDP is the last to let go of gloo's group, torch 2.13 waits for gloo's threads, and these may be waiting for it.
    """
    gc.collect()
    PartialState().destroy_process_group()


def compiled(config: RunConfig) -> bool:
    """Whether the network is compiled: by the config, or by accelerate launch --dynamo_backend."""
    return config.compile or os.environ.get("ACCELERATE_DYNAMO_BACKEND", "").upper() not in ("", "NO")


def compile_network(network: torch.nn.Module, config: RunConfig, device: torch.device) -> None:
    """Compiles a network in place, for one shape; on the CPU with a dropout of its own, in float32 with Winograd's tiles."""
    if device.type == "cpu":
        use_fast_dropout(network)
        if config.mixed_precision == "no":
            use_winograd(network, min_channels=128)
    network.compile(dynamic=False)


def channels_last(config: RunConfig, device: torch.device) -> bool:
    """Whether weights and activations are in this layout; "auto": where it is the faster one (benchmarks/training_step.py)."""
    if config.channels_last != "auto":
        return config.channels_last == "true"
    return compiled(config) if device.type == "cpu" else config.mixed_precision != "no"


def _use_all_cores(accelerator):
    """On the CPU, gives each process its share of the cores: launchers set one thread where nothing is said."""
    if accelerator.device.type == "cpu" and torch.get_num_threads() == 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // accelerator.num_processes))
