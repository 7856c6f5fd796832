"""Sets up the accelerator of a run: processes, device, precision and compiler.

Settings that accelerate would silently ignore raise an error here.
"""

import gc
import os

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin

from ddpm_hf.fast.allocator import keep_freed_memory
from ddpm_hf.fast.dropout import use_fast_dropout
from ddpm_hf.fast.winograd import use_winograd
from ddpm_hf.training.accelerate_internals import has_mixed_precision
from ddpm_hf.training.config import ConfigError, RunConfig
from ddpm_hf.training.messages import print_above_progress_bar


def open_accelerator(config: RunConfig) -> Accelerator:
    """Open the accelerator of a run with the settings of its launcher and its config.

    Raises:
        ConfigError: a setting that this machine or this training loop does not support.
    """
    processes = int(os.environ.get("WORLD_SIZE") or 1)
    _check_launcher(config, processes)
    try:
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # without it several processes on the CPU do not find each other
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
    if config.mixed_precision == "fp16" and not has_mixed_precision(accelerator):
        raise ConfigError(f"mixed_precision='fp16' is not for the {accelerator.device.type}; take bf16 or no")
    if processes != accelerator.num_processes:
        raise ConfigError(
            f"{processes} processes were started, accelerate found {accelerator.num_processes}; see the README"
        )
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    if processes > 1 or _is_launched_by_accelerate():
        _use_all_cores(accelerator)
    return accelerator


def _is_launched_by_accelerate():
    return bool(os.environ.get("ACCELERATE_MIXED_PRECISION"))


def _check_launcher(config, processes):
    """Raise ConfigError for settings of a launcher that cannot be followed, and print those that are overruled."""
    for kind in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true":
            raise ConfigError(
                f"accelerate's config asks for {kind}, which divides the network among processes; this loop's average "
                "and samples need it whole: take distributed_type MULTI_GPU, and where memory is short --gradient_checkpointing"
            )
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "") if processes == 1 else "all"
    devices = "" if devices.startswith("-") or devices == "NoDevFiles" else devices  # ways to ask for the CPU
    wants_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if _is_launched_by_accelerate() and devices and not wants_cpu and not torch.accelerator.is_available():
        raise ConfigError(
            f"accelerate's config asks for GPUs ({devices}), torch finds none; run `accelerate config` again, or on the CPU "
            "python training/train.py, or torchrun --nproc_per_node 2 training/train.py"
        )
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:  # so accelerate launch --cpu --num_processes 2
        print_above_progress_bar(
            f"{config.program}: several processes were asked for, one was started; on the CPU it is "
            "torchrun --nproc_per_node 2 training/train.py"
        )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower()
    if precision not in ("", "no", config.mixed_precision):
        print_above_progress_bar(
            f"{config.program}: mixed_precision={config.mixed_precision} decides, not accelerate's {precision}; "
            f"--mixed_precision {precision} to have that"
        )


def is_compiled(config: RunConfig) -> bool:
    """Whether the network is compiled: by the config, or by accelerate launch --dynamo_backend."""
    return config.compile or os.environ.get("ACCELERATE_DYNAMO_BACKEND", "").upper() not in ("", "NO")


def compile_network(network: torch.nn.Module, config: RunConfig, device: torch.device) -> None:
    """Compile a network in place, for one input shape. On the CPU it gets `FastDropout`, in float32 also Winograd's tiles."""
    if device.type == "cpu":
        use_fast_dropout(network)
        if config.mixed_precision == "no":
            use_winograd(network, min_channels=128)
    network.compile(dynamic=False)


def channels_last(config: RunConfig, device: torch.device) -> bool:
    """Whether weights and activations are in channels-last layout; "auto": if that is faster (benchmarks/training_step.py)."""
    if config.channels_last != "auto":
        return config.channels_last == "true"
    return is_compiled(config) if device.type == "cpu" else config.mixed_precision != "no"


def _use_all_cores(accelerator):
    """On the CPU, give each process its share of the cores: launchers set one thread by default."""
    if accelerator.device.type == "cpu" and torch.get_num_threads() == 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // accelerator.num_processes))


def leave() -> None:
    """End the group of processes. Call it when nothing refers to the network any more.

    If DDP held the last reference to gloo's group, torch 2.13 would wait for gloo's threads, which may be waiting for it.
    """
    gc.collect()
    PartialState().destroy_process_group()
