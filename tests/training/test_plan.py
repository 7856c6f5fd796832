"""`minutes`: the steps that fit, what follows from them, and a run that is resumed with its own plan."""

import dataclasses
import types

import pytest
import yaml

from ddpm_hf.training import plan as planning
from ddpm_hf.training.command_line import config_of, load_config
from ddpm_hf.training.config import ClassifierConfig, ConfigError, TrainConfig, as_yaml
from ddpm_hf.training.loop import train
from ddpm_hf.training.plan import Rate, describe, plan

TINY = {"block_out_channels": [8, 16], "norm_num_groups": 4, "layers_per_block": 1, "attention_head_dim": 8}
RATE = Rate(step=0.5, evaluation=0.0005)


def minutes(minutes=30.0, **values):
    return dataclasses.replace(TrainConfig(eval_every=1000, sample_steps=100), minutes=minutes, **values)


def test_steps_fit_into_the_time():
    """With a sheet of 64 x 100 and a measurement of 64 x 50 evaluations, 4.8 s together."""
    config = plan(minutes(), RATE, 1800)
    assert config.planned and config.steps == 3504 - 3504 % 350 and config.sample_every == 350
    assert 0.95 * 1800 < config.steps * 0.5 + 10 * 4.8 <= 1800
    assert config.steps % config.sample_every == config.steps % config.checkpoint_every == 0
    assert config.eval_every == config.checkpoint_every == config.sample_every


