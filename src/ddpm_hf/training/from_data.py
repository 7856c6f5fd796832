"""Values chosen for the data of a run: size, channels, classes, network, batch size, learning rate, held-out share."""

import contextlib
import dataclasses
import itertools
import math
import statistics
from typing import Any

import datasets
import numpy as np

from ddpm_hf.data.dataset import held_out_rows, image_column
from ddpm_hf.data.labels import label_names
from ddpm_hf.data.pixels import open_image
from ddpm_hf.data.sources import LEVELS, load_images
from ddpm_hf.training.config import ClassifierConfig, RunConfig, TrainConfig, image_size
from ddpm_hf.training.errors import PIPELINE_ERRORS, as_config_error

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


def with_values_for_data(config: RunConfig, classes: int | None) -> tuple[RunConfig, list[str]]:
    """Return the config with values chosen for the data, except explicit keys, and what was found and chosen, in words.

    Args:
        classes: the number of classes of the base pipeline.
    """
    section, explicit = config.NETWORK, config.explicit
    shape = {f"{section}.{key}" for key in ("block_out_channels", "down_block_types", "up_block_types")}
    open_keys = {"image_size", "channels", "label_column", "batch_size", "held_out"} - explicit
    open_keys -= {"image_size", "channels"} if config.base_pipeline else set()
    levels = LEVELS.get(config.data, 256)
    if "scheduler.levels" not in explicit and levels != 256 and not config.base_pipeline:
        config = dataclasses.replace(config, scheduler=config.scheduler | {"levels": levels})
    counts_classes = config.label_column and f"{section}.{config.CLASSES}" not in explicit and not config.base_pipeline
    if not open_keys and not counts_classes and shape <= explicit:
        return config, []
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
        has_levels = config.scheduler.get("conditioning") == "level_index"
        if getattr(config, "process", None) == "ve" and not has_levels:  # its networks take sigma
            keys = {"time_embedding_type": "fourier", **keys}
        config = dataclasses.replace(config, **{section: keys})
    config = _with_held_out(config, count, facts)
    values: dict[str, Any] = {}
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
    config = dataclasses.replace(config, **values)
    return config, [*facts, *_facts(config)]


def _facts(config):
    """The network and the steps in words."""
    channels = config.network.get("block_out_channels")
    steps = f"steps={config.steps}" if config.minutes is None else f"minutes={config.minutes:g}"
    return [
        f"{config.NETWORK}.block_out_channels={','.join(map(str, channels or []))}",
        f"{steps}, batch_size={config.batch_size}, learning_rate={config.learning_rate:g}",
    ]


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
    if column is None or (column not in images.column_names and not is_explicit):
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
    facts.append(f"label_column={column} (with {config.classes or classes} classes)")
    return config


def _network_for(size, channels, keys, has_up_blocks):
    """The keys of a network for images of a size, beside those given: one head of attention at 16 pixels, as Ho et al."""
    configured_channels = keys.get("block_out_channels")
    channels = configured_channels or channels
    if not isinstance(channels, (list, tuple)) or not all(isinstance(count, int) for count in channels):
        return keys  # refused by the checks that follow
    while configured_channels is None and len(channels) > 2 and any(side % 2 ** (len(channels) - 1) for side in size):
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
            f"held_out={HELD_OUT:g} ({round(count * HELD_OUT):,} images, as there is no split {config.eval_split!r})"
        )
    if "eval_every" not in config.explicit:
        config = dataclasses.replace(config, eval_every=1000)
    return config
