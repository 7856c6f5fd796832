"""Runs that learn their betas, as a user starts them."""

import json

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image

from ddpm_hf import DDPMImagePipeline, LearnedNoiseSchedule, VariationalDDPMScheduler, bits_per_dim
from ddpm_hf.cli.train import summary_lines
from ddpm_hf.training import train
from ddpm_hf.training.command_line import config_of
from ddpm_hf.training.config import ConfigError
from ddpm_hf.training.inputs import held_out_images
from ddpm_hf.training.interrupts import Stopped

SMALL = dict(
    steps=12,
    batch_size=16,
    sample_every=6,
    sample_count=2,
    sample_steps=2,
    log_every=4,
    learning_rate=1e-3,
    lr_warmup_steps=0,
    lr_schedule="constant",
    ema_decay=0.5,
    checkpoint_every=6,
    eval_every=6,
    eval_images=4,
    eval_evaluations=8,
    unet={"block_out_channels": [8, 16], "norm_num_groups": 4, "attention_head_dim": 8},
)
T = 40


def learned(loss="vlb", **scheduler):
    return dict(loss=loss, scheduler={"beta_schedule": "learned", "num_train_timesteps": T, **scheduler})


@pytest.fixture(scope="module", params=["vlb", "vlb_continuous"])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "run"
    train("digits", **{**SMALL, **learned(request.param), "output_dir": str(folder)})
    return folder


def rows_of(folder, key):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if key in row]


def test_the_averaged_curve_is_saved_as_trained_betas(run):
    state = torch.load(run / "checkpoints/0000012/run.pt", weights_only=True)
    schedule = LearnedNoiseSchedule(T)
    begun = schedule.betas()[0]
    for parameter, average in zip(schedule.parameters(), state["noise_schedule_ema"]["shadow_params"], strict=True):
        parameter.data.copy_(average)
    assert any(not torch.equal(average, state["noise_schedule"][name]) for name, average in schedule.named_parameters())
    betas = schedule.betas()[0].detach()
    assert (betas / begun - 1).abs().max() > 0.01
    scheduler = VariationalDDPMScheduler.from_pretrained(run / "pipeline", subfolder="scheduler")
    torch.testing.assert_close(scheduler.betas, betas, rtol=1e-12, atol=0)
    assert scheduler.config.beta_schedule == "learned"
    stock = DDPMScheduler.from_pretrained(run / "pipeline", subfolder="scheduler")
    torch.testing.assert_close(stock.betas.double(), betas, rtol=1e-6, atol=0)


def test_plain_diffusers_samples_it(run):
    image = DDPMPipeline.from_pretrained(run / "pipeline")(num_inference_steps=4, output_type="np").images
    assert image.shape == (1, 8, 8, 1) and abs(image).max() <= 1


def test_the_curve_is_logged_and_drawn(run):
    rows = rows_of(run, "log_snr_at_0")
    assert [row["step"] for row in rows] == [4, 8, 12]
    for row in rows:
        values = [row[f"log_snr_at_{percent}"] for percent in (0, 25, 50, 75, 100)]
        assert values == sorted(values, reverse=True)
    assert rows[0]["log_snr_at_0"] != rows[-1]["log_snr_at_0"]
    assert Image.open(run / "curves.png").size[1] > 800  # more than one row of panels


def test_held_out_images_are_measured_with_the_betas_that_are_saved(run):
    rows = rows_of(run, "bits_per_dim")
    assert [row["step"] for row in rows] == [6, 12] and all(0 < row["bits_per_dim"] < 40 for row in rows)
    if run.parent.name.startswith("vlb_continuous"):
        return
    pipeline = DDPMImagePipeline.from_pretrained(run / "pipeline")
    x_start, _ = held_out_images(config_of(config=str(run / "config.yaml")), None)
    result = bits_per_dim(pipeline.unet, pipeline.scheduler, x_start, generator=torch.Generator().manual_seed(0))
    assert rows[-1]["bits_per_dim"] == pytest.approx(result.mean, abs=6 * rows[-1]["bits_per_dim_sampling_error"] + 0.1)


def test_a_run_from_its_weights_keeps_its_betas(run, tmp_path):
    train(init_from=str(run / "pipeline"), **{**SMALL, "output_dir": str(tmp_path / "more"), "data": "digits"})
    before, after = (
        VariationalDDPMScheduler.from_pretrained(folder, subfolder="scheduler").betas
        for folder in (run / "pipeline", tmp_path / "more/pipeline")
    )
    assert torch.equal(before, after)


def test_its_learning_rate_is_its_own(tmp_path):
    for name, rate in (("a", 1e-2), ("b", 1e-30)):
        keys = {**SMALL, **learned(), "output_dir": str(tmp_path / name), "steps": 3}
        train("digits", **keys, noise_schedule_learning_rate=rate)
    a, b = (
        VariationalDDPMScheduler.from_pretrained(tmp_path / name / "pipeline", subfolder="scheduler").betas
        for name in "ab"
    )
    begun = LearnedNoiseSchedule(T).betas()[0].detach()
    torch.testing.assert_close(b, begun, rtol=1e-12, atol=0)
    assert (a / begun - 1).abs().max() > 0.01


