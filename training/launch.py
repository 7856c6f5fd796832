"""The processes, device, precision and compiler of a run: accelerate's, and what it would pass over in silence, told."""

import gc
import os

import torch
import torch._functorch.config
from accelerate import Accelerator, PartialState
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin
from dropout import FastDropout
from stops import tell

from config import ConfigError, TrainConfig
from ddpm_hf.memory import keep_freed_memory
from ddpm_hf.winograd import by_tiles


def open_accelerator(config: TrainConfig) -> Accelerator:
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
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=config.seed),
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


def leave() -> None:
    """Ends the group of processes, once nothing refers to the network any more.

    Where DDP is the last to let go of gloo's group, torch 2.13 waits for gloo's threads, and these may be waiting for it.
    """
    gc.collect()
    PartialState().destroy_process_group()


def compiled(config: TrainConfig) -> bool:
    """Whether the network is compiled: by the config, or by accelerate launch --dynamo_backend."""
    return config.compile or os.environ.get("ACCELERATE_DYNAMO_BACKEND", "").upper() not in ("", "NO")


def compile_network(network: torch.nn.Module, config: TrainConfig, device: torch.device) -> None:
    """Compiles a network in place, for one shape; on the CPU with a dropout of its own, in float32 with Winograd's tiles."""
    if device.type == "cpu":
        for module in network.modules():
            if isinstance(module, torch.nn.Dropout):
                module.__class__ = FastDropout
        if config.mixed_precision == "no":
            by_tiles(network, 128)
        # for the process: what is cheap to make again is not kept; as fast, in a sixth less memory
        torch._functorch.config.activation_memory_budget = 0.7
    network.compile(dynamic=False)


def channels_last(config: TrainConfig, device: torch.device) -> bool:
    """Whether weights and activations are in this layout; "auto": where it is the faster one (benchmarks/training_step.py)."""
    if config.channels_last != "auto":
        return config.channels_last == "true"
    return compiled(config) if device.type == "cpu" else config.mixed_precision != "no"


def _use_all_cores(accelerator):
    """On the CPU, gives each process its share of the cores: launchers set one thread where nothing is said."""
    if accelerator.device.type == "cpu" and torch.get_num_threads() == 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // accelerator.num_processes))
