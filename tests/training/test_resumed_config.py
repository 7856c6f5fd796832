"""Commands that meet the folder of an earlier run: which resume it, and what is said of the others."""

import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image

from ddpm_hf.files.paths import normal_name
from ddpm_hf.training.command_line import config_of, load_config
from ddpm_hf.training.config import ConfigError, as_yaml
from ddpm_hf.training.resolve import resolve


@pytest.fixture
def begin_run(tmp_path, monkeypatch):
    """Leave the files of a run with a checkpoint after two steps; the current folder holds the data set `flat`."""
    monkeypatch.chdir(tmp_path)
    for folder in ("flat", "classed/a", "classed/b"):
        Path(folder).mkdir(parents=True)
        for i in range(24):
            Image.new("L", (8, 8), 10 * i).save(f"{folder}/{i}.png")

    def begin(*argv, **changed):
        config = resolve(load_config([*argv, "--eval_every", "0"])[0])
        checkpoint = Path(config.output_dir, "checkpoints/0000002")
        checkpoint.mkdir(parents=True)
        values = {**yaml.safe_load(as_yaml(config)), **changed}
        for folder in (checkpoint.parents[1], checkpoint):
            (folder / "config.yaml").write_text(yaml.safe_dump(values))
        return config

    return begin


def again(*argv):
    return load_config([*argv, "--eval_every", "0"])[0]


@pytest.mark.parametrize("spelling", ["flat", "flat/", "./flat", "./flat//", "{}/flat/"])
@pytest.mark.parametrize("before", ["flat", "flat/", "./flat"])  # the last two as older versions stored them
def test_every_spelling_of_a_folder_is_the_same_data(begin_run, tmp_path, before, spelling):
    begin_run("--data", "flat/", data=before)
    config = again("--data", spelling.format(tmp_path), "--steps", "30")
    assert config.resolved and config.output_dir == "runs/flat"
    with pytest.raises(ConfigError, match="^data='classed', but runs/flat/checkpoints/0000002 was trained with "):
        again("--data", "classed/", "--output_dir", "runs/flat")


def test_paths_are_stored_in_one_spelling(begin_run, tmp_path):
    config = config_of(data="flat/", eval_data="./classed//")
    assert (config.data, config.eval_data) == ("flat", "classed")
    Path("digits").mkdir()
    assert [normal_name(name) for name in ("digits", "digits/", "./digits")] == ["digits", "./digits", "./digits"]
    assert normal_name("user/name/") == "user/name/"  # does not exist
    assert config_of(data="digits/").data == "./digits"


def test_a_pipeline_to_start_from_may_have_a_slash(begin_run, make_pipeline):
    make_pipeline(down_block_types=("DownBlock2D", "DownBlock2D")).save_pretrained("base")
    begin_run("--data", "flat", "--init_from", "base/", init_from="base/")
    assert again("--data", "flat", "--init_from", "./base", "--steps", "30").init_from == "base"


def test_other_classes(begin_run):
    begin_run("--data", "classed")
    with pytest.raises(ConfigError) as caught:
        again("--data", "classed", "--label_column", "null", "--steps", "2")
    assert str(caught.value) == (
        "label_column=null, but runs/classed was trained with 2 classes (label_column='label'); give another --output_dir"
    )
    shutil.rmtree("runs")
    begin_run("--data", "classed", "--label_column", "null")
    with pytest.raises(ConfigError, match="^label_column='label', but runs/classed was trained without classes; give"):
        again("--data", "classed", "--label_column", "label")


def test_minutes_for_a_run_of_steps(begin_run):
    begin_run("--data", "flat", "--steps", "20")
    with pytest.raises(ConfigError) as caught:
        again("--data", "flat", "--minutes", "1")
    assert str(caught.value) == (
        "minutes=1, but runs/flat was trained with steps=20; leave --minutes out, or give another --output_dir"
    )


@pytest.mark.parametrize(
    ("argv", "start"),
    [
        (["--minutes", "2"], "minutes=2, but runs/flat was trained with 0.5; "),
        (["--steps", "100"], "steps=100, but runs/flat was trained with minutes=0.5; "),
        ([], "minutes=null, but runs/flat was trained with 0.5; "),
    ],
)
def test_a_run_of_minutes_is_not_lengthened(begin_run, argv, start):
    """The message names no setting that nobody gave."""
    planned = dict(steps=40, lr_schedule="cosine", lr_warmup_steps=2, ema_decay=0.9)
    begin_run("--data", "flat", "--minutes", "0.5", **planned)
    assert again("--data", "flat", "--minutes", "0.5").steps == 40
    with pytest.raises(ConfigError) as caught:
        again("--data", "flat", *argv)
    assert str(caught.value) == (
        f"{start}a run planned by minutes cannot be lengthened: give --minutes 0.5 to resume it; to train longer start a "
        "new run from its weights: --init_from runs/flat/pipeline --output_dir <another>"
    )


def test_a_mistyped_key_is_named_before_runs_are_compared(begin_run):
    begin_run("--data", "flat")
    with pytest.raises(
        ConfigError, match="^unknown key 'unet.blok_out_channels'; did you mean 'block_out_channels'\\?$"
    ):
        again("--data", "flat", "--unet.blok_out_channels", "16,32")


def test_a_column_called_none(begin_run):
    with pytest.raises(ConfigError, match="label_column='none' is not in the data; .*; for no labels give null$"):
        resolve(again("--data", "classed", "--label_column", "none"))
