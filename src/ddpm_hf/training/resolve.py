"""Fills in what a config leaves open, from the pipeline that a run starts from and from its data."""

import contextlib
import dataclasses
import inspect
import itertools
import math
import os
import statistics
from pathlib import Path

import datasets
import numpy as np
import torch

from ddpm_hf.arguments import listed, shown, sides
from ddpm_hf.data.dataset import held_out_rows, image_column
from ddpm_hf.data.labels import label_names
from ddpm_hf.data.pixels import open_image
from ddpm_hf.data.sources import LEVELS, load_images
from ddpm_hf.files.guarded import naming
from ddpm_hf.models.classifier import NoisyClassifier
from ddpm_hf.models.unet import DDPMUNet
from ddpm_hf.pipelines.ddpm import DDPMImagePipeline
from ddpm_hf.schedulers.ddpm import FIXED_VARIANCES, VariationalDDPMScheduler
from ddpm_hf.training.checks import check
from ddpm_hf.training.config import ClassifierConfig, ConfigError, RunConfig, TrainConfig, image_size, nearest
from ddpm_hf.training.errors import PIPELINE_ERRORS, as_config_error
from ddpm_hf.training.low_resolution import in_channels
from ddpm_hf.training.messages import print_above_progress_bar
from ddpm_hf.training.processes import PROCESSES, process_class

IMAGES_LOOKED_AT = 100


MOST_COMMON_SIDE = 64  # larger images only where image_size asks for them


HELD_OUT = 0.05


# channels, batch size and learning rate for images up to a side. 32: CIFAR-10 of Ho et al. 2020, 64: ImageNet of Nichol and
# Dhariwal 2021, 256: CelebA-HQ of Ho et al.; the others are these with fewer levels or channels
NETWORKS = {
    8: ([32, 64], 128, 2e-4),
    16: ([64, 128, 128], 128, 2e-4),
    32: ([128, 256, 256, 256], 128, 2e-4),
    64: ([128, 256, 384, 512], 64, 1e-4),
    128: ([128, 128, 256, 256, 512], 32, 5e-5),
    256: ([128, 128, 256, 256, 512, 512], 16, 2e-5),
}


# keys of the process that change how it is sampled or measured, not what its network has learned
SAMPLING = {"clip_sample", "clip_sample_range", "thresholding", "dynamic_thresholding_ratio", "sample_max_value"}


SAMPLING |= {"timestep_spacing", "steps_offset", "levels"}


SAMPLING |= {"predictor", "corrector", "correct_steps", "snr", "sampling_eps"}


