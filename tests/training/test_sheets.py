"""What a run shows of its samples."""

import json
import sys
import types

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from ddpm_hf import DiffusionObjective, VariationalDDPMScheduler
from ddpm_hf.data.dataset import PixelTensors
from ddpm_hf.evaluation.sheets import as_images, as_sheet, channel_statistics
from ddpm_hf.training.config import TrainConfig
from ddpm_hf.training.interrupts import Interrupts
from ddpm_hf.training.log import Log
from ddpm_hf.training.measurements import held_out_loss
from ddpm_hf.training.output import OutputFolder
from ddpm_hf.training.sheets import Sheets
from support.scripts import script


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def folder(accelerator, tmp_path):
    with OutputFolder(TrainConfig(output_dir=str(tmp_path)), accelerator) as folder:
        yield folder


def sheets(accelerator, tmp_path, pixels, **config):
    config = TrainConfig(output_dir=str(tmp_path), **config)
    scheduler = VariationalDDPMScheduler(levels=256)
    options = dict(accelerator=accelerator, log=None, interrupts=None, average=None)
    return Sheets(config, None, scheduler, PixelTensors(pixels), **options)


@pytest.mark.parametrize("flip", [False, True])
def test_copies_are_found(accelerator, tmp_path, flip, monkeypatch):
    """Among more images than are compared at once, also turned left to right where the training did that."""
    monkeypatch.setattr("ddpm_hf.training.nearest.VALUES_AT_ONCE", 4096 * 24)
    pixels = torch.randint(0, 256, (5000, 1, 4, 6), dtype=torch.uint8)
    search = sheets(accelerator, tmp_path, pixels, random_flip=flip).nearest.search
    chosen = torch.tensor([4999, 0, 4096, 4095])
    x_start = pixels[chosen].float() / 127.5 - 1
    shift = torch.tensor([0.0, 0.01, -0.02, 0.0]).view(4, 1, 1, 1)
    distances, indices = search((x_start + shift).flip(-1) if flip else x_start + shift)
    assert torch.equal(indices, chosen)
    torch.testing.assert_close(distances, shift.abs().flatten(), rtol=1e-3, atol=1e-3)
    distances, indices = search(x_start, exclude=chosen)
    others = (pixels.float() / 127.5 - 1).flatten(1)
    for place, distance, index in zip(chosen.tolist(), distances, indices):
        expected = ((others - others[place]) ** 2).mean(1)
        if flip:
            flipped = others.view(-1, 1, 4, 6)[place].flip(-1).flatten()
            expected = torch.minimum(expected, ((others - flipped) ** 2).mean(1))
        expected[place] = torch.inf
        assert index == expected.argmin() and distance == pytest.approx(expected.min().sqrt().item(), rel=1e-4)


def test_pairs_begin_with_the_most_alike(accelerator, tmp_path):
    pixels = torch.randint(0, 256, (50, 3, 4, 4), dtype=torch.uint8)
    nearest = sheets(accelerator, tmp_path, pixels, channels=3).nearest
    x_start = torch.rand(40, 3, 4, 4) * 2 - 1
    x_start[7] = pixels[9].float() / 127.5 - 1
    pairs, median = nearest.compare(x_start)
    assert pairs.shape == (32, 3, 4, 8) and torch.allclose(*pairs[0].split(4, dim=-1), atol=1e-6)
    gaps = [(a - b).square().mean().item() for a, b in (pair.split(4, dim=-1) for pair in pairs)]
    assert gaps == sorted(gaps) and gaps[1] > 0.05 and 0 < median < 2 and 0 < nearest.distance_of_data(40) < 2


def test_means_and_spreads_of_channels():
    x = torch.stack(
        (torch.full((2, 4, 4), 0.5), torch.tensor([-1.0, 1.0]).repeat(2, 4, 2), torch.zeros(2, 4, 4)), dim=1
    )
    statistics = channel_statistics("samples", x.mean((0, 2, 3)), (x**2).mean((0, 2, 3)))
    assert statistics == {
        "samples_mean_red": 0.5, "samples_mean_green": 0.0, "samples_mean_blue": 0.0,
        "samples_std_red": 0.0, "samples_std_green": 1.0, "samples_std_blue": 0.0,
    }  # fmt: skip


def test_the_log_tells_the_colours_of_all_images_since_the_last_row(accelerator, folder, tmp_path):
    log = Log(TrainConfig(batch_size=2, channels=3, steps=9, log_every=2), folder, accelerator, 1000)
    images, t = torch.rand(4, 3, 5, 5) * 2 - 1, torch.zeros(2, dtype=torch.long)
    for step, part in enumerate(images.split(2), 1):
        log.add(part, t, torch.ones(2), torch.ones(2))
        log.step(step, torch.tensor(1.0), steps_skipped=0)
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    for i, colour in enumerate(("red", "green", "blue")):
        assert row[f"data_mean_{colour}"] == pytest.approx(images[:, i].mean().item(), abs=1e-6)
        assert row[f"data_std_{colour}"] == pytest.approx(images[:, i].std(correction=0).item(), rel=1e-5)
    log.bar.close()


