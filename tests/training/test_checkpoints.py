"""What a checkpoint holds, and what is not loaded from one."""

import dataclasses
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from ddpm_hf.files.digests import DIGESTS, check_digests, write_digests
from ddpm_hf.training import train
from ddpm_hf.training.batches import Position
from ddpm_hf.training.checkpoints import Checkpoints
from ddpm_hf.training.command_line import load_config
from ddpm_hf.training.config import ConfigError, TrainConfig
from ddpm_hf.training.inputs import open_images
from ddpm_hf.training.resume import checkpoint_to_resume, checkpoints_in

NAMES = ["config.yaml", "model.safetensors", "optimizer.bin", "random_states_0.pkl", "run.pt", "scaler.pt"]


class Run:
    """A network of 2,320 weights, as far as checkpoints are concerned, with a gradient scaler."""

    def __init__(self, folder: Path, facts=None, **config):
        self.config = TrainConfig(output_dir=str(folder), **config)
        accelerator = Accelerator(cpu=True)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        network = torch.nn.Sequential(torch.nn.Linear(28, 80))
        optimizer = torch.optim.AdamW(network.parameters(), 0.1)
        self.network, optimizer = accelerator.prepare(network, optimizer)
        accelerator.scaler.scale(self.network(torch.ones(4, 28)).sum()).backward()
        optimizer.step()
        self.at = Position()
        self.checkpoints = Checkpoints(self.config, accelerator, per_process=dict(at=self.at), facts=facts)

    def save(self, *steps):
        for self.at.step in steps:
            assert self.checkpoints.save(self.at.step)
        return self.checkpoints.folder / f"{self.at.step:07d}"


@pytest.fixture
def run(tmp_path):
    """With two checkpoints."""
    run = Run(tmp_path / "run")
    run.save(1, 2)
    return run


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def silently_loaded(run, flips):
    """How many of so many random bits of all files of a checkpoint change and it is loaded nevertheless; no line each."""
    newest, numbers, count = run.checkpoints.folder / "0000002", random.Random(0), 0
    whole = newest.with_name("whole")
    newest.rename(whole)
    names = sorted(path.name for path in whole.iterdir())
    assert names == sorted([*NAMES, DIGESTS])
    for i in range(flips):
        shutil.rmtree(newest.with_name("0000002.unreadable"), ignore_errors=True)
        shutil.rmtree(newest, ignore_errors=True)
        shutil.copytree(whole, newest)
        path = newest / names[i % len(names)]
        flip(path, numbers.randrange(8 * path.stat().st_size))
        count += run.checkpoints.load(newest) == newest
        assert run.at.step == (2 if count else 1)
    return count


def test_a_bit_that_has_changed_is_found(run, capsys):
    assert silently_loaded(run, 21) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 21
    for name in NAMES:
        assert sum(f"0000002 cannot be read ({name} is damaged); the run resumes from" in line for line in lines) >= 3


@pytest.mark.slow
def test_no_bit_of_1200_that_has_changed_is_loaded(run):
    assert silently_loaded(run, 1200) == 0


@pytest.mark.parametrize(
    "change, problem",
    [
        (lambda folder: (folder / "scaler.pt").unlink(), "scaler.pt is missing"),
        (lambda folder: (folder / "pytorch_model.bin").write_bytes(b""), "pytorch_model.bin is not a part of it"),
        (lambda folder: (folder / DIGESTS).unlink(), f"{DIGESTS} cannot be read"),
        (lambda folder: (folder / DIGESTS).write_text("[" * 100_000), f"{DIGESTS} cannot be read"),
        (lambda folder: (folder / DIGESTS).write_text("[1]"), f"{DIGESTS} cannot be read"),
        (lambda folder: (folder / DIGESTS).write_text('{"../../x": ""}'), "../../x is missing"),
        (lambda folder: [path.unlink() for path in folder.iterdir()], f"{DIGESTS} cannot be read"),
    ],
)
def test_files_that_are_not_those_written(run, capsys, change, problem):
    newest = run.checkpoints.folder / "0000002"
    change(newest)
    with pytest.raises(ValueError) as caught:
        check_digests(newest)
    assert str(caught.value) == problem
    assert run.checkpoints.load(newest) == newest.with_name("0000001")
    output, without = capsys.readouterr().err, not (newest.with_name("0000002.unreadable") / DIGESTS).exists()
    assert ("an older version of this package wrote it, and can resume from it" in output) == without
    assert (newest.with_name("0000002.unreadable")).is_dir() and not newest.exists()


