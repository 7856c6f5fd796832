"""Completes a config from the pipeline that a run starts from and from its data."""

import dataclasses
import inspect
from pathlib import Path

import torch

from ddpm_hf.arguments import shown
from ddpm_hf.models.classifier import NoisyClassifier
from ddpm_hf.models.unet import DDPMUNet
from ddpm_hf.training.checks import check
from ddpm_hf.training.config import (
    ClassifierConfig,
    ConfigError,
    RunConfig,
    keys_of,
    nearest,
    null_for_none,
    sections_of,
)
from ddpm_hf.training.from_data import with_values_for_data
from ddpm_hf.training.from_pipeline import with_base_pipeline, with_guided_pipeline
from ddpm_hf.training.inputs import pixels_by
from ddpm_hf.training.messages import print_above_progress_bar
from ddpm_hf.training.optimizer import check_schedule
from ddpm_hf.training.processes import make_scheduler, process_class
from ddpm_hf.training.rank import is_main_process
from ddpm_hf.training.resume import PLANNED, find_checkpoint, flat
from ddpm_hf.training.sections import as_argument
from ddpm_hf.training.trackers import check_trackers

NETWORK_CLASSES = {"unet": DDPMUNet, "classifier": NoisyClassifier}


def resolve(config: RunConfig) -> RunConfig:
    """Complete a config from its pipeline and its data, and check its sections.

    Raises:
        ConfigError: the pipeline or the data cannot be opened, the pipeline does not fit other keys, or the network or the
            process does not support a key or value.
    """
    config = _with_checked_keys(config, config.NETWORK, NETWORK_CLASSES[config.NETWORK])
    if not config.resolved:
        _check_before_data(config)
        config = _resolve(config)
    check(config)
    return _with_checked_keys(config, "scheduler", process_class(config))


def _check_before_data(config):
    """Raise an error for values that can be checked before the data and the pipeline are looked at."""
    check_schedule(config)
    check_trackers(config.trackers)
    pixels_by(config)
    if not config.base_pipeline:
        with torch.device("cpu"):
            make_scheduler(_with_checked_keys(config, "scheduler", process_class(config)))


def _resolve(config):
    classes = None
    if config.base_pipeline:
        with_pipeline = with_guided_pipeline if isinstance(config, ClassifierConfig) else with_base_pipeline
        config, classes = with_pipeline(config)
    if config.preset is None:
        config, facts = with_values_for_data(config, classes)
        config = dataclasses.replace(config, facts=tuple(facts))
    config = dataclasses.replace(config, resolved=True)
    check(config)
    if isinstance(config, ClassifierConfig) and classes not in (None, config.classes):
        raise ConfigError(
            f"classifier.num_classes={config.classes}, but the network of {config.pipeline!r} has {classes} classes"
        )
    return config


def show_settings_of_run(config: RunConfig) -> None:
    """Print the values that a resumed run keeps although the same command would choose others for a new run."""
    if not is_main_process():
        return
    checkpoint = find_checkpoint(config)
    # from a preset, a pipeline or Python every value is given; a stream is not read twice
    is_chosen = "data" in config.explicit and not (config.preset or config.base_pipeline or config.streaming)
    if not checkpoint or not is_chosen:
        return
    fresh = {}
    for field in keys_of(config):
        key = field.name
        if field.metadata["from_data"] and key not in config.explicit | {"output_dir"}:
            fresh[key] = getattr(type(config)(), key)
            if key in sections_of(config):
                section = getattr(config, key)
                fresh[key] = {name: section[name] for name in section if f"{key}.{name}" in config.explicit}
    try:
        chosen, _ = with_values_for_data(dataclasses.replace(config, **fresh), None)
    except ConfigError:  # the run says so when it opens the data
        return
    kept = [key for key in fresh if not (config.planned and key in PLANNED)]
    of_run, of_command = (flat({key: getattr(source, key) for key in kept}, config) for source in (config, chosen))
    differences = [
        f"{key}={as_argument(value)} (a new run: {as_argument(of_command.get(key))})"
        for key, value in of_run.items()
        if value != of_command.get(key)
    ]
    if differences:
        folder = checkpoint.parents[1] if checkpoint.parent.name == "checkpoints" else checkpoint
        print_above_progress_bar(
            f"{config.program}: settings from {Path(folder, 'config.yaml')}: {', '.join(differences)}"
        )


def _with_checked_keys(config, section, cls):
    """Convert the values of a section to the types of its class. Raises ConfigError for an unknown key or invalid value."""
    keys, parameters = getattr(config, section), inspect.signature(cls).parameters
    for key in keys:
        if key not in parameters:
            raise ConfigError(f"unknown key {shown(f'{section}.{key}')}{nearest(key, parameters)}")
    try:
        return dataclasses.replace(config, **{section: cls.__init__.check(keys, f"{section}.")})
    except ValueError as error:
        raise ConfigError(null_for_none(str(error))) from None