def test_errors_of_one_image_are_none(accelerator, folder, tmp_path):
    """They are null in the log, and no bars in the plot, which is drawn."""
    log = Log(TrainConfig(steps=9), folder, accelerator, 1000)
    unknown = dict(bits_per_dim_sampling_error=0.1, loss_gap_standard_error=float("nan"))
    log.note(1, loss=1.0, **{f"loss_t_quarter_{i}": 1.0 for i in range(1, 5)})
    log.note(2, bits_per_dim=1.0, loss_train=1.0, loss_held_out=1.0, **unknown)
    with log:
        assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])["loss_gap_standard_error"] is None
    assert Image.open(tmp_path / "curves.png").size[0] > 0


class LikeThis(torch.nn.Module):
    """A network that is this function."""

    def __init__(self, function):
        super().__init__()
        self.forward = function


def test_memorized_images_are_reported(accelerator):
    """Of a network that knows the noise of its own images, and predicts zero for others."""
    scheduler = VariationalDDPMScheduler(num_train_timesteps=10)
    trained, held_out = torch.full((6, 1, 4, 4), 0.5), torch.full((5, 1, 4, 4), -0.5)
    visited = []

    def unet(x_t, t, class_labels=None, return_dict=False):
        abar = scheduler.alphas_cumprod[t].float().view(-1, 1, 1, 1)
        noise = (x_t - abar.sqrt() * 0.5) / (1 - abar).sqrt()
        is_remembered = (
            (noise.mean((1, 2, 3)).abs() < 4) & (noise.std((1, 2, 3)) < 3) & torch.tensor(len(visited) % 2 == 1)
        )
        visited.append(t)
        return (torch.where(is_remembered.view(-1, 1, 1, 1), noise, 0.0),)

    config = TrainConfig(batch_size=2, seed=3)
    signals = Interrupts(accelerator)
    losses = held_out_loss(
        config, signals, LikeThis(unet), DiffusionObjective(scheduler), (held_out, None), (trained, None)
    )
    assert losses["loss_train"] < 1e-6 and losses["loss_held_out"] == pytest.approx(1, abs=0.2)
    assert 0 < losses["loss_gap_standard_error"] < 0.2
    first, second = torch.cat(visited[::2]), torch.cat(visited[1::2])
    assert torch.equal(first, second) and torch.equal(first.bincount(), torch.full((10,), 4))  # 5 images at 8 timesteps
    same = held_out_loss(
        config,
        signals,
        LikeThis(lambda x, t, **_: (x,)),
        DiffusionObjective(scheduler),
        (trained, None),
        (trained, None),
    )
    assert same["loss_train"] == same["loss_held_out"] and same["loss_gap_standard_error"] == 0


def test_shares_of_processes_make_the_whole(accelerator, monkeypatch):
    config, objective = TrainConfig(batch_size=2), DiffusionObjective(VariationalDDPMScheduler())
    images = (torch.rand(5, 1, 4, 4), None), (torch.rand(5, 1, 4, 4), None)
    unet = LikeThis(lambda x, t, **_: (x,))
    whole = held_out_loss(config, Interrupts(accelerator), unet, objective, *images)
    gathered = []
    for rank in range(2):
        monkeypatch.setattr(
            "ddpm_hf.training.interrupts.gather_object", lambda objects: gathered.extend(objects) or objects
        )
        share = types.SimpleNamespace(process_index=rank, num_processes=2, device=torch.device("cpu"))
        held_out_loss(config, Interrupts(share), unet, objective, *images)
    monkeypatch.setattr("ddpm_hf.training.interrupts.gather_object", lambda objects: gathered)
    repeated = held_out_loss(config, Interrupts(accelerator), unet, objective, *images)
    for key in ("loss_train", "loss_held_out", "loss_gap_standard_error"):
        assert repeated[key] == pytest.approx(whole[key], rel=1e-5)


def test_a_sheet_of_pairs_is_as_large_as_its_images():
    assert as_sheet(as_images(torch.zeros(6, 1, 8, 16)), 3).size == (3 * 132, 2 * 68)
    assert as_sheet([Image.new("RGB", (100, 80))] * 3).size == (208, 168)


@pytest.mark.parametrize("name", ["train.py", "train_classifier.py"])
def test_plots_without_matplotlib(name, monkeypatch):
    """Refused before a step is taken, not after hours at the first plot."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused = script(name, "--config", "digits", "--dry_run", check=False)
    assert refused.returncode == 1 and refused.stdout == ""
    message = (
        'training runs need matplotlib; pip install "ddpm-hf[train]", or pip install -e ".[train]" in a checkout\n'
    )
    assert refused.stderr == f"{name}: {message}"
