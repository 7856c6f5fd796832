"""What training/accelerate_internals.py relies on: each test names what has changed in another version of accelerate."""

import accelerate
import pytest
import torch
from accelerate import Accelerator

from ddpm_hf.training import accelerate_internals

CHANGED = f"accelerate {accelerate.__version__} has changed {{}}: see src/ddpm_hf/training/accelerate_internals.py"


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def loader():
    return torch.utils.data.DataLoader(torch.arange(10), 2)


def test_trackers():
    supported, installed = accelerate_internals.known_trackers(), accelerate_internals.installed_trackers()
    assert "wandb" in supported and set(installed) <= set(supported), CHANGED.format("LOGGER_TYPE_TO_CLASS")


def test_mixed_precision(accelerator):
    actual = accelerate_internals.has_mixed_precision(accelerator)
    assert isinstance(actual, bool) and actual == (accelerator.mixed_precision != "no"), CHANGED.format("native_amp")


def test_skipped_batches(accelerator, loader):
    prepared = accelerator.prepare(loader)
    prepared._non_blocking = True
    remaining = accelerate_internals.skip_batches(prepared, 2)
    assert [batch.tolist() for batch in remaining] == [[4, 5], [6, 7], [8, 9]], CHANGED.format("skip_first_batches")
    assert remaining._non_blocking is True, CHANGED.format("DataLoaderShard._non_blocking")


def test_a_loader_of_its_own_part(accelerator, loader):
    prepared = accelerate_internals.loader_of_own_part(loader, accelerator)
    prepared.set_epoch(3)
    assert [batch.tolist() for batch in prepared] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]], CHANGED.format(
        "prepare_data_loader"
    )


def test_a_loader_whose_iteration_failed(accelerator, loader):
    prepared = accelerator.prepare(loader)
    next(iter(prepared))
    active = accelerator.gradient_state.dataloader_references
    assert any(other is prepared for other in active), CHANGED.format("GradientState.dataloader_references")
    accelerate_internals.end_of_loading(prepared)
    active = accelerator.gradient_state.dataloader_references
    assert not any(other is prepared for other in active), CHANGED.format("DataLoaderShard.end")


def test_random_states_of_a_checkpoint(accelerator, tmp_path):
    accelerator.save_state(tmp_path)
    accelerate_internals.check_random_states(tmp_path, accelerator.process_index)
    (tmp_path / f"random_states_{accelerator.process_index}.pkl").write_bytes(b"")
    with pytest.raises(Exception, match=r".*"):  # of whatever class
        accelerate_internals.check_random_states(tmp_path, accelerator.process_index)
