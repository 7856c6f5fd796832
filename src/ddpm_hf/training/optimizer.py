"""The optimizer of a run and the schedule of its learning rate."""

from collections.abc import Iterable

import torch
from diffusers.optimization import SchedulerType, get_scheduler

from ddpm_hf.arguments import shown
from ddpm_hf.training.config import ConfigError, RunConfig, nearest


def check_schedule(config: RunConfig) -> None:
    """Raise ConfigError for an unknown schedule of the learning rate."""
    schedules = [name.value for name in SchedulerType if name.value != "piecewise_constant"]  # it needs rules
    if config.lr_schedule not in schedules:
        raise ConfigError(
            f"lr_schedule={shown(config.lr_schedule)} is not known{nearest(config.lr_schedule, schedules)}"
        )


def make_optimizer(
    config: RunConfig, parameters: Iterable[torch.nn.Parameter]
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW and the schedule of its learning rate."""
    optimizer = torch.optim.AdamW(
        parameters,
        config.learning_rate,
        betas=(config.adam_betas[0], config.adam_betas[1]),
        weight_decay=config.weight_decay,
        fused=True,
    )
    lr_schedule = get_scheduler(
        config.lr_schedule, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=config.steps
    )
    return optimizer, lr_schedule


def set_learning_rate(config: RunConfig, optimizer, lr_schedule: torch.optim.lr_scheduler.LambdaLR) -> None:
    """Put the config's learning rate in place of the one of the checkpoint that was loaded."""
    if lr_schedule.base_lrs == [config.learning_rate]:
        return
    lr_schedule.base_lrs = [config.learning_rate]
    learning_rate = config.learning_rate * lr_schedule.lr_lambdas[0](lr_schedule.last_epoch)
    for group in optimizer.param_groups:
        group |= {"initial_lr": config.learning_rate, "lr": learning_rate}