def test_what_follows_from_the_steps():
    for seconds, steps in ((120, 210), (1800, 3500), (360000, 719900)):
        config = plan(minutes(), RATE, seconds)
        assert abs(config.steps - steps) < 0.01 * steps + 10
        assert config.lr_schedule == "cosine" and config.lr_warmup_steps == min(config.steps // 20, 1000)
        assert config.ema_decay == pytest.approx(min(1 - 10 / config.steps, 0.9999))


def test_short_times_have_small_sheets():
    """Never more than 15 % of the time for them, where four images are possible; one of each at the end."""
    config = plan(minutes(), RATE, 20)
    assert (config.sample_count, config.eval_images) == (40, 40) and config.sample_every == config.steps == 34
    tiny = plan(minutes(), RATE, 0.1)
    assert (tiny.steps, tiny.sample_count, tiny.eval_images, tiny.ema_decay) == (1, 4, 4, 0.9)


def test_the_plan_in_words():
    """It names the steps and each key that it changed, with few images also their numbers."""
    before = minutes(1.0)
    words = describe(plan(before, RATE, 20), RATE, before).splitlines()
    assert words == [
        "1 minute is enough for 34 steps of 0.5 s",
        "  planned with them: lr_schedule=cosine, lr_warmup_steps=1, checkpoint_every=34, eval_every=34, eval_images=40, "
        "ema_decay=0.9, sample_every=34, sample_raw=0, sample_count=40",
        "  34 steps are few: more --minutes, a smaller --image_size, a smaller network or --mixed_precision bf16 "
        "would allow more",
    ]
    before = minutes(0.5, unet={"block_out_channels": [8, 16]})
    words = describe(plan(before, RATE, 0.1), RATE, before).splitlines()
    assert words[0] == "0.5 minutes are enough for 1 step of 0.5 s"
    assert words[-1].startswith("  1 step is few: ") and "network (--unet.block_out_channels 4,8) or" in words[-1]
    before = minutes(30.0)
    assert len(describe(plan(before, RATE, 1800), RATE, before).splitlines()) == 2  # 3,500 steps are not few


def test_a_sheet_has_as_many_samples_of_each_class():
    labels = dict(label_column="label", unet={"num_class_embeds": 10})
    assert (
        plan(minutes(**labels), RATE, 20).sample_count == 40 and plan(minutes(**labels), RATE, 1800).sample_count == 60
    )
    assert plan(minutes(**labels), RATE, 18).sample_count == 30  # 36 are possible
    assert plan(minutes(**labels), RATE, 0.1).sample_count == 4
    assert plan(minutes(**labels, sample_count=64, explicit=frozenset({"sample_count"})), RATE, 20).sample_count == 64


def test_the_plan_names_no_more_images_than_are_held_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(planning, "TIMED_SECONDS", 0.0)
    keys = dict(data="digits", minutes=0.05, unet=TINY, output_dir=str(tmp_path / "run"), sample_steps=2)
    train(**keys, eval_evaluations=8, held_out=0.002, eval_every=1000)
    assert "eval_images=3" in capsys.readouterr().err
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["eval_images"] == 3


def test_explicit_keys_stay():
    keys = dict(lr_schedule="constant", ema_decay=0.5, sample_every=7, eval_every=0, sample_count=640)
    config = plan(minutes(**keys, explicit=frozenset(keys)), RATE, 1800)
    assert {key: getattr(config, key) for key in keys} == keys and config.steps > 3000


def test_a_classifier_is_planned_too():
    config = plan(ClassifierConfig(minutes=1.0), RATE, 60)
    assert config.steps == 120 and config.checkpoint_every == 12 and config.eval_every == 0


def test_steps_and_minutes_contradict_each_other():
    with pytest.raises(ConfigError, match="steps=5 and minutes=2 contradict each other; leave one out"):
        load_config(["--steps", "5", "--minutes", "2"])
    for text in ("0", "-1", "soon"):
        with pytest.raises(ConfigError, match="minutes="):
            load_config(["--minutes", text])


@pytest.mark.slow
def test_the_same_command_resumes_with_the_plan_of_the_run(tmp_path, monkeypatch, capsys):
    """Whatever is measured then: the plan stands in config.yaml. Another number of minutes is another run."""
    monkeypatch.setattr(planning, "TIMED_SECONDS", 0.0)
    rates = iter([Rate(1.0, 0.0), Rate(5.0, 0.0)])
    measure = planning.measure_rate
    monkeypatch.setattr(planning, "measure_rate", lambda *arguments: (measure(*arguments), next(rates))[1])
    # the time that measuring takes is not planned with
    monkeypatch.setattr(planning, "time", types.SimpleNamespace(perf_counter=lambda: 0.0))
    keys = dict(
        data="digits", minutes=0.1, unet=TINY, output_dir=str(tmp_path / "run"), sample_steps=2, eval_evaluations=8
    )
    folder = train(**keys)
    assert (
        folder == tmp_path / "run/pipeline" and "0.1 minutes are enough for 6 steps of 1 s" in capsys.readouterr().err
    )
    run = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert run["minutes"] == 0.1 and run["steps"] == 6 and run["lr_schedule"] == "cosine"
    assert (tmp_path / "run/samples/0000006.png").is_file()
    repeated = config_of(**keys)
    assert repeated.planned and as_yaml(repeated) == (tmp_path / "run/config.yaml").read_text()
    train(**keys)  # nothing is left to do
    printed = capsys.readouterr().err
    assert "minutes are" not in printed and "resumed from" not in printed
    assert "already complete (6 steps); to train longer start a new run from its weights: --init_from " in printed
    with pytest.raises(ConfigError, match="minutes=0.2, but .* was trained with 0.1"):
        config_of(**keys | {"minutes": 0.2})


def test_measuring_leaves_the_run_as_it_is(tmp_path, monkeypatch):
    """The weights are those of a run with the same steps that was not planned."""
    import safetensors.torch
    import torch

    monkeypatch.setattr(planning, "TIMED_SECONDS", 0.0)
    monkeypatch.setattr(planning, "plan", lambda config, *_: dataclasses.replace(config, steps=2, planned=True))
    keys = dict(data="digits", unet=TINY, sample_every=0, eval_every=0)
    weights = []
    for name, more in (("planned", {"minutes": 1.0}), ("plain", {"steps": 2})):
        folder = train(**keys, **more, output_dir=str(tmp_path / name))
        weights.append(safetensors.torch.load_file(folder / "unet/diffusion_pytorch_model.safetensors"))
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
