"""What a config leaves open: the process and the network of a pipeline that the run begins with, and what fits its data."""

import contextlib
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
from ddpm_hf.models.unet import DDPMUNet
from ddpm_hf.pipelines.ddpm import DDPMImagePipeline
from ddpm_hf.schedulers.ddpm import FIXED_VARIANCES, VariationalDDPMScheduler
from ddpm_hf.training.config import ClassifierConfig, ConfigError, RunConfig, TrainConfig, check, image_size
from ddpm_hf.training.devices import PROCESSES, opening
from ddpm_hf.training.interrupts import tell
from ddpm_hf.training.stages import in_channels

PICTURES = 100  # that are looked at


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


SDES = {"VPSDEScheduler": "vp", "ScoreSdeVpScheduler": "vp", "SubVPSDEScheduler": "subvp"}


SDES |= {"VESDEScheduler": "ve", "ScoreSdeVeScheduler": "ve"}


def resolve(config: RunConfig) -> None:
    """Gives the config all that it leaves open, and checks it; at its second call it does nothing.

    Raises:
        ConfigError: a pipeline that cannot be opened or does not fit what is asked for; data that cannot be opened.
    """
    if config.resolved:
        return
    if isinstance(config, ClassifierConfig):
        classes = _follow_guided(config) if config.pipeline else None
    else:
        classes = _follow_pipeline(config) if config.init_from else None
    if config.preset is None:
        _follow_data(config, classes)
    config.resolved = True
    check(config)
    if isinstance(config, ClassifierConfig) and classes not in (None, config.classes):
        raise ConfigError(
            f"classifier.num_classes={config.classes}, but the network of {config.pipeline!r} has {classes} classes"
        )


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
    """The process, size, channels and pre-processing of the pipeline that a classifier guides; returns its classes."""
    where = f"pipeline={config.pipeline!r}"
    with opening(where), torch.device("cpu"):
        process, scheduler, keys = _process_of(config.pipeline)
        if process != "ddpm":
            name = type(scheduler).__name__
            raise ValueError(f"its {name} is in continuous time; classifiers are of discrete timesteps")
        unet = _network_of(config.pipeline)
    config.scheduler = {**keys, **_asked(config, where, scheduler, keys)}
    if unet.config.sample_size is not None:
        _follow(config, where, "image_size", unet.config.sample_size)
    _follow(config, where, "channels", unet.config.in_channels)
    for key in {"background", "crop"} & unet.preprocessing.keys():
        _follow(config, where, key, unet.preprocessing[key])
    return unet.num_classes


def guided_class_names(config: ClassifierConfig) -> list[str] | None:
    """Names of the labels 0, 1, ... of the pipeline that a classifier guides; None where they are not known."""
    with opening(f"pipeline={config.pipeline!r}"):
        return _network_of(config.pipeline).class_names


