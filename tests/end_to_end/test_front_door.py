"""ddpm-hf train with a folder of pictures: what it finds, what it says, and what it ends with."""

import io
import json
import re
import shlex

import numpy as np
import pytest
import yaml
from PIL import Image

from ddpm_hf import DDPMImagePipeline
from ddpm_hf.cli.train import summary_lines, with_data_option
from ddpm_hf.errors import UserError
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
    assert sum("M parameters, output_dir=runs/my-pets" in line for line in printed) == 1
    bits, sheet, more, evaluate, publish = result.stdout.splitlines()[-5:]
    assert bits.startswith("bits/dim ") and bits.endswith(f" of held-out images, after step {run['steps']:,}")
    assert (pets / sheet.split()[1]).is_file() and sheet.split()[1].endswith(f"{run['steps']:07d}.png")
    assert more.partition(" ")[2].strip() == "ddpm-hf sample runs/my-pets/pipeline"
    assert evaluate.endswith(" ddpm-hf evaluate runs/my-pets/pipeline --data 'my pets' --split train")
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
    assert "evaluate     ddpm-hf evaluate runs/digits/pipeline" in lines
    command(*lines[-3].split()[2:], "--count", 4, "--steps", 2)
    command(*lines[-2].split()[2:], "--images", 4, "--estimate", 8)


def test_a_trial_of_few_steps_and_the_run_after_it(pets):
    """A short run ends with a sheet and a measurement, too, and leaves nothing behind that a longer one would suffer from."""
    trial = command("train", "my pets", "--steps", "2", *TINY.split())
    names = ["bits/dim", "samples", "sample", "evaluate", "publish"]
    assert [line.split()[0] for line in trial.stdout.splitlines()[-5:]] == names
    command(*shlex.split(trial.stdout.splitlines()[-2])[2:], "--estimate", 8)  # of the held-out images
    assert json.loads((pets / "runs/my-pets/pipeline/evaluation.json").read_text())["images"] == 2
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
    ("keys", "options"),
    [
        (dict(data="digits"), []),
        (dict(data="digits", eval_every=5), []),
        (dict(data="digits", held_out=0.1, eval_every=5), ["--split", "train"]),
        (dict(data="pets", eval_every=5), ["--data", "pets"]),
        (dict(data="pets", held_out=0.1, eval_every=5), ["--data", "pets", "--split", "train"]),
        (dict(data="pets", eval_data="cats", eval_split="train", eval_every=5), ["--data", "cats", "--split", "train"]),
        (dict(data="digits", process="vp"), ["--ode"]),
    ],
)
def test_the_images_that_the_command_evaluates(tmp_path, keys, options):
    (tmp_path / "metrics.jsonl").write_text("")
    lines = [shlex.split(line) for line in summary_lines(TrainConfig(**keys), tmp_path / "pipeline")]
    assert lines[1] == ["evaluate", "ddpm-hf", "evaluate", str(tmp_path / "pipeline"), *options]


def test_an_upsampler_has_no_likelihood_to_evaluate(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    lines = summary_lines(TrainConfig(low_resolution=4), tmp_path / "pipeline")
    assert [line.split()[0] for line in lines] == ["sample", "publish"]


@pytest.mark.parametrize("argv", [[], ["--config", "digits-classes"]])
def test_a_run_with_a_preset_begins_with_one_line(pets, monkeypatch, argv):
    """Without arguments, too; nothing has been read or trained by then."""
    monkeypatch.setattr("ddpm_hf.training.loop.open_accelerator", lambda config: fail_with(UserError("no device")))
    (line, end) = command("train", *argv, check=False).stderr.splitlines()
    preset, classes = ("digits-classes", ", 10 classes") if argv else ("digits", "")
    assert line.startswith(f"ddpm-hf train: preset {preset}, data='digits', image_size=8, channels=1{classes}, ")
    assert re.search(rf", \d+\.\d\d M parameters, steps=\d+, batch_size=64, output_dir=runs/{preset}$", line)
    assert end == "ddpm-hf train: no device"


def fail_with(error):
    raise error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--scheduler.beta_schedule cosin", "scheduler.beta_schedule='cosin' is not known"),
        ("--lr_schedule cosin", "lr_schedule='cosin' is not known; did you mean 'cosine'?"),
        ("--background whit", "background='whit' is not a color"),
        ("--process vq", "process='vq' is not known"),
        ("--loss simpel", "loss='simpel' is not known"),
        ("--unet.dropout 7", "unet.dropout=7 must be"),
    ],
)
def test_a_bad_value_is_one_line(pets, words, message):
    """And nothing about what was found in the data."""
    (line,) = command("train", "my pets", *words.split(), check=False).stderr.splitlines()
    assert line.startswith(f"ddpm-hf train: {message}")


def test_a_mistyped_folder_that_is_not_on_the_hub_either(pets, hub):
    (pets / "flat").mkdir()
    first, last = command("train", "flatt", check=False).stderr.splitlines()
    hint = "there is no folder or file 'flatt' here; did you mean 'flat'?"
    assert first == f"ddpm-hf train: {hint} Looking for a data set of this name on the Hub"
    assert last.startswith(f"ddpm-hf train: data='flatt': {hint} On the Hub: ")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_progress_bar_names_the_work_at_the_end(pets, monkeypatch):
    """Which begins when no training step is left."""
    monkeypatch.setattr("support.scripts.io.StringIO", Terminal)
    printed = command("train", "my pets", "--steps", "2", *TINY.split()).stderr
    sampling, measuring = (
        printed.index(f"{work}: ") for work in ("sampling a sheet of 64 images", "measuring 2 held-out images")
    )
    assert 0 < sampling < measuring


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
