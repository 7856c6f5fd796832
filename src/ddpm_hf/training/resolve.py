"""Completes a config from the pipeline that a run starts from and from its data."""

import dataclasses
import inspect

from ddpm_hf.arguments import shown
from ddpm_hf.models.classifier import NoisyClassifier
from ddpm_hf.models.unet import DDPMUNet
from ddpm_hf.training.checks import check
from ddpm_hf.training.config import ClassifierConfig, ConfigError, RunConfig, nearest
from ddpm_hf.training.from_data import with_values_for_data
from ddpm_hf.training.from_pipeline import with_base_pipeline, with_guided_pipeline
from ddpm_hf.training.processes import process_class

NETWORK_CLASSES = {"unet": DDPMUNet, "classifier": NoisyClassifier}


def resolve(config: RunConfig) -> RunConfig:
    """Complete a config from its pipeline and its data, and check its sections.

    Raises:
        ConfigError: the pipeline or the data cannot be opened, the pipeline does not fit other keys, or the network or the
            process does not support a key or value.
    """
    config = _with_checked_keys(config, config.NETWORK, NETWORK_CLASSES[config.NETWORK])
    if not config.resolved:
        config = _resolve(config)
    check(config)
    return _with_checked_keys(config, "scheduler", process_class(config))


def _resolve(config):
    classes = None
    if config.base_pipeline:
        with_pipeline = with_guided_pipeline if isinstance(config, ClassifierConfig) else with_base_pipeline
        config, classes = with_pipeline(config)
    if config.preset is None:
        config = with_values_for_data(config, classes)
    config = dataclasses.replace(config, resolved=True)
    check(config)
    if isinstance(config, ClassifierConfig) and classes not in (None, config.classes):
        raise ConfigError(
            f"classifier.num_classes={config.classes}, but the network of {config.pipeline!r} has {classes} classes"
        )
    return config


def _with_checked_keys(config, section, cls):
    """Convert the values of a section to the types of its class. Raises ConfigError for an unknown key or invalid value."""
    keys, known = getattr(config, section), inspect.signature(cls).parameters
    for key in keys:
        if key not in known:
            raise ConfigError(f"unknown key {shown(f'{section}.{key}')}{nearest(key, known)}")
    return dataclasses.replace(config, **{section: cls.__init__.check(keys, f"{section}.")})
