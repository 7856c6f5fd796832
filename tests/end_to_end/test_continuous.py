"""Training in continuous time, as a user runs it: process vp, subvp, ve."""

import json
import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from PIL import Image

from ddpm_hf import (
    VESDE,
    VPSDE,
    DDPMImagePipeline,
    SubVPSDE,
    SubVPSDEScheduler,
    VariationalDDPMScheduler,
    VESDEScheduler,
    VPSDEScheduler,
    ode_bits_per_dim,
)
from ddpm_hf.data.pixels import image_transform
from ddpm_hf.data.sources import load_images
from ddpm_hf.training.command_line import load_config
from ddpm_hf.training.config import TrainConfig
from ddpm_hf.training.diffusion import DiffusionTask
from ddpm_hf.training.interrupts import Interrupts
from ddpm_hf.training.measurements import held_out_bits_per_dim
from support.scripts import script

SMALL = [
    "--config", "digits-vp", "--steps", "6", "--batch_size", "16", "--lr_schedule", "constant", "--checkpoint_every", "3",
    "--sample_every", "6", "--sample_count", "4", "--sample_steps", "5", "--sample_raw", "0", "--log_every", "2",
    "--scheduler.predictor", "ddim",
    "--unet.block_out_channels", "[8, 16]", "--unet.norm_num_groups", "4", "--unet.attention_head_dim", "8",
]  # fmt: skip
VE = ["--process", "ve", "--unet.time_embedding_type", "fourier", "--scheduler.sigma_max", "20"]
NCSNPP = [
    "--channels", "3", "--unet.block_out_channels", "[32, 32]",
    "--unet.down_block_types", "[SkipDownBlock2D, AttnSkipDownBlock2D]",
    "--unet.up_block_types", "[AttnSkipUpBlock2D, SkipUpBlock2D]",
]  # fmt: skip
EVALUATED = ["--eval_every", "6", "--eval_images", "4"]
EVENLY_SPREAD = ["--timesteps", "low_discrepancy"]
BY_IMPORTANCE = ["--process", "subvp", "--weighting", "likelihood", "--timesteps", "importance"]
RUNS = {
    "vp": (EVALUATED, VPSDEScheduler),
    "vp-evenly-spread": (EVENLY_SPREAD, VPSDEScheduler),
    "subvp": (BY_IMPORTANCE, SubVPSDEScheduler),
    "ve": ([*VE, *NCSNPP], VESDEScheduler),
}


@pytest.fixture(scope="module", params=list(RUNS))
def run(request, tmp_path_factory):
    """One run of each process, stopped in the middle and begun again; beside it the kind of its scheduler."""
    extra, kind = RUNS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    script("train.py", *SMALL, *extra, "--output_dir", folder / "run", "--steps", 3)
    script("train.py", *SMALL, *extra, "--output_dir", folder / "run")
    return folder, extra, kind


def test_a_run(run):
    folder, extra, kind = run
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    losses = [row for row in rows if "loss" in row]
    assert losses[-1]["step"] == 6 and all(row["loss"] > 0 for row in losses)
    for name in ("samples/0000006.png", "samples/0000006-denoising.png", "curves.png"):
        assert np.asarray(Image.open(folder / "run" / name)).std() > 0
    pipe = DDPMImagePipeline.from_pretrained(folder / "run/pipeline")
    assert type(pipe.scheduler) is kind and pipe.scheduler.levels == 17
    if "--eval_every" in extra:
        (measured,) = [row for row in rows if "bits_per_dim" in row and row["step"] == 6]
        assert measured["bits_per_dim"] > 0 and measured["loss_held_out"] > 0
        assert measured["bits_per_dim_sampling_error"] is None  # one probe does not know it
        held_out = load_images("digits", "test")[:4]["image"]
        x_start = torch.stack([image_transform((8, 8), pipe.channels, levels=17)(image) for image in held_out])
        expected = ode_bits_per_dim(pipe.unet, pipe.scheduler, x_start, rtol=1e-3, atol=1e-3, probes=8).mean
        assert measured["bits_per_dim"] == pytest.approx(expected, abs=0.5)  # other noise and probes


def test_a_run_that_went_on_is_one_that_was_let_alone(run):
    folder, extra, _ = run
    script("train.py", *SMALL, *extra, "--output_dir", folder / "alone")
    resumed, alone = (
        DDPMImagePipeline.from_pretrained(folder / name / "pipeline").unet.state_dict() for name in ("run", "alone")
    )
    for key, value in alone.items():
        assert torch.equal(resumed[key], value), key