BETAS = {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"}


NETWORK_CLASSES = {"unet": DDPMUNet, "classifier": NoisyClassifier}


SDES = {"VPSDEScheduler": "vp", "ScoreSdeVpScheduler": "vp", "SubVPSDEScheduler": "subvp"}


SDES |= {"VESDEScheduler": "ve", "ScoreSdeVeScheduler": "ve"}


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
        follow_pipeline = _follow_guided if isinstance(config, ClassifierConfig) else _follow_pipeline
        config, classes = follow_pipeline(config)
    if config.preset is None:
        config = _follow_data(config, classes)
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


# a pipeline


def _process_of(path):
    """The name of a saved pipeline's process, its scheduler, and the keys that make it anew."""
    with naming(Path(path, "scheduler/scheduler_config.json")):
        return _process(VariationalDDPMScheduler.load_config(path, subfolder="scheduler"))


def _process(saved):
    name = str(saved.get("_class_name"))
    known = (*VariationalDDPMScheduler._compatibles, "VariationalDDPMScheduler", *SDES)
    if name not in known or name.startswith("EDM"):
        raise ValueError(f"its {shown(name)} is of no process that is trained here")
    process = SDES.get(name, "ddpm")
    scheduler = PROCESSES[process].from_config(saved)
    values = {**scheduler.config, **scheduler.config.get("_ddpm_hf", {})}
    known = inspect.signature(type(scheduler)).parameters
    return process, scheduler, {key: value for key, value in values.items() if key in known and value is not None}


def _network_of(path):
    """The network of a saved pipeline, without its weights."""
    with naming(Path(path, "unet/config.json")), torch.device("meta"):
        return DDPMUNet.from_config(DDPMUNet.load_config(path, subfolder="unet"))


def _follow_guided(config):
    """The config with the process, size, channels and pre-processing of the pipeline that is guided, and its classes."""
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
    """Names of the labels 0, 1, ... of the pipeline that a classifier guides; None where they are not known."""
    with as_config_error(f"pipeline={config.pipeline!r}", PIPELINE_ERRORS):
        return _network_of(config.pipeline).class_names


def _follow_pipeline(config):
    """The config with the process and the network of `init_from`, and the number of its classes."""
    subject = f"init_from={config.init_from!r}"
    with as_config_error(subject, PIPELINE_ERRORS), torch.device("cpu"):
        index = DDPMImagePipeline.load_config(config.init_from)
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
    keys = {
        key: _as_list(unet.config[key]) for key in inspect.signature(DDPMUNet).parameters if key not in config.DERIVED
    }
    keys["num_class_embeds"] = unet.num_classes
    for key, value in config.unet.items():
        if f"unet.{key}" in config.explicit:
            if key in keys.keys() - {"dropout"} and _as_list(value) != keys[key]:
                raise ConfigError(
                    f"unet.{key}={shown(value)}, but the network of {subject} has {shown(keys[key])}; leave it out"
                )
            keys[key] = value
    return keys


def check_class_names(config: TrainConfig, names: list[str] | None) -> None:
    """Raises ConfigError where a class of the pipeline `init_from` has another label in the data. New classes are allowed."""
    own = _network_of(config.init_from).class_names or []
    for label, name in enumerate(names or []):
        if name in own and own.index(name) != label:
            raise ConfigError(
                f"init_from={config.init_from!r}: its label {own.index(name)} is {shown(name)}, which is {label} in the data; "
                f"give data with the classes {listed(own)} in this order"
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
            raise ConfigError(f"{key}={shown(present)}, but {subject} has {shown(value)}; leave it out")
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
    known = inspect.signature(type(scheduler)).parameters
    applied |= {key: explicit.pop(key) for key in explicit.keys() - known.keys()}  # refused later
    betas = {key: explicit.pop(key) for key in BETAS & explicit.keys()} if hasattr(scheduler, "betas") else {}
    if betas:
        own = {key: value for key, value in keys.items() if key != "trained_betas"}
        other = type(scheduler)(**{**own, **betas}).betas
        if len(other) == len(scheduler.betas) and torch.allclose(other, scheduler.betas, rtol=1e-4):
            betas = {}  # the same betas, described in other words
    for key, value in {**explicit, **betas}.items():
        own = keys.get(key, known[key].default)
        if key in betas and "trained_betas" in keys:
            own = "betas of its own"
        if _as_list(value) != _as_list(own):
            raise ConfigError(
                f"scheduler.{key}={shown(value)}, but the network of {subject} was trained with {shown(own)}; leave it "
                "out: the process is the pipeline's"
            )
    return applied


# the data


def _follow_data(config, classes):
    """The config with what fits the data, for all keys that are not explicit; `classes` are those of the base pipeline."""
    section, explicit = config.NETWORK, config.explicit
    shape = {f"{section}.{key}" for key in ("block_out_channels", "down_block_types", "up_block_types")}
    open_keys = {"image_size", "channels", "label_column", "batch_size", "held_out"} - explicit
    open_keys -= {"image_size", "channels"} if config.base_pipeline else set()
    levels = LEVELS.get(config.data, 256)
    if "scheduler.levels" not in explicit and levels != 256 and not config.base_pipeline:
        config = dataclasses.replace(config, scheduler=config.scheduler | {"levels": levels})
    counts_classes = config.label_column and f"{section}.{config.CLASSES}" not in explicit and not config.base_pipeline
    if not open_keys and not counts_classes and shape <= explicit:
        return config
    with as_config_error(f"data={config.data!r}", PIPELINE_ERRORS):
        images = load_images(config.data, config.split, config.streaming)
        column = image_column(images, config.image_column)
        count = None if config.streaming else len(images)
        facts = [f"{count:,} images" if count is not None else "a stream"]
        if open_keys & {"image_size", "channels"}:
            config = _with_size_and_channels(config, images.select_columns([column]), open_keys, facts)
        if isinstance(config, ClassifierConfig) or not config.base_pipeline or classes:
            config = _with_labels(config, images, classes, facts)
    size = image_size(config)
    channels, batch_size, learning_rate = NETWORKS[min([side for side in NETWORKS if side >= max(size)], default=256)]
    if not shape <= explicit and (not config.base_pipeline or isinstance(config, ClassifierConfig)):
        keys = _network_for(size, channels, config.network, has_up_blocks=isinstance(config, TrainConfig))
        if getattr(config, "process", None) == "ve":  # its networks take sigma
            keys = {"time_embedding_type": "fourier", **keys}
        config = dataclasses.replace(config, **{section: keys})
    config = _with_held_out(config, count, facts)
    values = {}
    if "batch_size" not in explicit:
        trained = batch_size if count is None else count
        if config.held_out and count is not None:
            trained = len(held_out_rows(config.held_out, count)[1])
        values["batch_size"] = max(1, min(batch_size, trained))
    if "learning_rate" not in explicit:
        values["learning_rate"] = learning_rate
    if isinstance(config, TrainConfig) and "sample_steps" not in explicit:
        T = config.scheduler.get("num_train_timesteps", 1000)
        values["sample_steps"] = min(100, T) if isinstance(T, int) and T > 0 else 100
    if os.environ.get("RANK", "0") == "0":
        print_above_progress_bar(
            f"{config.program}: data={config.data!r}: {'; '.join(facts)}; --dry_run shows all of it"
        )
    return dataclasses.replace(config, **values)


def _with_size_and_channels(config, images, open_keys, facts):
    """The config with the size and the channels of a sample of the images."""
    (column,) = images.column_names
    rows = images.cast_column(column, datasets.Image(decode=False))
    if config.streaming:
        rows = itertools.islice(rows, IMAGES_LOOKED_AT)
    elif len(rows) > IMAGES_LOOKED_AT:
        rows = rows.select(sorted(np.random.default_rng(0).choice(len(rows), IMAGES_LOOKED_AT, replace=False)))
    shorter_sides, grey = [], True
    for row in rows:
        # a broken image is reported when the data is read
        with contextlib.suppress(Exception), open_image(**row[column]) as image:
            shorter_sides.append(min(image.size))
            grey = grey and ("channels" not in open_keys or _is_grey(image))
    if not shorter_sides:
        raise ValueError("no image could be read to see its size; give image_size and channels")
    values = {}
    if "image_size" in open_keys:
        side = statistics.median_low(shorter_sides)
        step = 4 if side < 32 else 8  # so that the network can halve it
        values["image_size"] = min(MOST_COMMON_SIDE, max(8, side // step * step))
        low, high = min(shorter_sides), max(shorter_sides)
        span = f"{side} pixels" if low == high else f"{side} pixels, {low} to {high}"
        facts.append(f"image_size={values['image_size']} (their shorter side is {span})")
    if "channels" in open_keys:
        values["channels"] = 1 if grey else 3
        facts.append(f"channels={values['channels']} ({'all are grey' if grey else 'there are colors'})")
    return dataclasses.replace(config, **values)


def _is_grey(image):
    if image.mode in ("1", "L", "LA", "La", "I", "F") or image.mode.startswith("I;16"):
        return True
    image.draft("RGB", (128, 128))  # decodes a small version of a JPEG
    pixels = np.asarray(image.convert("RGBA"))
    colors = pixels[pixels[..., 3] > 0][:, :3]  # transparent pixels show the background
    return bool((colors == colors[:, :1]).all())


def _with_labels(config, images, classes, facts):
    """The config with the column of labels, where there is one, and the number of classes."""
    section, column, is_explicit = config.NETWORK, config.label_column, "label_column" in config.explicit
    if not is_explicit:
        features = images.features
        columns = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        if not columns and getattr(features.get("label"), "dtype", "").startswith("int"):
            columns = ["label"]
        column = columns[0] if len(columns) == 1 else None
    config = dataclasses.replace(config, label_column=column)
    if column is None or column not in images.column_names:
        return config
    if f"{section}.{config.CLASSES}" not in config.explicit and not (classes and section == "unet"):
        names = label_names(images, column)
        number = names and len(names)
        if number is None and is_explicit:
            raise ValueError(
                f"label_column={column!r}: the labels of a stream cannot be counted; give {section}.{config.CLASSES}"
            )
        if (number is None or number < 2) and not is_explicit:  # a single class is no condition
            return dataclasses.replace(config, label_column=None)
        config = dataclasses.replace(config, **{section: config.network | {config.CLASSES: number}})
    facts.append(f"label_column={column!r} with {config.classes or classes} classes")
    return config


def _network_for(size, channels, keys, has_up_blocks):
    """The keys of a network for images of a size, beside those given: one head of attention at 16 pixels, as Ho et al."""
    given_channels = keys.get("block_out_channels")
    channels = given_channels or channels
    if not isinstance(channels, (list, tuple)) or not all(isinstance(count, int) for count in channels):
        return keys  # refused by the checks that follow
    while given_channels is None and len(channels) > 2 and any(side % 2 ** (len(channels) - 1) for side in size):
        channels = channels[:-1]
    attends = [8 < max(size) // 2**level <= 16 for level in range(len(channels))]
    attends[-1] |= not any(attends)
    down = keys.get("down_block_types") or ["AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends]
    network = {"block_out_channels": list(channels), "down_block_types": down}
    if has_up_blocks:
        up = [name.replace("Downsample", "Upsample").replace("Down", "Up") for name in reversed(down)]
        network |= {"up_block_types": up, "attention_head_dim": None, "dropout": 0.1}
    else:
        network |= {"layers_per_block": 2, "attention_head_dim": 32}
    return {**network, "norm_num_groups": math.gcd(32, *channels), **keys}


def _with_held_out(config, count, facts):
    """The config with held-out measurements, and a share of the images for them where the data has no split of its own."""
    is_decided = bool({"held_out", "eval_data", "eval_split"} & config.explicit)
    is_off = config.eval_every == 0 and "eval_every" in config.explicit
    if is_decided or is_off or getattr(config, "low_resolution", None):
        return config
    try:
        load_images(config.data, config.eval_split, config.streaming)
    except (ValueError, OSError):
        if config.streaming or not count or count * HELD_OUT < 1:
            return config
        config = dataclasses.replace(config, held_out=HELD_OUT)
        facts.append(
            f"held_out={HELD_OUT:g}, {round(count * HELD_OUT):,} images, as there is no split {config.eval_split!r}"
        )
    if "eval_every" not in config.explicit and config.steps >= 1000:
        config = dataclasses.replace(config, eval_every=1000)
    return config
