"""ddpm-hf train with a folder of pictures: what it finds, what it says, and what it ends with."""

import json
import shlex

import numpy as np
import pytest
import yaml
from PIL import Image

from ddpm_hf import DDPMImagePipeline
from ddpm_hf.cli.train import summary_lines, with_data_option
from ddpm_hf.training import plan as planning
from ddpm_hf.training.config import TrainConfig
from support.scripts import command

TINY = "--unet.block_out_channels 8,16 --unet.norm_num_groups 4 --unet.layers_per_block 1 --unet.attention_head_dim 8"
TINY += " --sample_steps 2 --eval_evaluations 8"


@pytest.fixture
def pets(tmp_path, monkeypatch):
    """A folder of two classes with 20 pictures each, in colors, of 16x16 pixels; the current folder is the one around it."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "my pets" / name).mkdir(parents=True)
        for i in range(20):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(tmp_path / f"my pets/{name}/{i}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_folder_becomes_a_model(pets, monkeypatch):
    monkeypatch.setattr(planning, "TIMED_SECONDS", 0.0)
    words = ["train", "my pets/", "--minutes", "0.05", *TINY.split()]
    result = command(*words)
    printed = result.stderr.splitlines()
    assert printed[0] == "ddpm-hf train: data='my pets': 40 images"
    for fact in (
        "image_size=16 (their shorter side is 16 pixels)",
        "channels=3 (there are colors)",
        "label_column=label (with 2 classes)",
        "held_out=0.05 (2 images, as there is no split 'test')",
        "unet.block_out_channels=8,16",
        "minutes=0.05, batch_size=38, learning_rate=0.0002",
    ):
        assert f"  {fact}" in printed
    assert any(line.startswith("ddpm-hf train: 0.05 minutes are ") for line in printed)
    run = yaml.safe_load((pets / "runs/my-pets/config.yaml").read_text())
    bits, sheet, more, publish = result.stdout.splitlines()[-4:]
    assert bits.startswith("bits/dim ") and bits.endswith(f" of held-out images, after step {run['steps']:,}")
    assert (pets / sheet.split()[1]).is_file() and sheet.split()[1].endswith(f"{run['steps']:07d}.png")
    assert more.partition(" ")[2].strip() == "ddpm-hf sample runs/my-pets/pipeline"
    assert publish.endswith(" ddpm-hf push runs/my-pets/pipeline --repo_id USER/my-pets")
    pipeline = DDPMImagePipeline.from_pretrained("runs/my-pets/pipeline")
    assert pipeline.class_names == ["cat", "dog"] and pipeline.channels == 3
    repeated = command(*words)  # nothing is left to do
    assert repeated.stdout == result.stdout and "minutes are" not in repeated.stderr
    card = (pets / "runs/my-pets/pipeline/README.md").read_text()
    value, error = bits.split()[1], bits.split()[3]
    assert (
        f"\n{value} ± {error} (standard error) bits/dim over 2 held-out images, measured during training after" in card
    )
    measured = command("evaluate", "runs/my-pets", "--data", "my pets/", "--estimate", 8).stdout  # the run's own folder
    assert "my pets/ has no split 'test': measuring the images of 'train' that the run held out" in measured
    assert "bits/dim over 2 images that held_out=0.05 sets aside of 40 (my pets/, train)" in measured
    (again,) = [
        line for line in (pets / "runs/my-pets/pipeline/README.md").read_text().splitlines() if line[:9] == "`ddpm-hf "
    ]
    words = shlex.split(again.strip("`"))
    assert words[:5] == ["ddpm-hf", "evaluate", "runs/my-pets/pipeline", "--data", "my pets"]
    total = [line for line in measured.splitlines() if "total" in line]
    assert total == [line for line in command(*words[1:]).stdout.splitlines() if "total" in line]


def test_digits(pets):
    result = command("train", "digits", "--steps", "2", "--eval_every", "0", *TINY.split())
    assert "data='digits': 1,437 images\n  image_size=8" in result.stderr and "with 10 classes" in result.stderr
    lines = result.stdout.splitlines()  # nothing was measured
    assert "bits/dim     ddpm-hf evaluate runs/digits/pipeline" in lines
    command(*lines[-3].split()[2:], "--count", 4, "--steps", 2)
    command(*lines[-2].split()[2:], "--images", 4, "--estimate", 8)


def test_a_trial_of_few_steps_and_the_run_after_it(pets):
    """A short run ends with a sheet and a measurement, too, and leaves nothing behind that a longer one would suffer from."""
    trial = command("train", "my pets", "--steps", "2", *TINY.split())
    assert [line.split()[0] for line in trial.stdout.splitlines()[-4:]] == ["bits/dim", "samples", "sample", "publish"]
    run = pets / "runs/my-pets"
    assert sheets(run) == ["0000002.png"] and (run / "pipeline/samples.png").is_file()
    rerun = command("train", "my pets", "--steps", "2", *TINY.split())
    assert "runs/my-pets is already complete (2 steps); raise steps to continue" in rerun.stderr.splitlines()
    assert rerun.stdout == trial.stdout and "resumed from" not in rerun.stderr
    longer = command("train", "my pets", "--steps", "4", *TINY.split())
    assert "resumed from step 2 " in longer.stderr and "settings from" not in longer.stderr
    assert sheets(run) == ["0000002.png", "0000004.png"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "bits_per_dim" in row] == [2, 4]
    values = yaml.safe_load((run / "config.yaml").read_text())
    assert (values["eval_every"], values["sample_every"], values["checkpoint_every"]) == (1000, 1000, 1000)


def test_settings_that_a_resumed_run_keeps_are_shown(pets):
    first = [*TINY.split(), "--batch_size", 4, "--eval_every", 0, "--sample_every", 0]
    command("train", "my pets", "--steps", "1", *first)
    longer = command("train", "my pets", "--steps", "2", *TINY.split(), "--sample_every", 0)
    (line,) = [line for line in longer.stderr.splitlines() if "settings from" in line]
    assert line == (
        "ddpm-hf train: settings from runs/my-pets/config.yaml: "
        "held_out=0.0 (a new run: 0.05), batch_size=4 (a new run: 38), eval_every=0 (a new run: 1000)"
    )


def sheets(run):
    return sorted(path.name for path in run.glob("samples/*.png") if path.stem.isdigit())


def test_the_commands_that_it_ends_with_are_quoted(tmp_path):
    folder = tmp_path / "it's $HOME/pipeline"
    folder.mkdir(parents=True)
    (folder.parent / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    config = TrainConfig(data="my pets", split="train[:90%]")
    sample, evaluate, publish = (shlex.split(line) for line in summary_lines(config, folder))
    assert sample == ["sample", "ddpm-hf", "sample", str(folder)]
    assert evaluate[1:] == ["ddpm-hf", "evaluate", str(folder), "--data", "my pets", "--split", "train[:90%]"]
    assert publish[1:] == ["ddpm-hf", "push", str(folder), "--repo_id", "USER/it-s-HOME"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("pets --steps 3", "--data pets --steps 3"),
        ("--steps 3 pets", "--steps 3 --data pets"),
        ("--random_flip pets --steps=3", "--random_flip --data pets --steps=3"),
        ("--random-flip true pets", "--random-flip true --data pets"),
        ("--dry_run pets", "--dry_run --data pets"),
        ("--config digits --steps 3", "--config digits --steps 3"),
        ("--steps -3", "--steps -3"),
        ("", ""),
    ],
)
def test_the_word_that_is_the_data(before, after):
    assert with_data_option(before.split(), TrainConfig) == after.split()
