"""`eval_metrics`: the Fréchet distance of samples to the training images, during a run."""

import contextlib
import dataclasses
import json
import math
import os
import re
import signal
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ddpm_hf import DDPMImagePipeline
from ddpm_hf.data.sources import load_images
from ddpm_hf.evaluation.features.extraction import extract
from ddpm_hf.evaluation.features.extractors import open_extractor
from ddpm_hf.evaluation.generation import Generator
from ddpm_hf.evaluation.image_sets import DataImages
from ddpm_hf.evaluation.metrics.frechet import frechet_distance, frechet_error
from ddpm_hf.training import launch, plan as planning, plots, train
from ddpm_hf.training.command_line import config_of
from ddpm_hf.training.config import ConfigError, TrainConfig, as_yaml
from ddpm_hf.training.interrupts import Stopped
from ddpm_hf.training.log import Log
from ddpm_hf.training.plan import Rate
from ddpm_hf.training.sample_metrics import ERROR_GROUPS, FIRST_SEED, SampleMetrics
from support.scripts import ROOT, script
from support.signals import Trigger

RUN = dict(
    data="digits",
    scheduler={"levels": 17},
    steps=4,
    batch_size=32,
    log_every=1,
    sample_every=0,
    sample_steps=3,
    checkpoint_every=2,
    lr_schedule="constant",
    learning_rate=0.01,
    ema_decay=0.0,
    eval_every=2,
    eval_images=4,
    eval_evaluations=8,
    unet=dict(block_out_channels=[8, 16], norm_num_groups=4, attention_head_dim=4, dropout=0.1),
)
PLOT = Log.plot
METRICS = dict(eval_metrics=["fd"], eval_samples=72, eval_extractor="support.features:projected")


def run(folder, **keys):
    return train(config_of(TrainConfig, **{**RUN, **keys}, output_dir=str(folder)))


def rows_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("images_per_second", "memory_gb")} for row in rows]


def distances(folder):
    return {row["step"]: row["fd"] for row in rows_of(folder) if "fd" in row}


def state_of(folder, step=4):
    checkpoint = folder / f"checkpoints/{step:07d}"
    return [
        load_file(checkpoint / "model.safetensors"),
        torch.load(checkpoint / "optimizer.bin", weights_only=True),
        torch.load(checkpoint / "random_states_0.pkl", weights_only=False)["torch_manual_seed"],
    ]


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch):
    """They take most of the time of so short a run."""
    monkeypatch.setattr(Log, "plot", lambda log: None)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    run(folder, **METRICS, best_by="fd")
    return folder


@pytest.mark.parametrize("extractor", ["support.features:projected", "support.features:noisy"])
def test_a_run_is_the_same_with_and_without(measured, tmp_path, extractor):
    """Bit for bit: weights, optimizer and random states, also if the extractor draws random numbers."""
    run(tmp_path / "with", **{**METRICS, "eval_extractor": extractor})
    run(tmp_path / "without")
    with_metrics, without = (state_of(tmp_path / name) for name in ("with", "without"))
    torch.testing.assert_close(with_metrics, without, rtol=0, atol=0)
    rows = [{k: v for k, v in row.items() if not k.startswith("fd")} for row in rows_of(tmp_path / "with")]
    assert rows == rows_of(tmp_path / "without") and list(distances(tmp_path / "with")) == [2, 4]


def test_the_number_is_that_of_the_saved_pipeline(measured):
    """Samples drawn by hand in one batch, and the images of the split."""
    pipeline = DDPMImagePipeline.from_pretrained(measured / "pipeline")
    pictures = Generator(pipeline, num_inference_steps=3).draw(range(FIRST_SEED, FIRST_SEED + 72))
    pixels = torch.stack([torch.from_numpy(np.array(picture))[None] for picture in pictures])
    extractor = open_extractor(METRICS["eval_extractor"])
    images = DataImages(load_images("digits", "train"), pipeline.unet, 17)
    samples, real = extractor(pixels)["features"], extract(images, extractor, progress=False)["features"]
    last = rows_of(measured)[-1]
    assert last["fd"] == pytest.approx(frechet_distance(real, samples), rel=1e-6)
    error = frechet_error(real, samples, groups=ERROR_GROUPS, generator=torch.Generator().manual_seed(0))
    assert last["fd_standard_error"] == pytest.approx(error, rel=1e-6) and 0 < error < last["fd"]


