"""Short runs of the programs of training/, as a user starts them."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from support.compare import assert_close
from support.scripts import script


def options(**values):
    return [word for key, value in values.items() for word in (f"--{key}", value)]


SMALL = options(batch_size=16, steps=6, log_every=2, lr_warmup_steps=2, eval_every=3, eval_images=6, checkpoint_every=3)
SHEETS = options(eval_evaluations=10, sample_every=3, sample_count=2, sample_steps=3)
SHEETS += ["--scheduler.num_train_timesteps", 20]
SHEETS += options(eval_metrics="fd", eval_samples=64, eval_extractor="support.features:noisy")
NETWORK = ["--unet.block_out_channels", "[8, 16]", "--unet.norm_num_groups", 4, "--unet.attention_head_dim", 8]
CLASSIFIER = ["--classifier.block_out_channels", "[8, 16]", "--classifier.norm_num_groups", 4]
CLASSIFIER += ["--classifier.attention_head_dim", 8, "--classifier.layers_per_block", 1]
PRECISIONS = {"no": 1e-3, "bf16": 0.05, "fp16": 0.05}


@pytest.fixture
def run(fresh_accelerate, monkeypatch):
    """A function that runs a program; timesteps and noise are the CPU's, whatever device they are for."""
    uniform, normal = torch.randint, torch.randn_like

    def on_the_cpu(*args, device=None, generator=None, **kwargs):
        return (
            uniform(*args, **kwargs).to(device or "cpu")
            if generator is None
            else uniform(*args, device=device, generator=generator, **kwargs)
        )

    monkeypatch.setattr(torch, "randint", on_the_cpu)
    monkeypatch.setattr(torch, "randn_like", lambda x, **kwargs: normal(x.cpu(), **kwargs).to(x.device))

    def go(program, *arguments, **environment):
        fresh_accelerate()
        return script(program, *arguments, **environment)

    return go


def rows(folder, key):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([row[key] for row in rows if key in row])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_training(device, run, tmp_path, precision):
    here, there = tmp_path / "cpu", tmp_path / "device"
    arguments = [*SMALL, *SHEETS, *NETWORK, "--mixed_precision"]
    run("train.py", *arguments, precision, "--output_dir", there)
    assert json.loads((there / "environment.json").read_text())["device"] != "cpu"
    run("train.py", *arguments, "no", "--output_dir", here, ACCELERATE_USE_CPU="true")
    assert json.loads((here / "environment.json").read_text())["device"] == "cpu"
    for key in ("loss", "loss_held_out", "loss_train"):
        assert_close(rows(there, key), rows(here, key), PRECISIONS[precision])
    for key in ("bits_per_dim", "fd"):
        assert rows(there, key).isfinite().all() and len(rows(there, key)) == 2
    assert np.asarray(Image.open(there / "samples/0000006-denoising.png")).std() > 0


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["train.py", "train.py, learned betas", "train_classifier.py"])
def test_a_resumed_run_is_the_whole_one(device, fresh_accelerate, tmp_path, kind, precision):
    """The device's own random numbers too: dropout, noise, flips and timesteps go on where they were."""
    program, _, learns_betas = kind.partition(", ")
    network = [*SHEETS, *NETWORK, "--unet.dropout", "0.1"] if program == "train.py" else CLASSIFIER
    arguments = [
        *SMALL,
        *network,
        "--random_flip",
        "true",
        "--mixed_precision",
        precision,
        "--output_dir",
        tmp_path / "run",
    ]
    if learns_betas:
        arguments += ["--loss", "vlb_continuous", "--scheduler.beta_schedule", "learned"]
    saved = tmp_path / "run" / ("pipeline/unet" if program == "train.py" else "classifier")
    results = []
    for _ in range(2):
        fresh_accelerate()
        script(program, *arguments)
        results.append(load_file(saved / "diffusion_pytorch_model.safetensors"))
        shutil.rmtree(tmp_path / "run/checkpoints/0000006")
        shutil.rmtree(saved.parent if program == "train.py" else saved)
    assert_close(*results, tolerance=1e-5)  # a GPU adds gradients in an order of its own


@pytest.fixture
def trained(device, run, tmp_path):
    """A pipeline of ten classes with a classifier, in half precision on the device."""
    base = [*SMALL, *SHEETS, *NETWORK, "--mixed_precision", "bf16", "--output_dir", tmp_path / "base"]
    run("train.py", "--config", "digits-classes", *base)
    arguments = [*SMALL, *CLASSIFIER, "--mixed_precision", "fp16", "--output_dir", tmp_path / "classifier"]
    run("train_classifier.py", "--pipeline", tmp_path / "base/pipeline", *arguments)
    assert rows(tmp_path / "classifier", "accuracy_held_out").isfinite().all()
    return tmp_path / "classifier/pipeline"


def test_sampling_and_evaluation(device, run, trained, tmp_path, monkeypatch):
    draws = [
        ["--steps", 5],
        ["--steps", 5, "--eta", 0, "--class_label", 3, "--guidance_scale", 2],
        ["--steps", 5, "--classifier_scale", 1],
        ["--progressive", 4],
        ["--interpolate", 12, "--steps", 10],
    ]
    for number, arguments in enumerate(draws):
        path = tmp_path / f"{number}.png"
        run("sample.py", trained, "--count", 2, "--out", path, *arguments)
        assert np.asarray(Image.open(path)).std() > 0
    measured = {}
    for name, arguments in (("bound", []), ("estimate", ["--estimate", 12]), ("ode", ["--ode", "--tolerance", "1e-2"])):
        run("evaluate.py", trained, "--data", "digits", "--label_column", "label", "--images", 6, *arguments)
        measured[name] = json.loads((trained / "evaluation.json").read_text())["total"]
    assert abs(measured["bound"] - measured["estimate"]) < 0.2 * measured["bound"]
    assert np.isfinite(measured["ode"])


def test_continuous_time_and_larger_images(device, run, tmp_path):
    arguments = [*SMALL, *NETWORK, "--mixed_precision", "bf16", "--sample_every", 6, "--sample_steps", 5]
    run("train.py", "--config", "digits-vp", *arguments, "--sample_count", 2, "--output_dir", tmp_path / "vp")
    assert len(rows(tmp_path / "vp", "bits_per_dim")) == 2
    larger = [*arguments, "--data", "digits", "--image_size", 8, "--low_resolution", 4, "--conditioning_noise", 0.2]
    run("train.py", *larger, "--eval_every", 0, "--sample_count", 2, "--output_dir", tmp_path / "larger")
    run("sample.py", tmp_path / "larger/pipeline", "--count", 2, "--steps", 4, "--out", tmp_path / "larger.png")
    assert np.asarray(Image.open(tmp_path / "larger.png")).std() > 0