def test_evaluation_and_samples(run, tmp_path):
    folder = run[0] / "run/pipeline"
    output = script("evaluate.py", folder, "--images", 3, "--tolerance", "1e-2", "--probes", 2).stdout
    report = json.loads((folder / "evaluation.json").read_text())
    assert f"total    {report['total']:.4f}" in output and "network calls an image" in output
    assert report["dequantization"] == "uniform" and report["sampling_error"] > 0 and report["images"] == 3
    card = (folder / "README.md").read_text()
    assert f"| total | {report['total']:.4f}" in card and "a network of continuous time" in card and " SDE, " in card
    assert "by the probability-flow ODE with\nuniform dequantization" in card and "probability-flow ODE" in card[:900]
    script("sample.py", folder, "--count", 4, "--steps", 4, "--out", tmp_path / "samples.png")
    assert np.asarray(Image.open(tmp_path / "samples.png")).std() > 0
    refused = script("evaluate.py", folder, "--images", 3, "--estimate", 8, check=False)
    assert refused.returncode == 2 and "in continuous time, where there is no bound; leave out" in refused.stderr
    refused = script("evaluate.py", folder, "--images", 3, "--ode", "--first", 3, check=False)
    assert refused.returncode == 2 and "--first 3 is of a chain" in refused.stderr
    refused = script("evaluate.py", folder, "--images", 3, "--ode", "--tolerance", 0, check=False)
    assert refused.returncode == 2 and "argument --tolerance: 0 must be a number, 1e-12 to 1" in refused.stderr
    refused = script(
        "train_classifier.py", "--config", "digits", "--pipeline", folder, "--output_dir", tmp_path / "c", check=False
    )
    assert refused.returncode == 1 and "is in continuous time; classifiers need discrete timesteps" in refused.stderr


def test_without_the_package_by_trusted_code_alone(run):
    folder = run[0] / "run/pipeline"
    ours = DDPMImagePipeline.from_pretrained(folder)
    for open_kwargs in ({}, {"custom_pipeline": str(folder)}):
        pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **open_kwargs)
        for pipeline in (pipe, ours):
            pipeline.set_progress_bar_config(disable=True)
        images = [pipeline(2, torch.Generator().manual_seed(0), 4, "np").images for pipeline in (pipe, ours)]
        np.testing.assert_allclose(*images, atol=1e-5)
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(folder)


def test_the_ode_of_a_chain(make_pipeline, tmp_path):
    make_pipeline(scheduler=VariationalDDPMScheduler(levels=17)).save_pretrained(tmp_path)
    script("evaluate.py", tmp_path, "--images", 2, "--ode", "--tolerance", "1e-2", "--first", 20, "--out", tmp_path)
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert report["dequantization"] == "decoder" and report["sampling_error"] is None
    assert report["command"].endswith("--split test --images 2 --first 20 --ode --tolerance 0.01")
    refused = script("evaluate.py", tmp_path, "--ode", "--estimate", 20, check=False)
    assert refused.returncode == 2 and "are of the bound; leave them out with --ode" in refused.stderr


def test_an_ode_that_does_not_end_leaves_the_run_alone(capsys):
    config, signals = TrainConfig(), Interrupts(Accelerator(cpu=True))
    x_start = torch.zeros(2, 1, 8, 8)

    class Lost(torch.nn.Module):
        def forward(self, x, t, class_labels=None, return_dict=False):
            return (x * float("nan"),)

    measured = held_out_bits_per_dim(config, signals, Lost(), VPSDEScheduler(levels=17), None, x_start, None)
    assert math.isnan(measured["bits_per_dim"])
    assert "held-out bits/dim is left out: the ODE has a state that is not finite" in capsys.readouterr().err


def test_dequantization_of_a_chain(make_pipeline, tmp_path):
    make_pipeline(scheduler=VariationalDDPMScheduler(levels=17)).save_pretrained(tmp_path)
    extra = ["--images", 2, "--ode", "--tolerance", "1e-2", "--dequantization", "uniform"]
    script("evaluate.py", tmp_path, *extra, "--out", tmp_path)
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert report["dequantization"] == "uniform"
    extra = ["--images", 2, "--ode", "--dequantization", "uniform", "--first", 3]
    refused = script("evaluate.py", tmp_path, *extra, check=False)
    assert refused.returncode == 1 and "--first 3 is of --dequantization decoder" in refused.stderr