@pytest.mark.slow
def test_two_processes_measure_the_same(tmp_path):
    """Of the same first weights, which a learning rate of almost 0 keeps; both keep the same best checkpoint."""
    keys = {**RUN, **METRICS, "learning_rate": 1e-30, "steps": 2, "eval_every": 1, "best_by": "fd", "eval_samples": 65}
    config = config_of(TrainConfig, **keys, output_dir=str(tmp_path / "two"))
    (tmp_path / "config.yaml").write_text(as_yaml(config))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    python = f"{ROOT / 'src'}{os.pathsep}{ROOT / 'tests'}"
    script(
        "train.py", "--config", tmp_path / "config.yaml", launcher=[*launcher, "--nproc_per_node=2"], PYTHONPATH=python
    )
    train(dataclasses.replace(config, output_dir=str(tmp_path / "one")))
    one, two = distances(tmp_path / "one"), distances(tmp_path / "two")
    assert list(one) == [1, 2] and two == pytest.approx(one, rel=1e-6)


def test_interrupted_while_it_draws(measured, tmp_path):
    """Ends as a run that was not interrupted."""
    keys = {**METRICS, "best_by": "fd"}
    trigger = Trigger("step 4: drawing 72 samples for fd", signal.SIGINT)
    message = "stopped by SIGINT after step 4; the same command resumes from there"
    with contextlib.redirect_stderr(trigger), pytest.raises(Stopped, match=message):
        run(tmp_path, **keys)
    assert list(distances(tmp_path)) == [2]
    run(tmp_path, **keys)
    assert rows_of(tmp_path) == rows_of(measured)
    torch.testing.assert_close(state_of(tmp_path), state_of(measured), rtol=0, atol=0)


def test_the_best_checkpoint_is_that_of_the_lowest_distance(tmp_path, monkeypatch):
    values = iter([3.0, 1.0, 2.0, math.nan, 5.0, 0.5])
    monkeypatch.setattr(SampleMetrics, "measure", lambda self, interrupts: {"fd": next(values)})
    keys = {**METRICS, "best_by": "fd", "eval_every": 1, "checkpoint_every": 1, "keep_checkpoints": 1}
    kept = lambda: [path.name for path in sorted((tmp_path / "checkpoints").iterdir())]  # noqa: E731
    run(tmp_path, **keys)
    assert kept() == ["0000002", "0000004"]
    # distances of other samples are not compared with the earlier ones
    run(tmp_path, **{**keys, "eval_samples": 64, "steps": 5})
    assert kept() == ["0000005"]
    run(tmp_path, **{**keys, "best_by": "bits_per_dim", "steps": 6})
    assert kept() == ["0000006"]