REFUSED = [
    (dict(learned("simple")), r"scheduler.beta_schedule=learned needs a bound as the loss: loss='simple'"),
    (dict(learned("hybrid", variance_type="learned_range")), r"needs a bound as the loss: loss='hybrid'"),
    (dict(learned(rescale_betas_zero_snr=True)), r"scheduler.rescale_betas_zero_snr=true"),
    (
        dict(learned("vlb_continuous"), timesteps="loss_second_moment"),
        r"timesteps='loss_second_moment' is not for loss=vlb_continuous",
    ),
    (dict(learned("vlb_continuous", variance_type="learned_range")), r"variance_type='learned_range' has no meaning"),
    (dict(learned("vlb_continuous", prediction_type="previous")), r"prediction_type='previous' has no meaning"),
    (dict(learned(num_train_timesteps=1)), r"num_train_timesteps=1 must be an integer in \[2, 100000\]"),
    (dict(learned("vlb_continuous"), weighting="min_snr"), r"weighting='min_snr' is for the squared error"),
    (dict(learned(trained_betas=[0.1, 0.2])), r"scheduler.trained_betas are fixed"),
    (
        dict(learned(beta_end=0.9999999, num_train_timesteps=1000)),
        r"the first noise schedule, with beta_start=0.0001 and",
    ),
    (dict(loss="vlb_continuous"), r"loss=vlb_continuous is for learned betas"),
    (dict(learned(), noise_schedule_learning_rate=0), r"noise_schedule_learning_rate=0 must be a number in \(0"),
    (dict(learned("vlb", variance_type="analytic")), r"variance_type='analytic' needs x_start_mse"),
]


@pytest.mark.parametrize("keys, message", REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_is_refused_in_one_line(tmp_path, keys, message):
    with pytest.raises((ConfigError, ValueError), match=message) as error:
        train("digits", **{**SMALL, **keys, "output_dir": str(tmp_path / "run")})
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_pipeline_with_other_betas_is_refused(tmp_path):
    folder = tmp_path / "linear"
    process = {"scheduler": {"num_train_timesteps": T}}
    train("digits", **{**SMALL, **process, "steps": 1, "eval_every": 0, "output_dir": str(folder)})
    with pytest.raises(
        ConfigError, match="scheduler.beta_schedule='learned', but the network of init_from=.* leave it out"
    ):
        train(
            **{**SMALL, **learned(), "data": "digits", "init_from": str(folder / "pipeline")},
            output_dir=str(tmp_path / "run"),
        )


@pytest.mark.parametrize("rate", [30.0, 1e3, 1e38])
@pytest.mark.parametrize("measured", [True, False])
def test_a_schedule_that_collapses_stops_the_run_in_one_line(tmp_path, rate, measured):
    """Nothing is saved that cannot be opened."""
    keys = {**SMALL, **learned(), "output_dir": str(tmp_path / "run"), "noise_schedule_learning_rate": rate}
    keys |= {} if measured else dict(eval_every=0, sample_every=0)
    with pytest.raises(Stopped, match="lower noise_schedule_learning_rate|no finite gradient") as error:
        train("digits", **keys, max_steps_skipped=3)
    assert "\n" not in str(error.value) and not (tmp_path / "run/pipeline").exists()


def test_keys_beside_a_learned_pipeline(run, tmp_path):
    keys = {**SMALL, "init_from": str(run / "pipeline"), "data": "digits", "steps": 1, "eval_every": 0}
    train(**keys, scheduler={"num_train_timesteps": T}, output_dir=str(tmp_path / "same"))
    for scheduler, message in (
        ({"num_train_timesteps": 80}, "scheduler.num_train_timesteps=80, but the network"),
        ({"beta_start": 0.01}, "scheduler.beta_start=0.01, but the network"),
        ({"beta_schedule": "learned"}, "a run from init_from keeps the betas of its pipeline; leave it out"),
        ({"beta_schedule": "cosine"}, "scheduler.beta_schedule='cosine', but the network"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(**keys, scheduler=scheduler, output_dir=str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="loss=vlb_continuous learns the betas, which a run from init_from keeps"):
        train(**keys, loss="vlb_continuous", output_dir=str(tmp_path / "other"))


def test_the_commands_at_the_end(run):
    config = config_of(config=str(run / "config.yaml"))
    lines = dict(line.split(maxsplit=1) for line in summary_lines(config, run / "pipeline"))
    if config.loss == "vlb":
        assert "variances" not in lines and lines["evaluate"] == f"ddpm-hf evaluate {run}/pipeline"
    else:
        optimize = f"ddpm-hf optimize-chain {run}/pipeline --data digits --out {run}/pipeline-chain"
        assert lines["variances"] == optimize
        assert lines["sample"] == f"ddpm-hf sample {run}/pipeline-chain"
        assert lines["evaluate"] == f"ddpm-hf evaluate {run}/pipeline-chain"