@pytest.mark.parametrize(
    ("preset", "process", "decay"),
    [
        ("ddpmpp-cifar10-vp", VPSDE(beta_min=0.1, beta_max=20.0), 0.9999),
        ("ddpmpp-cifar10-subvp", SubVPSDE(beta_min=0.1, beta_max=20.0), 0.9999),
        ("ncsnpp-cifar10", VESDE(sigma_min=0.02, sigma_max=100.0), 0.999),
    ],
)
def test_presets_of_the_paper(preset, process, decay, tmp_path):
    """Sizes, optimizer and process as their authors published them for CIFAR-10; Song et al. 2020, appendix C and H."""
    config, _ = load_config(["--config", preset, "--output_dir", str(tmp_path / "none")])
    with torch.device("meta"):
        task = DiffusionTask(config)
        unet, scheduler, objective, times = task.network, task.scheduler, task.objective, task.timesteps
    assert unet.num_parameters() == {"ncsnpp-cifar10": 62_758_915}.get(preset, 61_804_419)
    assert (config.steps, config.batch_size, config.learning_rate, config.lr_warmup_steps) == (1300000, 128, 2e-4, 5000)
    assert (config.ema_decay, config.unet["dropout"], config.random_flip, config.max_grad_norm) == (decay, 0.1, True, 1)
    t = torch.linspace(1e-5, 1, 11, dtype=torch.float64)
    x = torch.randn(11, 3, 2, 2, dtype=torch.float64)
    assert type(objective.sde) is type(process) and objective.sde.t_min == 1e-5
    for ours, published in zip(objective.sde.marginal(x, t), process.marginal(x, t)):
        torch.testing.assert_close(ours, published)
    drawn, weights = times.sample(4)
    assert len(drawn) == 4 and (drawn >= 1e-5).all() and (drawn <= 1).all() and (weights == 1).all()
    scheduler.set_timesteps(10 if preset != "ddpmpp-cifar10-vp" else 50)
    ve = preset == "ncsnpp-cifar10"
    steps = ("reverse_diffusion", 1, 0.16) if ve else ("euler_maruyama", 0, scheduler.config.snr)
    assert (scheduler.config.predictor, scheduler.config.correct_steps, scheduler.config.snr) == steps


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--process", "vpp"], "process='vpp' is not known; did you mean 'vp'?"),
        (["--loss", "vlb"], "loss='vlb' is for discrete timesteps; with process=vp take simple"),
        (["--weighting", "p2"], "weighting='p2' is for discrete timesteps; with process=vp take null, likelihood"),
        (
            ["--timesteps", "loss_second_moment"],
            "is for discrete timesteps; with process=vp take uniform, low_discrepancy, importance",
        ),
        (["--low_resolution", "4"], "low_resolution is for process=ddpm, not for vp"),
        (["--process", "ve"], "VESDE needs a network with time_embedding_type='fourier', this one has 'positional'"),
        ([*VE, "--scheduler.centered", "false"], "images are trained in [-1, 1]; leave it out, and double sigma_min"),
        (["--unet.time_embedding_type", "fourier"], "VPSDE needs a network with time_embedding_type='positional'"),
        (["--scheduler.beta_min", "30"], "beta_min=30, beta_max=20.0: must be 0 < beta_min <= beta_max"),
        (["--scheduler.sigma_min", "1"], "unknown key 'scheduler.sigma_min'"),
        (["--scheduler.variance_type", "fixed_small"], "unknown key 'scheduler.variance_type'"),
        (["--scheduler.num_train_timesteps", "1", "--sample_steps", "null"], "sample_steps=1 must be"),
        ([*VE, "--scheduler.prediction_type", "epsilon"], "networks that take sigma divide their output by it"),
        (["--sample_steps", "1"], "sample_steps=1 must be an integer, 2 or more"),
    ],
)
def test_a_config_that_cannot_be(arguments, message, tmp_path):
    refused = script("train.py", *SMALL, *arguments, "--output_dir", tmp_path / "run", check=False)
    assert refused.returncode == 1 and message in refused.stderr and refused.stderr.count("\n") == 1, refused.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key, value", [("timesteps", "importance"), ("weighting", "likelihood")])
def test_what_is_of_continuous_time_alone(key, value, tmp_path):
    refused = script("train.py", "--config", "digits", f"--{key}", value, "--output_dir", tmp_path / "run", check=False)
    assert refused.returncode == 1 and f"{key}={value!r} is not known" in refused.stderr, refused.stderr
