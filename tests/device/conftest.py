"""Tests on the accelerator that torch finds: a real one, or the one that `make test-device` simulates. Else they are skipped.

Each compares with the same computation on the CPU: with given noise or a generator of the CPU, for each device draws numbers of
its own.
"""

import pytest
import torch
from accelerate.state import AcceleratorState

from support.networks import small_unet


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name == "device":
            item.add_marker(pytest.mark.device)


@pytest.fixture(scope="session")
def device():
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        pytest.skip("torch finds no accelerator; `make test-device` simulates one")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # products as exact as the CPU's
    return torch.device(accelerator.type)


@pytest.fixture
def generator():
    """A function seed -> generator of the CPU."""
    return lambda seed=0: torch.Generator().manual_seed(seed)


@pytest.fixture
def unet():
    """A function that makes a network of 8x8 images that is not the zero function."""
    return small_unet


@pytest.fixture
def fresh_accelerate():
    """A function that has accelerate forget the device and the precision of the run before."""

    def reset():
        AcceleratorState._reset_state(reset_partial_state=True)

    yield reset
    reset()
