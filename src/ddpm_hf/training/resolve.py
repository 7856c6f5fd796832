"""Fills in what a config leaves open, from the pipeline that a run starts from and from its data."""

import dataclasses
import inspect

from ddpm_hf.arguments import shown
from ddpm_hf.models.classifier import NoisyClassifier
from ddpm_hf.models.unet import DDPMUNet
from ddpm_hf.training.checks import check
from ddpm_hf.training.config import ClassifierConfig, ConfigError, RunConfig, nearest
from ddpm_hf.training.from_data import follow_data
from ddpm_hf.training.from_pipeline import follow_base_pipeline, follow_guided_pipeline
from ddpm_hf.training.processes import process_class

NETWORK_CLASSES = {"unet": DDPMUNet, "classifier": NoisyClassifier}


def resolve(config: RunConfig) -> RunConfig:
    """Return the config with every value that it leaves to a pipeline or to the data, and with its sections checked.

    Raises:
        ConfigError: a pipeline that cannot be opened or does not fit the other keys; data that cannot be opened; a key or value
            that the network or the process does not take.
    """
    config = _with_checked_keys(config, config.NETWORK, NETWORK_CLASSES[config.NETWORK])
    if not config.resolved:
        config = _resolve(config)
    check(config)
    return _with_checked_keys(config, "scheduler", process_class(config))


def _resolve(config):
    classes = None
    if config.base_pipeline:
        follow = follow_guided_pipeline if isinstance(config, ClassifierConfig) else follow_base_pipeline
        config, classes = follow(config)
    if config.preset is None:
        config = follow_data(config, classes)
    config = dataclasses.replace(config, resolved=True)
    check(config)
    if isinstance(config, ClassifierConfig) and classes not in (None, config.classes):
        raise ConfigError(
            f"classifier.num_classes={config.classes}, but the network of {config.pipeline!r} has {classes} classes"
        )
    return config


def _with_checked_keys(config, section, cls):
    """The config with the keys of a section in the types that its class takes; ConfigError for any other key or value."""
    keys, known = getattr(config, section), inspect.signature(cls).parameters
    for key in keys:
        if key not in known:
            raise ConfigError(f"unknown key {shown(f'{section}.{key}')}{nearest(key, known)}")
    return dataclasses.replace(config, **{section: cls.__init__.check(keys, f"{section}.")})
