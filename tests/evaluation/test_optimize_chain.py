"""`ddpm-hf optimize-chain` and its report."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DiffusionPipeline
from PIL import Image

from ddpm_hf import DDPMImagePipeline, DDPMUNet, VariationalDDPMScheduler, VPSDEScheduler
from ddpm_hf.evaluation.chain_report import compare_chains, plot_chains, spaced_timesteps
from ddpm_hf.hub.card import write_model_card
from ddpm_hf.likelihood.chains import measure_denoising_errors
from support.scripts import command


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A pipeline of the digits whose network knows nothing."""
    torch.manual_seed(0)
    levels = dict(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    unet = DDPMUNet(8, 1, 1, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, **levels)
    folder = tmp_path_factory.mktemp("chains") / "pipeline"
    DDPMImagePipeline(unet, VariationalDDPMScheduler(100, levels=17)).save_pretrained(folder)
    return folder


def test_what_the_command_writes(pipeline, tmp_path):
    words = ["--data", "digits", "--images", 12, "--evaluations", 20, "--steps", "3,8", "--out", tmp_path / "fast"]
    output = command("optimize-chain", pipeline, *words).stdout
    assert "12 images (digits, train), 240 network calls" in output and "analytic, optimal" in output
    rows = json.loads((tmp_path / "fast/chains.json").read_text())
    bits = {(row["variance_type"], row["spacing"], row["steps"]): row["bits_per_dim"] for row in rows}
    for variance_type in ("fixed_small", "fixed_large", "analytic"):
        for steps in (3, 8):
            optimal = bits[variance_type, "optimal", steps]
            assert all(optimal <= bits[variance_type, spacing, steps] for spacing in ("uniform", "quadratic", "cosine"))
            assert optimal >= bits["analytic", "optimal", steps] - 1e-9
    assert np.asarray(Image.open(tmp_path / "fast/chains.png")).std() > 0
    pipe = DDPMImagePipeline.from_pretrained(tmp_path / "fast")
    assert pipe.scheduler.variance_type == "analytic" and pipe.scheduler.timestep_lists["optimal"].keys() == {"3", "8"}
    shape = pipe(2, num_inference_steps=3, timesteps="optimal", output_type="pt").images.shape
    assert shape == (2, 1, 8, 8) == pipe(2, num_inference_steps=5, eta=0.0, output_type="pt").images.shape
    words = ["--data", "digits", "--images", 4, "--steps", 3, "--timesteps", "optimal", "--out", tmp_path / "report"]
    assert "3 terms from t=" in command("evaluate", tmp_path / "fast", *words).stdout
    words = ["--count", 2, "--steps", 3, "--timesteps", "best", "--out", tmp_path / "samples.png"]
    assert "it has optimal" in command("sample", tmp_path / "fast", *words, check=False).stderr
    # stock samples with a fixed variance; the card says so
    assert isinstance(DiffusionPipeline.from_pretrained(tmp_path / "fast"), DDPMPipeline)
    card = " ".join(write_model_card(tmp_path / "fast").read_text().split())
    assert "plain diffusers with a fixed variance" in card and "for 3, 8 steps" in card and "bao2022analytic" in card


@pytest.mark.parametrize(
    "words, text",
    [
        (["--steps", "0,3"], "--steps 0,3 must be numbers of steps, 1 or more"),
        (["--steps", "ten"], "--steps ten must be numbers of steps"),
        (["--steps", "101"], "the process has 100 timesteps"),
        (["--variance", "learned_range"], "this network has fixed_small, fixed_large, analytic"),
        (["--evaluations", "1"], "--evaluations: 1 must be"),
    ],
)
def test_mistakes(pipeline, tmp_path, words, text):
    result = command(
        "optimize-chain",
        pipeline,
        "--data",
        "digits",
        "--images",
        4,
        "--evaluations",
        4,
        "--out",
        tmp_path / "out",
        *words,
        check=False,
    )
    assert result.returncode and text in result.stderr and not (tmp_path / "out").exists()


def test_other_mistakes(pipeline, tmp_path):
    (tmp_path / "out").mkdir()
    assert (
        "exists; give a new folder"
        in command("optimize-chain", pipeline, "--out", tmp_path / "out", check=False).stderr
    )
    pipe = DDPMImagePipeline.from_pretrained(pipeline)
    DDPMImagePipeline(pipe.unet, VPSDEScheduler()).save_pretrained(tmp_path / "vp")
    result = command("optimize-chain", tmp_path / "vp", "--data", "digits", "--out", tmp_path / "new", check=False)
    assert "VPSDEScheduler, which has no bound" in result.stderr


def test_spacings():
    assert spaced_timesteps(1000, 3, "uniform") == [0, 500, 999]
    assert spaced_timesteps(1000, 3, "quadratic") == [0, 250, 999]
    assert spaced_timesteps(1000, 5, "cosine") == [0, 146, 499, 853, 999]
    assert spaced_timesteps(1000, 1, "uniform") == [999]


def test_learned_range_has_its_own_variance_beside_the_analytic_one(tmp_path):
    scheduler = VariationalDDPMScheduler(30, beta_schedule="cosine", variance_type="learned_range")

    def network(x, t, class_labels=None, return_dict=False):
        return (torch.cat((0.5 * x, 0 * x), dim=1),)

    x_start = (torch.randint(0, 256, (20, 1, 4, 4), generator=torch.Generator().manual_seed(0)) / 127.5 - 1).double()
    errors = measure_denoising_errors(network, scheduler, x_start, num_evaluations=30)
    report = compare_chains(errors, [2, 6])
    assert list(report.optimal) == ["learned_range", "analytic"] and len(report.lines()) == 9
    plot_chains(report, tmp_path / "chains.png")
    best = report.scheduler("learned_range")
    assert best.variance_type == "learned_range" and best.x_start_mse is None
    best.set_timesteps(6, timesteps="optimal")
    assert best.chain == report.optimal["learned_range"][1].timesteps[::-1]


def test_a_pipeline_whose_learned_variance_is_replaced(tmp_path):
    levels = dict(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    unet = DDPMUNet(8, 1, 2, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, **levels)
    scheduler = VariationalDDPMScheduler(20, variance_type="learned_range")
    report = compare_chains(measure_denoising_errors(unet, scheduler, torch.ones(2, 1, 8, 8), num_evaluations=20), [3])
    pipe = DDPMImagePipeline(unet, report.scheduler("analytic"))
    assert pipe(1, num_inference_steps=3, timesteps="optimal", output_type="pt").images.shape == (1, 1, 8, 8)
    pipe.save_pretrained(tmp_path / "pipeline")
    card = " ".join(write_model_card(tmp_path / "pipeline").read_text().split())
    assert "Plain diffusers cannot sample a network whose learned variance was replaced" in card
