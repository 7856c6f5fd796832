"""`train` as a notebook calls it."""

import dataclasses

import pytest

from ddpm_hf import DDPMImagePipeline
from ddpm_hf.training import train
from ddpm_hf.training.checks import check
from ddpm_hf.training.command_line import config_of, load_config
from ddpm_hf.training.config import ClassifierConfig, ConfigError, TrainConfig
from ddpm_hf.training.resolve import resolve

NETWORK = dict(block_out_channels=[8, 16], norm_num_groups=4, attention_head_dim=4)


def test_keys_are_those_of_the_command_line(tmp_path):
    folder = str(tmp_path / "run")
    keys = dict(config="mnist", steps=3, unet={"dropout": 0.2}, output_dir=folder)
    argv = ["--config", "mnist", "--steps", "3", "--unet.dropout", "0.2", "--output_dir", folder]
    assert config_of(**keys) == load_config(argv)[0]
    assert config_of(data="digits", output_dir=folder) == load_config(["--data", "digits", "--output_dir", folder])[0]
    assert config_of(ClassifierConfig, config="digits").preset == "digits"
    with pytest.raises(ConfigError, match="unknown key 'stepz'; did you mean 'steps'"):
        config_of(stepz=3)
    with pytest.raises(ConfigError, match="steps='many' must be an integer"):
        config_of(steps="many")


def test_train(tmp_path):
    keys = dict(batch_size=16, sample_every=0, eval_every=0, output_dir=str(tmp_path / "run"), unet=NETWORK)
    folder = train("digits", steps=1, lr_schedule="constant", **keys)
    assert folder == tmp_path / "run/pipeline" and DDPMImagePipeline.from_pretrained(folder)
    # the same call with more steps resumes; so does the config itself
    config = config_of(config="digits", steps=2, lr_schedule="constant", **keys)
    assert train(config) == folder
    with pytest.raises(TypeError, match="give a config or keys, not both: steps"):
        train(config, steps=3)


def test_a_config_is_resolved_once_and_never_changed():
    config, _ = load_config(["--data", "digits", "--steps", "10"])
    before = dataclasses.replace(config)
    resolved = resolve(config)
    assert config == before and not config.resolved and resolved.resolved and resolve(resolved) == resolved
    assert config.classes is None and resolved.classes == 10
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolved.steps = 11
    with pytest.raises(ConfigError, match="process='vq' is not known"):
        resolve(TrainConfig(process="vq"))
    with pytest.raises(ConfigError, match="steps='x' must be an integer"):
        check(TrainConfig(steps="x"))
