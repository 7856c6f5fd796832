"""Values that a config takes from the saved pipeline that a run starts from: process, network, sizes."""

import dataclasses
import inspect
from pathlib import Path

import torch

from ddpm_hf.arguments import listed, shown, sides
from ddpm_hf.data.sources import LEVELS
from ddpm_hf.files.guarded import naming
from ddpm_hf.hub.saved import class_of_part
from ddpm_hf.models.unet import DDPMUNet
from ddpm_hf.pipelines.ddpm import DDPMImagePipeline
from ddpm_hf.schedulers.ddpm import FIXED_VARIANCES, VariationalDDPMScheduler
from ddpm_hf.training.config import ClassifierConfig, ConfigError, TrainConfig, shown_value
from ddpm_hf.training.errors import PIPELINE_ERRORS, as_config_error
from ddpm_hf.training.low_resolution import in_channels
from ddpm_hf.training.processes import PROCESSES

# keys of the process that change how it is sampled or measured, not what its network has learned
SAMPLING = {
    *("clip_sample", "clip_sample_range", "thresholding", "dynamic_thresholding_ratio", "sample_max_value"),
    *("timestep_spacing", "steps_offset", "levels"),
    *("predictor", "corrector", "correct_steps", "snr", "sampling_eps"),
}
BETAS = {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"}


def _process_of(path):
    """The name of a saved pipeline's process, its scheduler, and its keys."""
    with naming(Path(path, "scheduler/scheduler_config.json")):
        return _process(VariationalDDPMScheduler.load_config(path, subfolder="scheduler"))


def _process(saved):
    name = str(saved.get("_class_name"))
    cls = class_of_part("scheduler", name)
    compatible_names = {compatible.__name__ for compatible in VariationalDDPMScheduler().compatibles}
    if cls is None and name in compatible_names and not name.startswith("EDM"):
        cls = VariationalDDPMScheduler
    process = next((process for process, its_class in PROCESSES.items() if its_class is cls), None)
    if process is None:
        raise ValueError(f"its {shown(name)} is not the scheduler of a process that can be trained")
    scheduler = cls.from_config(saved)
    if getattr(scheduler, "variance_type", None) == "analytic":  # it is computed after training
        scheduler = cls.from_config(saved, variance_type="fixed_small")
    values = {**scheduler.config, **scheduler.config.get("_ddpm_hf", {}), "x_start_mse": None, "timestep_lists": None}
    parameters = inspect.signature(type(scheduler)).parameters
    return process, scheduler, {key: value for key, value in values.items() if key in parameters and value is not None}


def _network_of(path):
    """The network of a saved pipeline, without its weights."""
    with naming(Path(path, "unet/config.json")), torch.device("meta"):
        return DDPMUNet.from_config(DDPMUNet.load_config(path, subfolder="unet"))


def with_guided_pipeline(config: ClassifierConfig) -> tuple[ClassifierConfig, int | None]:
    """Return the config with the process, image size, channels and preprocessing of the guided pipeline, and its classes."""
    subject = f"pipeline={config.pipeline!r}"
    with as_config_error(subject, PIPELINE_ERRORS), torch.device("cpu"):
        process, scheduler, keys = _process_of(config.pipeline)
        if process != "ddpm":
            raise ValueError(
                f"its {type(scheduler).__name__} is in continuous time; classifiers need discrete timesteps"
            )
        unet = _network_of(config.pipeline)
    config = dataclasses.replace(config, scheduler=keys | _sampling_keys(config, subject, scheduler, keys))
    values = {"channels": unet.config.in_channels}
    if unet.config.sample_size is not None:
        values["image_size"] = unet.config.sample_size
    values |= {key: unet.preprocessing[key] for key in ("background", "crop") if key in unet.preprocessing}
    return _with_values_of(config, subject, values), unet.num_classes


def guided_class_names(config: ClassifierConfig) -> list[str] | None:
    """The class names of the pipeline that a classifier guides, or None."""
    with as_config_error(f"pipeline={config.pipeline!r}", PIPELINE_ERRORS):
        return _network_of(config.pipeline).class_names


def with_base_pipeline(config: TrainConfig) -> tuple[TrainConfig, int | None]:
    """Return the config with the process and the network of `init_from`, and its number of classes."""
    subject = f"init_from={config.init_from!r}"
    with as_config_error(subject, PIPELINE_ERRORS), torch.device("cpu"):
        index = DDPMImagePipeline.load_config(config.init_from)  # type: ignore[arg-type]
        process, scheduler, keys = _process_of(config.init_from)
        unet = _network_of(config.init_from)
    if not keys.get("centered", True):
        raise ConfigError(f"{subject}: its network is for images in [0, 1]; here images are trained in [-1, 1]")
    config = _with_values_of(config, subject, {"process": process})
    config = dataclasses.replace(config, scheduler=keys | _sampling_keys(config, subject, scheduler, keys))
    learned = scheduler.learns_variance
    values = {
        "low_resolution": index.get("low_resolution"),
        "conditioning_noise": index.get("conditioning_noise") or 0.0,
        "channels": unet.config.out_channels // (1 + learned),
    }
    config = _with_values_of(config, subject, values)
    if unet.config.in_channels != in_channels(config):
        raise ConfigError(
            f"{subject}: its network has in_channels {unet.config.in_channels}, not {in_channels(config)}"
        )
    if unet.num_classes is None and "label_column" not in config.explicit:
        config = dataclasses.replace(config, label_column=None)
    if unet.config.sample_size is not None and "image_size" not in config.explicit:  # other sizes are allowed
        config = dataclasses.replace(config, image_size=_as_list(unet.config.sample_size))
    if "loss" not in config.explicit and config.loss == ("simple" if learned else "hybrid"):
        config = dataclasses.replace(config, loss="hybrid" if learned else "simple")  # simple trains no variance
    drops_labels = unet.null_class is not None
    if not drops_labels and "label_dropout" not in config.explicit:
        config = dataclasses.replace(config, label_dropout=0.0)
    if drops_labels != (config.label_dropout > 0):
        raise ConfigError(
            f"{subject}: its network was trained with{'' if drops_labels else 'out'} label dropout; "
            f"give {'a share above 0' if drops_labels else '0'} as label_dropout"
        )
    return dataclasses.replace(config, unet=_network_keys(config, subject, unet)), unet.num_classes


def _network_keys(config, subject, unet):
    """The keys of the pipeline's network, which explicit keys must agree with; only dropout may differ."""
    keys = {key: _as_list(value) for key, value in unet.arguments.items() if key not in config.DERIVED}
    keys["num_class_embeds"] = unet.num_classes
    for key, value in config.unet.items():
        if f"unet.{key}" in config.explicit:
            if key in keys.keys() - {"dropout"} and _as_list(value) != keys[key]:
                raise ConfigError(
                    f"unet.{key}={shown_value(value)}, but the network of {subject} has {shown_value(keys[key])}; leave it out"
                )
            keys[key] = value
    return keys


def check_class_names(config: TrainConfig, names: list[str] | None) -> None:
    """Raise ConfigError where a class of the pipeline `init_from` has another label in the data; new classes are allowed."""
    class_names = _network_of(config.init_from).class_names or []
    for label, name in enumerate(names or []):
        if name in class_names and class_names.index(name) != label:
            raise ConfigError(
                f"init_from={config.init_from!r}: its label {class_names.index(name)} is {shown(name)}, which is "
                f"{label} in the data; give data with the classes {listed(class_names)} in this order"
            )


def _with_values_of(config, subject, values):
    """The config with values of a pipeline; an explicit key with another value is an error."""
    for key, value in values.items():
        present, value = getattr(config, key), _as_list(value)
        if key not in config.explicit:
            config = dataclasses.replace(config, **{key: value})
        elif present != value and not (
            present and value and key in ("image_size", "low_resolution") and sides(present) == sides(value)
        ):
            raise ConfigError(f"{key}={shown_value(present)}, but {subject} has {shown_value(value)}; leave it out")
    return config


def _as_list(value):
    """A tuple as the list that YAML has."""
    return list(value) if isinstance(value, (list, tuple)) else value


def _sampling_keys(config, subject, scheduler, keys):
    """The explicit keys of the process that may differ from the pipeline's; the others must be the same."""
    explicit = {key: value for key, value in config.scheduler.items() if f"scheduler.{key}" in config.explicit}
    applied = {key: explicit.pop(key) for key in SAMPLING & explicit.keys()}
    if all(values.get("variance_type") in FIXED_VARIANCES for values in (keys, explicit)):
        applied["variance_type"] = explicit.pop("variance_type")
    if LEVELS.get(config.data) and "levels" not in applied:
        applied["levels"] = LEVELS[config.data]
    parameters = inspect.signature(type(scheduler)).parameters
    applied |= {key: explicit.pop(key) for key in explicit.keys() - parameters.keys()}  # refused later
    betas = {key: explicit.pop(key) for key in BETAS & explicit.keys()} if hasattr(scheduler, "betas") else {}
    if keys.get("beta_schedule") == "learned":  # which no formula gives
        betas = {key: value for key, value in betas.items() if value != keys.get(key, parameters[key].default)}
    elif betas and betas.get("beta_schedule") != "learned":
        schedule = {key: value for key, value in keys.items() if key != "trained_betas"}
        explicit_betas = type(scheduler)(**{**schedule, **betas}).betas
        if len(explicit_betas) == len(scheduler.betas) and torch.allclose(explicit_betas, scheduler.betas, rtol=1e-4):
            betas = {}  # the same betas, described in other words
    for key, value in {**explicit, **betas}.items():
        trained = keys.get(key, parameters[key].default)
        if key in betas and "trained_betas" in keys:
            trained = "betas of its own"
        if _as_list(value) != _as_list(trained):
            raise ConfigError(
                f"scheduler.{key}={shown_value(value)}, but the network of {subject} was trained with "
                f"{shown_value(trained)}; leave it out: the process is the pipeline's"
            )
    return applied