def test_features_that_are_not_finite_end_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Generator, "draw", lambda self, seeds, **kwargs: torch.ones(len(seeds), 1, 8, 8))
    run(tmp_path, **{**METRICS, "eval_extractor": "support.features:not_a_number", "best_by": "fd"})
    assert distances(tmp_path) == {2: None, 4: None}
    message = "left out (features by support.features:not_a_number are not finite); the run continues"
    assert capsys.readouterr().err.count(message) == 2 and (tmp_path / "checkpoints/0000004").is_dir()


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"eval_metrics": ["fid"]}, r"eval_metrics=\['fid'\] must be fd, or empty"),
        ({"eval_metrics": [], "best_by": "fd"}, "best_by=fd needs --eval_metrics fd"),
        ({"eval_every": 0}, "eval_metrics needs eval_every, the steps between measurements; give --eval_every 1000"),
        ({"streaming": True}, "eval_metrics reads the training images before the first step; leave out streaming"),
        ({"eval_samples": 63}, r"eval_samples=63 must be .*64"),
        (
            {"eval_extractor": "efficientnet"},
            "eval_extractor='efficientnet': extractor='efficientnet' is unknown; give",
        ),
        ({"eval_extractor": "support.features:nothing"}, "support.features:nothing cannot be imported"),
    ],
)
def test_what_is_refused(tmp_path, keys, message):
    with pytest.raises(ConfigError, match=message) as error:
        run(tmp_path / "run", **{**METRICS, **keys})
    assert "\n" not in str(error.value) and not (tmp_path / "run/metrics.jsonl").exists()


def test_it_is_drawn_and_told_beforehand(tmp_path, monkeypatch, capsys):
    """A panel of curves.png, lines before the first step, and what it costs by --dry_run."""
    monkeypatch.setattr(planning, "TIMED_SECONDS", 0.0)
    monkeypatch.setattr(Log, "plot", PLOT)
    panels = []
    monkeypatch.setattr(
        plots, "save_figure", lambda figure, path: panels.append([axes.get_ylabel() for axes in figure.axes])
    )
    run(tmp_path / "run", **METRICS)
    assert plots.DISTANCE in panels[-1]
    printed = capsys.readouterr().err
    assert "fd: FD-projected of 72 samples (3 steps) to 1,437 training images, whose features" in printed
    config = config_of(TrainConfig, **RUN, **METRICS, output_dir=str(tmp_path / "run"))
    launch.main(config, dry_run=True)
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(
        r"# fd takes about \S+ s \(72 samples \S+ s, comparison \S+ s\); 2 measurements are \d+% of the run's \d+ s",
        last,
    )
    with pytest.raises(SystemExit, match="eval_extractor='x': extractor='x' is unknown"):
        launch.main(dataclasses.replace(config, eval_extractor="x"), dry_run=True)


def test_too_few_samples_for_the_features(tmp_path, capsys):
    run(tmp_path, **{**METRICS, "eval_extractor": "support.features:pixels", "steps": 1})
    assert "fd: 72 images for 64 features" not in capsys.readouterr().err
    run(tmp_path / "few", **{**METRICS, "eval_extractor": "support.features:pixels", "eval_samples": 64, "steps": 1})
    assert "fd: 64 images for 64 features: the covariance is singular" in capsys.readouterr().err


def test_the_plan_of_a_run_with_it():
    """It takes part in the 15 % of the time for measurements, and draws 256 samples at least."""
    rate = Rate(step=0.5, evaluation=0.0005, sample=0.02, comparison=5.0)
    config = dataclasses.replace(
        TrainConfig(eval_metrics=["fd"], eval_every=1000, sample_steps=100), minutes=30.0, label_column=None
    )
    planned = planning.plan(config, rate, 1800)
    measurements = planned.steps // planned.eval_every
    assert planned.eval_samples == 2048 and measurements == 5  # of 50.76 s each, the sheet and bits/dim included
    assert 0.95 * 1800 < planned.steps * 0.5 + measurements * 50.76 <= 1800
    few = planning.plan(config, rate, 120)
    assert few.eval_samples == int(2048 * 0.15 * 120 / 50.76) and few.steps == few.eval_every
    assert planning.plan(config, rate, 20).eval_samples == 256
    explicit = dataclasses.replace(config, explicit=frozenset({"eval_samples"}))
    assert planning.plan(explicit, rate, 20).eval_samples == 2048
    words = planning.cost_of_sample_metrics(planned, rate)
    assert words == (
        "# fd takes about 46 s (2,048 samples 41 s, comparison 5 s); 5 measurements are 13% of the run's 30 min"
    )