def _follow_pipeline(config):
    """The process and the network of `init_from`, with what was asked for beside; returns its number of classes."""
    where = f"init_from={config.init_from!r}"
    with opening(where), torch.device("cpu"):
        index = DDPMImagePipeline.load_config(config.init_from)
        process, scheduler, keys = _process_of(config.init_from)
        unet = _network_of(config.init_from)
    if not keys.get("centered", True):
        raise ConfigError(f"{where}: its network is of images in [0, 1]; images are trained in [-1, 1] here")
    _follow(config, where, "process", process)
    config.scheduler = {**keys, **_asked(config, where, scheduler, keys)}
    learned = scheduler.learns_variance
    _follow(config, where, "low_resolution", index.get("low_resolution"))
    _follow(config, where, "conditioning_noise", index.get("conditioning_noise") or 0.0)
    _follow(config, where, "channels", unet.config.out_channels // (1 + learned))
    if unet.config.in_channels != in_channels(config):
        raise ConfigError(f"{where}: its network has in_channels {unet.config.in_channels}, not {in_channels(config)}")
    if unet.config.sample_size is not None and "image_size" not in config.explicit:  # other sizes do
        config.image_size = _plain(unet.config.sample_size)
    if "loss" not in config.explicit and config.loss == ("simple" if learned else "hybrid"):
        config.loss = "hybrid" if learned else "simple"  # simple leaves the learned variance untrained
    if unet.num_classes is None and "label_column" not in config.explicit:
        config.label_column = None
    dropped = unet.null_class is not None
    if not dropped and "label_dropout" not in config.explicit:
        config.label_dropout = 0.0
    if dropped != (config.label_dropout > 0):
        raise ConfigError(
            f"{where}: its network was trained with{'' if dropped else 'out'} label dropout; "
            f"give {'a share above 0' if dropped else '0'} as label_dropout"
        )
    network = {key: unet.config[key] for key in inspect.signature(DDPMUNet).parameters}
    network = {key: _plain(value) for key, value in network.items() if key not in config.DERIVED}
    network["num_class_embeds"] = unet.num_classes
    for key, value in config.unet.items():
        if f"unet.{key}" in config.explicit:
            if key in network.keys() - {"dropout"} and _plain(value) != network[key]:
                raise ConfigError(
                    f"unet.{key}={shown(value)}, but the network of {where} has {shown(network[key])}; leave it out"
                )
            network[key] = value
    config.unet = network
    return unet.num_classes


def check_class_names(config: TrainConfig, names: list[str] | None) -> None:
    """Raises ConfigError where a class of the pipeline `init_from` has another label in the data. New classes are allowed."""
    own = _network_of(config.init_from).class_names or []
    for label, name in enumerate(names or []):
        if name in own and own.index(name) != label:
            raise ConfigError(
                f"init_from={config.init_from!r}: its label {own.index(name)} is {shown(name)}, which is {label} in the data; "
                f"give data with the classes {listed(own)} in this order"
            )


def _follow(config, where, key, value):
    """The pipeline's value of a key; another one that was asked for is refused."""
    asked, value = getattr(config, key), _plain(value)
    if key not in config.explicit:
        setattr(config, key, value)
    elif asked != value and not (
        asked and value and key in ("image_size", "low_resolution") and sides(asked) == sides(value)
    ):
        raise ConfigError(f"{key}={shown(asked)}, but {where} has {shown(value)}; leave it out")


def _plain(value):
    """As YAML has it."""
    return list(value) if isinstance(value, (list, tuple)) else value


def _asked(config, where, scheduler, keys):
    """The keys of the process that were asked for and may be other than the pipeline's; the rest must be the same."""
    asked = {key: value for key, value in config.scheduler.items() if f"scheduler.{key}" in config.explicit}
    applied = {key: asked.pop(key) for key in SAMPLING & asked.keys()}
    if all(values.get("variance_type") in FIXED_VARIANCES for values in (keys, asked)):
        applied["variance_type"] = asked.pop("variance_type")
    if LEVELS.get(config.data) and "levels" not in applied:
        applied["levels"] = LEVELS[config.data]
    known = inspect.signature(type(scheduler)).parameters
    applied |= {key: asked.pop(key) for key in asked.keys() - known.keys()}  # check_keys will refuse them
    betas = {key: asked.pop(key) for key in BETAS & asked.keys()} if hasattr(scheduler, "betas") else {}
    if betas:
        own = {key: value for key, value in keys.items() if key != "trained_betas"}
        other = type(scheduler)(**{**own, **betas}).betas
        if len(other) == len(scheduler.betas) and torch.allclose(other, scheduler.betas, rtol=1e-4):
            betas = {}  # the same, said in other words
    for key, value in {**asked, **betas}.items():
        own = keys.get(key, known[key].default)
        if key in betas and "trained_betas" in keys:
            own = "betas of its own"
        if _plain(value) != _plain(own):
            raise ConfigError(
                f"scheduler.{key}={shown(value)}, but the network of {where} was trained with {shown(own)}; leave it out: the "
                "process is the pipeline's"
            )
    return applied


# the data


def _follow_data(config, classes):
    """What fits the data, of all that is not given; `classes`: of the pipeline that the run begins with."""
    part, explicit = config.NETWORK, config.explicit
    begins = bool(config.begins_with)
    shape = [f"{part}.{key}" for key in ("block_out_channels", "down_block_types", "up_block_types")]
    wanted = {"image_size", "channels", "label_column", "batch_size", "held_out"} - explicit
    wanted -= {"image_size", "channels"} if begins else set()
    if "scheduler.levels" not in explicit and LEVELS.get(config.data, 256) != 256 and not begins:
        config.scheduler = {**config.scheduler, "levels": LEVELS[config.data]}
    needs_count = config.label_column and f"{part}.{config.CLASSES}" not in explicit and not begins
    if not wanted and not needs_count and set(shape) <= explicit:
        return
    with opening(f"data={config.data!r}"):
        images = load_images(config.data, config.split, config.streaming)
        column = image_column(images, config.image_column)
        count = None if config.streaming else len(images)
        found = [f"{count:,} images" if count is not None else "a stream"]
        if wanted & {"image_size", "channels"}:
            found += _look(config, images, column, wanted)
        if isinstance(config, ClassifierConfig) or not begins or classes:
            found += _find_labels(config, images, classes)
    size = image_size(config)
    channels, batch_size, learning_rate = NETWORKS[min([side for side in NETWORKS if side >= max(size)], default=256)]
    network = getattr(config, part)
    if not set(shape) <= explicit and (not begins or isinstance(config, ClassifierConfig)):
        setattr(config, part, _network_for(size, channels, network, isinstance(config, TrainConfig)))
        if getattr(config, "process", None) == "ve":  # of which networks are given sigma
            config.unet = {"time_embedding_type": "fourier", **config.unet}
    found += _hold_out(config, count)
    if "batch_size" not in explicit:
        rows = held_out_rows(config.held_out, count)[1] if config.held_out and count is not None else None
        trained = batch_size if count is None else count if rows is None else len(rows)
        config.batch_size = max(1, min(batch_size, trained))
    if "learning_rate" not in explicit:
        config.learning_rate = learning_rate
    if isinstance(config, TrainConfig) and "sample_steps" not in explicit:
        T = config.scheduler.get("num_train_timesteps", 1000)
        config.sample_steps = min(100, T) if isinstance(T, int) and T > 0 else 100
    if os.environ.get("RANK", "0") == "0":
        tell(f"{config.PROGRAM}: data={config.data!r}: {'; '.join(found)}; --dry_run shows all of it")


def _look(config, images, column, wanted):
    """Size and channels, by a sample of the pictures."""
    rows = images.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    if config.streaming:
        rows = itertools.islice(rows, PICTURES)
    elif len(rows) > PICTURES:
        rows = rows.select(sorted(np.random.default_rng(0).choice(len(rows), PICTURES, replace=False)))
    shorter, grey = [], True
    for row in rows:
        # reading the data says which are broken
        with contextlib.suppress(Exception), open_image(**row[column]) as image:
            shorter.append(min(image.size))
            grey = grey and ("channels" not in wanted or _is_grey(image))
    if not shorter:
        raise ValueError("no image could be read to see its size; give image_size and channels")
    found = []
    if "image_size" in wanted:
        side = statistics.median_low(shorter)
        step = 4 if side < 32 else 8  # so that the network can halve them
        config.image_size = min(MOST_COMMON_SIDE, max(8, side // step * step))
        span = f"{side} pixels" if min(shorter) == max(shorter) else f"{side} pixels, {min(shorter)} to {max(shorter)}"
        found.append(f"image_size={config.image_size} (their shorter side is {span})")
    if "channels" in wanted:
        config.channels = 1 if grey else 3
        found.append(f"channels={config.channels} ({'all are grey' if grey else 'there are colors'})")
    return found


def _is_grey(image):
    if image.mode in ("1", "L", "LA", "La", "I", "F") or image.mode.startswith("I;16"):
        return True
    image.draft("RGB", (128, 128))  # of a JPEG a small version is decoded
    pixels = np.asarray(image.convert("RGBA"))
    colors = pixels[pixels[..., 3] > 0][:, :3]  # what is transparent shows the background
    return bool((colors == colors[:, :1]).all())


def _find_labels(config, images, classes):
    """The column of labels, where there is one, and how many classes there are."""
    part, found = config.NETWORK, []
    if "label_column" not in config.explicit:
        kinds = images.features
        columns = [name for name, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)]
        if not columns and getattr(kinds.get("label"), "dtype", "").startswith("int"):
            columns = ["label"]
        config.label_column = columns[0] if len(columns) == 1 else None
    column = config.label_column
    if column is None or column not in images.column_names:
        return found
    if f"{part}.{config.CLASSES}" not in config.explicit and not (classes and config.NETWORK == "unet"):
        names = label_names(images, column)
        number = names and len(names)
        if number is None and "label_column" in config.explicit:
            raise ValueError(
                f"label_column={column!r}: the labels of a stream cannot be counted; give {part}.{config.CLASSES}"
            )
        if number is None or number < 2:  # one class is none
            config.label_column = column if "label_column" in config.explicit else None
        if config.label_column:
            setattr(config, part, {**getattr(config, part), config.CLASSES: number})
    if config.label_column:
        found.append(f"label_column={column!r} with {config.classes or classes} classes")
    return found


def _network_for(size, channels, given, up):
    """The keys of a network for images of a size, beside those given: one head of attention at 16 pixels, as Ho et al."""
    given_channels = given.get("block_out_channels")
    channels = given_channels or channels
    if not isinstance(channels, (list, tuple)) or not all(isinstance(each, int) for each in channels):
        return given  # checked later
    while given_channels is None and len(channels) > 2 and any(side % 2 ** (len(channels) - 1) for side in size):
        channels = channels[:-1]
    attends = [8 < max(size) // 2**level <= 16 for level in range(len(channels))]
    attends[-1] |= not any(attends)
    down = given.get("down_block_types") or ["AttnDownBlock2D" if each else "DownBlock2D" for each in attends]
    network = {"block_out_channels": list(channels), "down_block_types": down}
    if up:
        swapped = [name.replace("Downsample", "Upsample").replace("Down", "Up") for name in reversed(down)]
        network |= {"up_block_types": swapped, "attention_head_dim": None, "dropout": 0.1}
    else:
        network |= {"layers_per_block": 2, "attention_head_dim": 32}
    return {**network, "norm_num_groups": math.gcd(32, *channels), **given}


def _hold_out(config, count):
    """A share of the images for held-out measurements, where the data has no split for them."""
    fields = {"held_out", "eval_data", "eval_split"} & config.explicit
    if fields or config.eval_every == 0 and "eval_every" in config.explicit or getattr(config, "low_resolution", None):
        return []
    found = []
    try:
        load_images(config.data, config.eval_split, config.streaming)
    except (ValueError, OSError):
        if config.streaming or not count or count * HELD_OUT < 1:
            return []
        config.held_out = HELD_OUT
        found.append(
            f"held_out={HELD_OUT:g}, {round(count * HELD_OUT):,} images, as there is no split {config.eval_split!r}"
        )
    if "eval_every" not in config.explicit and config.steps >= 1000:
        config.eval_every = 1000
    return found
