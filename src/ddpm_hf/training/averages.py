"""The exponential moving average of the weights, and evaluation with it."""

import contextlib
from collections.abc import Iterator

import torch
from diffusers.training_utils import EMAModel

from ddpm_hf.models.evaluation_mode import evaluation_mode


class Average(EMAModel):
    """diffusers' moving average; its weights stay on their device when a checkpoint is loaded."""

    def load_state_dict(self, state_dict: dict) -> None:
        device = self.shadow_params[0].device
        super().load_state_dict(state_dict)
        self.to(device)


@contextlib.contextmanager
def averaged(module: torch.nn.Module, average: Average) -> Iterator[None]:
    """Within the block the parameters of the module are the averaged ones."""
    parameters = list(module.parameters())
    average.store(parameters)
    average.copy_to(parameters)
    try:
        yield
    finally:
        average.restore(parameters)


@contextlib.contextmanager
def evaluating(network: torch.nn.Module, average: Average | None = None) -> Iterator[None]:
    """Within the block the network is in evaluation mode, with the averaged weights if there is an `average`.

    It is not compiled there: sheets and evaluations have shapes that are seldom seen twice.
    """
    with (
        averaged(network, average) if average else contextlib.nullcontext(),
        evaluation_mode(network),
        torch.compiler.set_stance("force_eager"),
    ):
        yield
