"""The optimizer of a run and the schedule of its learning rates."""

from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import SchedulerType, get_scheduler

from ddpm_hf.arguments import shown
from ddpm_hf.training.config import ConfigError, RunConfig, nearest
from ddpm_hf.training.devices import channels_last
from ddpm_hf.training.task import Task


def check_schedule(config: RunConfig) -> None:
    """Raise ConfigError for an unknown schedule of the learning rate."""
    schedules = [name.value for name in SchedulerType if name.value != "piecewise_constant"]  # it needs rules
    if config.lr_schedule not in schedules:
        raise ConfigError(
            f"lr_schedule={shown(config.lr_schedule)} is not known{nearest(config.lr_schedule, schedules)}"
        )


def prepare(task: Task, accelerator: Accelerator) -> tuple[Any, Any, torch.optim.lr_scheduler.LambdaLR]:
    """Move a task's network and noise schedule to their device, and make AdamW and the schedule of its learning rates.

    Returns:
        Network and optimizer as the accelerator wraps them, and the schedule of the learning rates.
    """
    config, network, noise_schedule = task.config, task.network, task.noise_schedule
    groups: list[dict] = [{"params": list(network.parameters())}]
    if noise_schedule is not None:
        groups.append({"params": list(noise_schedule.to(accelerator.device).parameters()), "weight_decay": 0.0})
    for group, learning_rate in zip(groups, _learning_rates(config)):
        group["lr"] = learning_rate
    optimizer = torch.optim.AdamW(
        groups,
        betas=(config.adam_betas[0], config.adam_betas[1]),
        weight_decay=config.weight_decay,
        fused=True,
    )
    lr_schedule = get_scheduler(
        config.lr_schedule, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=config.steps
    )
    if channels_last(config, accelerator.device):
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return *accelerator.prepare(network, optimizer), lr_schedule


def set_learning_rates(config: RunConfig, optimizer, lr_schedule: torch.optim.lr_scheduler.LambdaLR) -> None:
    """Put the config's learning rates in place of those of the checkpoint that was loaded."""
    rates = _learning_rates(config)[: len(lr_schedule.base_lrs)]
    if lr_schedule.base_lrs == rates:
        return
    lr_schedule.base_lrs = rates
    factor = lr_schedule.lr_lambdas[0](lr_schedule.last_epoch)
    for group, rate in zip(optimizer.param_groups, rates):
        group |= {"initial_lr": rate, "lr": rate * factor}


def _learning_rates(config):
    """Learning rates of the network and of a learned noise schedule."""
    return [config.learning_rate, getattr(config, "noise_schedule_learning_rate", 0.0)]
