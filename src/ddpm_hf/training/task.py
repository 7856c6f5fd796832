"""The interface between the training loop and the model that it trains."""

import abc
import dataclasses
from typing import Any, ClassVar

import torch
from accelerate import Accelerator

from ddpm_hf.training.config import RunConfig
from ddpm_hf.training.finite_steps import FiniteSteps
from ddpm_hf.training.inputs import TrainingImages
from ddpm_hf.training.interrupts import Interrupts
from ddpm_hf.training.log import Log
from ddpm_hf.training.noise_schedule import LearnedNoiseSchedule


@dataclasses.dataclass
class BatchLoss:
    """The losses of a batch of images x_start (B, C, H, W); the other tensors are (B,)."""

    x_start: torch.Tensor
    t: torch.Tensor
    losses: torch.Tensor
    weights: torch.Tensor
    log_columns: tuple[torch.Tensor, ...] = ()


class Task(abc.ABC):
    """A network, its process and its loss. `loop.train` calls the methods in this order."""

    LOG_COLUMNS: ClassVar[tuple[str, ...]] = ()
    """Names of the values that are logged per image beside the loss."""
    config: RunConfig
    network: torch.nn.Module
    noise_schedule: LearnedNoiseSchedule | None = None
    """Learned betas, trained beside the network."""
    t_end: float
    """An upper bound of t."""

    @abc.abstractmethod
    def __init__(self, config: RunConfig):
        """Build network and process from a resolved config.

        Raises:
            ValueError: a key or value is not supported.
        """

    @abc.abstractmethod
    def open_inputs(self, data: TrainingImages, accelerator: Accelerator, is_new: bool) -> TrainingImages:
        """Open the inputs beside the training set; return the data with the class names to save.

        Args:
            is_new: False if the run is resumed.

        Raises:
            ConfigError: something cannot be opened or does not fit the data.
        """

    @abc.abstractmethod
    def begin(self, accelerator: Accelerator, dataset, log: Log, interrupts: Interrupts) -> dict[str, Any]:
        """Prepare for the first step; the network is on its device.

        Returns:
            Objects with `state_dict` and `load_state_dict`, the same in every process, for the checkpoints.
        """

    @abc.abstractmethod
    def loss(self, network: torch.nn.Module, batch: dict[str, torch.Tensor]) -> BatchLoss:
        """Compute the losses of a batch. `network` is `self.network`, perhaps wrapped for several processes."""

    def after_step(self) -> dict[str, float]:
        """Update state after an optimizer step, such as the average; return values for the log."""
        return {}

    @abc.abstractmethod
    def measure(self, step: int) -> float | None:
        """Draw the sheet and take the held-out measurements that are due after a step.

        Returns:
            The number by which the best checkpoint is chosen, lower is better; None if nothing was due.

        Raises:
            Interrupted: in all processes, if a signal came meanwhile.
        """

    def time_sample_metrics(self, accelerator: Accelerator) -> tuple[float, float]:
        """Time parts of the measurements of `eval_metrics`; the network is on its device.

        Returns:
            Seconds for each sample, shared out among the processes, and for the rest of a measurement.
        """
        return 0.0, 0.0

    def save_at_checkpoint(self, step: int, interrupted: bool) -> None:  # noqa: B027
        """Save a usable model during the run. Called in the main process."""

    @abc.abstractmethod
    def save(self, step: int) -> None:
        """Save the trained network as <output_dir>/<config.RESULT>. Called in the main process."""

    @abc.abstractmethod
    def saved_as(self) -> str:
        """Return the folders that `save` wrote, for a message."""

    def publish(self) -> str | None:
        """Publish the saved model; return its address, or None."""
        return None

    def how_to_publish(self) -> str:
        """Return text for the end of an interrupted run's message: how to publish what is saved."""
        return ""


def train_on_batch(
    task: Task, network: torch.nn.Module, optimizer, accelerator: Accelerator, batch: dict, finite: FiniteSteps
) -> tuple[BatchLoss, torch.Tensor | None]:
    """Add the gradient of a batch; where the accumulation of gradients ends, make an optimizer step.

    Args:
        network, optimizer: as prepared by the accelerator.
        batch: "pixels" (B, C, H, W) uint8, and what else the task reads.

    Returns:
        The losses, and the norm of the gradient before clipping, a scalar; None without an optimizer step.
    """
    norm = None
    with accelerator.accumulate(network):
        loss = task.loss(network, batch)
        accelerator.backward((loss.weights * loss.losses).mean())
        if accelerator.sync_gradients:
            schedule_parameters = [] if task.noise_schedule is None else [*task.noise_schedule.parameters()]
            # those of the network are averaged over the processes already; before a gradient scaler's factor is removed
            for parameter in schedule_parameters:
                parameter.grad = accelerator.reduce(parameter.grad, "mean")
            norm = accelerator.clip_grad_norm_(network.parameters(), task.config.max_grad_norm)
            # not clipped with the network's: rare large gradients, as those of the decoder, must count in full
            norms = torch.stack([norm, *(parameter.grad.norm().to(norm) for parameter in schedule_parameters)])
            finite.check(norms.sum(), optimizer.optimizer, scaled=accelerator.scaler is not None)
        optimizer.step()
        optimizer.zero_grad()
    return loss, norm