def test_a_file_manager_damages_nothing(run):
    newest = run.checkpoints.folder / "0000002"
    (newest / ".DS_Store").write_bytes(b"x")
    assert run.checkpoints.load(newest) == newest


class Payload:
    """A pickle that makes a folder as it is opened."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("kind", ["pickle", "torch"])
@pytest.mark.parametrize("name", [*NAMES[1:], "pytorch_model.bin", "custom_checkpoint_0.pkl", "config.yaml"])
def test_a_hostile_checkpoint_runs_no_code(run, tmp_path, capsys, name, kind):
    """With digests that are right, as whoever made it can write them."""
    newest, marker = run.checkpoints.folder / "0000002", tmp_path / "executed"
    if name == "pytorch_model.bin":
        (newest / "model.safetensors").unlink()
    if name == "config.yaml":
        (newest / name).write_text(f"!!python/object/apply:os.mkdir ['{marker}']\n")
    elif kind == "pickle":
        (newest / name).write_bytes(pickle.dumps(Payload(marker)))
    else:
        torch.save({"state": Payload(marker), "step": 0}, newest / name)
    write_digests(newest)
    assert checkpoint_to_resume(run.config) == newest
    loaded = run.checkpoints.load(newest)
    assert not marker.exists()
    lines = capsys.readouterr().err.splitlines()
    if name == "config.yaml":  # of no use for the state; its values were those of the one before
        assert loaded == newest
    else:
        assert loaded == newest.with_name("0000001") and len(lines) == 1 and "0000002 cannot be read (" in lines[0]
    with pytest.raises(FileNotFoundError):
        os.rmdir(marker)  # that it would have been seen
    pickle.loads(pickle.dumps(Payload(marker)))
    os.rmdir(marker)


FACTS = dict(class_names=["bus", "tram"], size_of_the_split=20)


@pytest.mark.parametrize(
    "now, difference",
    [
        (dict(class_names=["bicycle", "bus", "tram"]), "class names 'bicycle' added"),
        (dict(class_names=["bus", "train"]), "class names 'train' added and 'tram' removed"),
        (dict(class_names=["tram", "bus"]), "class names in another order"),
        (dict(class_names=None), "class names ['bus', 'tram'] then, none now"),
        (dict(size_of_the_split=21), "size of the split 20 then, 21 now"),
    ],
)
def test_other_facts_are_refused(tmp_path, now, difference):
    path = Run(tmp_path, FACTS).save(4)
    assert Run(tmp_path, FACTS).checkpoints.load(path) == path
    other = Run(tmp_path, FACTS | now)
    before = other.network[0].weight.clone()
    with pytest.raises(ConfigError) as caught:
        other.checkpoints.load(path)
    assert f"{path} was trained on other data: {difference}; give the data that it was trained on" in str(caught.value)
    assert torch.equal(other.network[0].weight, before) and path.is_dir()
    assert Run(tmp_path, {"a fact of a later version": 1}).checkpoints.load(path) == path


def test_a_broken_image_is_left_out_of_a_run_that_resumes(tmp_path, monkeypatch, capsys):
    """By what its error advises: with a higher max_broken, or removed. The epoch begins anew."""
    monkeypatch.setattr("ddpm_hf.training.log.Log.plot", lambda log: None)  # which takes most of the time
    data = tmp_path / "pictures"
    data.mkdir()
    for i in range(8):
        Image.new("L", (8, 8), 30 * i).save(data / f"{i}.png")
    small = "--unet.block_out_channels 8,16 --unet.norm_num_groups 4 --unet.attention_head_dim 8 --scheduler.levels 256"
    arguments = f"{small} --batch_size 2 --lr_schedule constant --lr_warmup_steps 0 --sample_every 0".split()
    arguments += ["--config", "digits", "--data", str(data), "--output_dir", str(tmp_path / "run"), "--steps"]
    train(load_config([*arguments, "2"])[0])
    (data / "3.png").write_bytes(b"broken")
    with pytest.raises(
        ConfigError, match="1 of 8 images cannot be read, the last .*; remove it, or raise max_broken=0.01"
    ):
        train(load_config([*arguments, "3"])[0])
    train(load_config([*arguments, "3", "--max_broken", "0.5"])[0])
    assert "the data has 7 images, 8 before the run was stopped; the epoch starts again" in capsys.readouterr().err
    for name in ("3.png", "4.png"):
        (data / name).unlink()
    train(load_config([*arguments, "4"])[0])
    assert "the data has 6 images, 7 before the run was stopped; the epoch starts again" in capsys.readouterr().err
    place = torch.load(tmp_path / "run/checkpoints/0000004/run.pt")["own"][0]["at"]
    assert place == {"step": 4, "epoch": 0, "batch": 1, "images": 6}


def test_the_same_images_at_another_place(capsys):
    at = Position(images=8)
    at.load_state_dict({"step": 5, "epoch": 2, "batch": 1, "images": 8})
    assert at == Position(5, 2, 1, 8)
    at.load_state_dict({"step": 4, "epoch": 1, "batch": 3})  # of an older version
    assert at == Position(4, 1, 3, 8) and capsys.readouterr().err == ""


def test_held_out_images_stay_the_same(tmp_path):
    """Of another number of images the share would be others: the size of the split must stay, then."""
    for i in range(8):
        Image.new("L", (8, 8), 30 * i).save(tmp_path / f"{i}.png")
    for share in (0.0, 0.25):
        config = TrainConfig(data=str(tmp_path), held_out=share)
        data = open_images(config)
        assert len(data.images) == 8 * (1 - share) and data.split_size == 8
        assert data.facts(config) == {"class_names": None} | ({"size_of_the_split": 8} if share else {})


def test_a_damaged_checkpoint_of_another_run(tmp_path, capsys):
    """The one before it is taken; that run's folder stays as it is."""
    first = Run(tmp_path / "first")
    newest = first.save(2, 3)
    flip(newest / "run.pt", 1000)
    second = Run(tmp_path / "second", resume=str(newest))
    assert checkpoint_to_resume(second.config) == newest
    assert second.checkpoints.load(newest).name == "0000002" and second.at.step == 2
    assert "0000003 cannot be read (run.pt is damaged); the run resumes from" in capsys.readouterr().err
    assert [path.name for path in checkpoints_in(tmp_path / "first")] == ["0000002", "0000003"]
    flip(newest.with_name("0000002") / "run.pt", 1000)
    with pytest.raises(
        ConfigError, match="cannot be read .run.pt is damaged., nor can the one before it; start again in"
    ):
        second.checkpoints.load(newest)


def test_checkpoints_that_cannot_be_meant(run):
    config, folder = run.config, run.checkpoints.folder
    for resume, message in (
        (str(folder.parent), "is the folder of a run; give one of its checkpoints, as .*/0000002$"),
        (
            str(folder / "0000001"),
            "holds something already: newer checkpoints than resume=.*; to resume from an older one give another",
        ),
        (str(folder / "0000009"), "is neither auto, never nor a folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            checkpoint_to_resume(dataclasses.replace(config, resume=resume))
    assert checkpoint_to_resume(dataclasses.replace(config, resume=str(folder / "0000002"))) == folder / "0000002"


def test_a_changed_config_is_not_believed(run):
    """A flipped bit of a checkpoint's config.yaml is not taken for a changed setting."""
    path = run.checkpoints.folder / "0000002/config.yaml"
    path.write_text(path.read_text().replace("learning_rate: 0.0002", "learning_rate: 0.0003"))
    assert checkpoint_to_resume(run.config) == path.parent
