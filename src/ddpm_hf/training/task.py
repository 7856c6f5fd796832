"""What the training loop needs of what it trains."""

import abc
import dataclasses
from typing import Any, ClassVar

import torch
from accelerate import Accelerator

from ddpm_hf.training.config import RunConfig
from ddpm_hf.training.inputs import TrainingImages
from ddpm_hf.training.interrupts import Interrupts
from ddpm_hf.training.log import Log


@dataclasses.dataclass
class BatchLoss:
    """The losses of a batch of images x_start (B, C, H, W); the other tensors are (B,)."""

    x_start: torch.Tensor
    t: torch.Tensor
    losses: torch.Tensor
    weights: torch.Tensor
    log_columns: tuple[torch.Tensor, ...] = ()


class Task(abc.ABC):
    """A network, its process and its loss. `loop.train` calls the methods in the order in which they are written here."""

    LOG_COLUMNS: ClassVar[tuple[str, ...]] = ()
    """Names of what is logged of each image beside its loss."""
    network: torch.nn.Module
    t_end: float
    """All t are below it."""

    @abc.abstractmethod
    def __init__(self, config: RunConfig):
        """Build network and process from a resolved config.

        Raises:
            ValueError: a key or value that one of them does not take.
        """

    @abc.abstractmethod
    def open_inputs(self, data: TrainingImages, accelerator: Accelerator, is_new: bool) -> TrainingImages:
        """Open what the run reads beside its training set; return the data, with the names of classes that it is saved with.

        Args:
            is_new: whether the run starts, and is not resumed.

        Raises:
            ConfigError: something cannot be opened or does not fit the data.
        """

    @abc.abstractmethod
    def begin(self, accelerator: Accelerator, dataset, log: Log, interrupts: Interrupts) -> dict[str, Any]:
        """Get ready for the first step, with the network on its device.

        Returns:
            Objects with `state_dict` and `load_state_dict`, the same in every process, for the checkpoints.
        """

    @abc.abstractmethod
    def loss(self, network: torch.nn.Module, batch: dict[str, torch.Tensor]) -> BatchLoss:
        """The losses of a batch. `network` is the task's own, perhaps wrapped for several processes."""

    def after_step(self) -> dict[str, float]:
        """Follow an optimizer step; return values for the log."""
        return {}

    @abc.abstractmethod
    def measure(self, step: int) -> float | None:
        """Draw the sheet and take the held-out measurements that are due after a step.

        Returns:
            The number by which the best checkpoint is chosen, the smaller the better; None where nothing was due.

        Raises:
            Interrupted: a signal came meanwhile. In all processes.
        """

    def save_at_checkpoint(self, step: int, interrupted: bool) -> None:  # noqa: B027
        """Save what can be used before the run ends. Called in the main process."""

    @abc.abstractmethod
    def save(self, step: int) -> None:
        """Save the trained network as <output_dir>/<config.RESULT>. Called in the main process."""

    @abc.abstractmethod
    def saved_as(self) -> str:
        """The folders that `save` wrote, for a message."""

    def publish(self) -> str | None:
        """Publish what was saved; return its address, or None."""
        return None

    def how_to_publish(self) -> str:
        """The end of the message of an interrupted run."""
        return ""
