"""Checks of a run's config: of single keys and of their combinations. Imports nothing slow."""

import os
import re
import types
import typing
from pathlib import Path

from ddpm_hf.arguments import check_argument, shown, sides
from ddpm_hf.files.missing import did_you_mean_path
from ddpm_hf.files.strict_yaml import parse_yaml
from ddpm_hf.training.config import (
    ConfigError,
    RunConfig,
    TrainConfig,
    as_yaml,
    image_size,
    keys_of,
    learns_betas,
    nearest,
    null_for_none,
    sections_of,
    shown_value,
)

MAX_WORKERS_PER_CORE = 16


UNWRITABLE = re.compile("[\x00\ud800-\udc7f\udd00-\udfff]")  # characters that no file or model card can hold
HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")  # "name" or "user/name"
PATHS = ("data", "eval_data", "init_from", "pipeline", "output_dir", "resume")
COUNT, MORE_OR_NONE = "[1, 1000000000000]", "[0, 1000000000000]"
RANGES: dict[str, str | tuple[str, ...]] = {
    **dict.fromkeys(
        ("steps", "batch_size", "gradient_accumulation_steps", "shuffle_buffer", "max_steps_skipped"), COUNT
    ),
    **dict.fromkeys(("log_every", "keep_checkpoints", "eval_images"), COUNT),
    **dict.fromkeys(("lr_warmup_steps", "num_workers", "checkpoint_every", "eval_every"), MORE_OR_NONE),
    **dict.fromkeys(("sample_every", "sample_raw"), MORE_OR_NONE),
    **dict.fromkeys(("held_out", "max_broken", "adam_betas", "ema_decay"), "[0, 1)"),
    **dict.fromkeys(("conditioning_noise", "label_dropout"), "[0, 1)"),
    **dict.fromkeys(("image_size", "low_resolution"), "[1, 65536]"),
    **dict.fromkeys(("sample_count", "sample_steps"), "[1, 100000]"),
    "memory_gb": "[0, 1000000]",
    "minutes": "(0, 1000000]",
    "crop": ("center", "none"),
    "channels": "[1, 4]",
    **dict.fromkeys(("learning_rate", "noise_schedule_learning_rate"), "(0, 1e38]"),
    "weight_decay": "[0, 1000]",
    "max_grad_norm": "(0, inf]",
    "mixed_precision": ("no", "bf16", "fp16"),
    "channels_last": ("auto", "true", "false"),
    "seed": "[0, 4294967295]",
    "init": ("paper", "torch"),
    "vlb_weight": "[0, 1000000]",
    "eval_evaluations": "[8, 1000000000000]",
    "eval_samples": "[64, 1000000]",
    "best_by": ("bits_per_dim", "fd"),
    "random_crop": "(0, 1]",
}


def types_of(annotation) -> tuple:
    """Return the types that a type annotation allows: those of a union, or the one."""
    return typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)


def typed(key: str, value, annotation):
    """Convert the value of a key to its annotated type; raise ConfigError if that is impossible."""
    if annotation is dict and value is None:
        return {}
    try:
        return check_argument(key, value, annotation, RANGES.get(key))
    except ValueError as error:
        raise ConfigError(
            f"{null_for_none(str(error))}{', in quotes' if str in types_of(annotation) else ''}"
        ) from None


def check(config: RunConfig) -> None:
    """Raise ConfigError for values that are not allowed or contradict each other."""
    _check_run(config)
    (_check_training if isinstance(config, TrainConfig) else _check_classifier)(config)


def _check_run(config):
    _check_values(config)
    _check_lists(config)
    _check_data(config)
    _check_output_dir(config)
    if config.num_workers > MAX_WORKERS_PER_CORE * os.cpu_count():
        raise ConfigError(
            f"num_workers={config.num_workers} is more than {MAX_WORKERS_PER_CORE} for each of {os.cpu_count()} cores, which "
            "would make the machine unresponsive; take as many as there are cores, or fewer"
        )
    if len(config.adam_betas) != 2:
        raise ConfigError(f"adam_betas={shown(config.adam_betas)} must be two numbers, as [0.9, 0.999]")
    for name in config.DERIVED:
        if name in config.network:
            raise ConfigError(f"{config.NETWORK}.{name} follows from the other keys of the run; leave it out")
    if config.minutes is not None and "steps" in config.explicit:
        raise ConfigError(f"steps={config.steps} and minutes={config.minutes:g} contradict each other; leave one out")


def _check_values(config):
    """Types, ranges, and text that can be written."""
    for field in keys_of(config):
        value = getattr(config, field.name)
        try:
            check_argument(field.name, value, field.type, RANGES.get(field.name))
        except ValueError as error:
            raise ConfigError(null_for_none(str(error))) from None
        longest = 500 if field.name == "split" else 2000  # as hub/records.py reads it again
        if isinstance(value, str) and (len(value) > longest or UNWRITABLE.search(value)):
            raise ConfigError(
                f"{field.name}={shown(value)} must be text of at most {longest:,} characters that can be written"
            )
    for key in PATHS:
        if any(len(part.encode(errors="surrogateescape")) > 255 for part in Path(getattr(config, key, "") or "").parts):
            raise ConfigError(
                f"{key}={shown(getattr(config, key))}: file names have at most 255 bytes; take a shorter one"
            )


def _check_lists(config):
    """A pipeline's config may hold longer lists than config.yaml can."""
    lists = {
        f"{section}.{key}": value
        for section in sections_of(config)
        for key, value in getattr(config, section).items()
        if isinstance(value, (list, tuple)) and len(value) > 1000
    }
    if not lists:
        return
    try:
        parse_yaml(as_yaml(config))
    except ValueError as error:
        key = max(lists, key=lambda key: len(lists[key]))
        raise ConfigError(
            f"{key} has {len(lists[key]):,} values, with which config.yaml could not be read again: {error}; give fewer"
        ) from None


def _check_data(config):
    if not config.data:
        raise ConfigError("data is empty; name a data set")
    # what is no Hub id must be a path
    is_path = not HUB_ID.fullmatch(config.data) or config.data.endswith(".parquet")
    if (is_path or config.data.startswith(".")) and not os.path.exists(config.data):
        raise ConfigError(f"data={shown(config.data)} does not exist{did_you_mean_path(Path(config.data))}")
    if config.held_out and config.streaming:
        raise ConfigError(
            f"held_out={config.held_out} is not for streams; name held-out images by eval_split or eval_data"
        )
    if config.held_out and config.eval_data:
        raise ConfigError(
            f"held_out={config.held_out} and eval_data={shown(config.eval_data)} name held-out images twice; give one"
        )
    if config.channels not in (1, 3, 4):
        raise ConfigError(f"channels={config.channels} must be 1 (grey), 3 (RGB) or 4 (RGBA)")
    if len(image_size(config)) != 2:
        raise ConfigError(f"image_size={shown(config.image_size)} must be one number or [height, width]")


def _check_output_dir(config):
    if not config.output_dir:
        raise ConfigError("output_dir is empty; name a folder")
    output = Path(config.output_dir).absolute()
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output_dir={shown(config.output_dir)} is a file")
    existing = next(path for path in (output, *output.parents) if path.exists())
    if not os.access(existing, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise ConfigError(f"output_dir={shown(config.output_dir)}: {existing} is not writable; name another folder")


def _check_training(config):
    low = sides(config.low_resolution or 0)
    if (
        config.resolved
        and config.low_resolution is not None
        and not (len(low) == 2 and all(small < side for small, side in zip(low, image_size(config))))
    ):
        raise ConfigError(
            f"low_resolution={shown(config.low_resolution)} must be smaller than image_size={config.image_size}"
        )
    if config.conditioning_noise and not config.low_resolution:
        raise ConfigError(
            f"conditioning_noise={config.conditioning_noise} is for networks with low_resolution; leave it out"
        )
    if config.low_resolution and config.eval_every:
        raise ConfigError("eval_every measures networks that start from noise alone; leave it out with low_resolution")
    _check_sample_metrics(config)
    if config.resolved or not config.init_from:
        if config.process != "ddpm":
            _check_continuous(config)
        _check_learned_betas(config)
    if config.push_to_hub is not None and not HUB_ID.fullmatch(config.push_to_hub):
        raise ConfigError(f"push_to_hub={shown(config.push_to_hub)} must be user/name, as on the Hub")
    if config.resolved and config.label_dropout and config.label_column is None:
        raise ConfigError(f"label_dropout={config.label_dropout} needs labels; name their label_column")
    if config.resolved:
        _check_network(config, image_size(config))


def _check_sample_metrics(config):
    if config.eval_metrics not in ([], ["fd"]):
        raise ConfigError(f"eval_metrics={shown(config.eval_metrics)} must be fd, or empty")
    if config.best_by == "fd" and not config.eval_metrics:
        raise ConfigError("best_by=fd needs --eval_metrics fd")
    if config.eval_metrics and config.streaming:
        raise ConfigError("eval_metrics reads the training images before the first step; leave out streaming")
    if config.eval_metrics and config.resolved and not config.eval_every:
        raise ConfigError("eval_metrics needs eval_every, the steps between measurements; give --eval_every 1000")


def _check_continuous(config):
    processes = ("ddpm", "vp", "subvp", "ve")
    if config.process not in processes:
        raise ConfigError(f"process={shown(config.process)} is not known{nearest(config.process, processes)}")
    for key, allowed in (
        ("loss", ("simple",)),
        ("weighting", (None, "likelihood")),
        ("timesteps", ("uniform", "low_discrepancy", "importance")),
    ):
        if getattr(config, key) not in allowed:
            choices = ", ".join("null" if choice is None else choice for choice in allowed)
            raise ConfigError(
                f"{key}={shown_value(getattr(config, key))} is for discrete timesteps; with "
                f"process={config.process} take {choices}"
            )
    if config.low_resolution:
        raise ConfigError(f"low_resolution is for process=ddpm, not for {config.process}")
    prediction = config.scheduler.get("prediction_type", "score")
    if config.process == "ve" and prediction != "score":
        raise ConfigError(
            f"scheduler.prediction_type={shown(prediction)}: networks that take sigma divide their output by it, which gives a "
            "score; leave it out"
        )
    if config.scheduler.get("conditioning") == "level_index" and config.resolved and config.eval_every:
        raise ConfigError(
            "scheduler.conditioning=level_index: held-out bits/dim are the ODE's, which needs the noise levels between the "
            "discrete ones; give --eval_every 0"
        )
    if not config.scheduler.get("centered", True):
        raise ConfigError(
            "scheduler.centered=false: images are trained in [-1, 1]; leave it out, and double sigma_min and sigma_max"
        )


def _check_learned_betas(config):
    scheduler, is_continuous = config.scheduler, config.loss == "vlb_continuous"
    if scheduler.get("beta_schedule") == "learned":
        if config.init_from and "scheduler.beta_schedule" in config.explicit:
            raise ConfigError(
                "scheduler.beta_schedule=learned: a run from init_from keeps the betas of its pipeline; leave it out"
            )
        if "trained_betas" in scheduler and not config.init_from:
            raise ConfigError(
                "scheduler.trained_betas are fixed, scheduler.beta_schedule=learned learns them; leave one of the two out"
            )
    if not learns_betas(config):
        if is_continuous and config.init_from:
            raise ConfigError("loss=vlb_continuous learns the betas, which a run from init_from keeps; give --loss vlb")
        if is_continuous:
            raise ConfigError(
                "loss=vlb_continuous is for learned betas; give --scheduler.beta_schedule learned, or --loss vlb"
            )
        return
    if config.loss not in ("vlb", "vlb_continuous"):
        raise ConfigError(
            f"scheduler.beta_schedule=learned needs a bound as the loss: loss={shown(config.loss)} is lowest where the noise "
            "is easiest to predict; give --loss vlb, or vlb_continuous"
        )
    if scheduler.get("rescale_betas_zero_snr"):
        raise ConfigError(
            "scheduler.rescale_betas_zero_snr=true: a learned schedule ends at a learned, finite signal-to-noise ratio; leave "
            "it out"
        )
    if is_continuous and config.weighting is not None:
        raise ConfigError(
            f"weighting={shown(config.weighting)} is for the squared error; the bound has weights of its own"
        )
    if is_continuous and config.timesteps not in ("uniform", "low_discrepancy"):
        raise ConfigError(
            f"timesteps={shown(config.timesteps)} is not for loss=vlb_continuous, whose learned schedule itself spreads the "
            "times; give uniform, or low_discrepancy"
        )
    if is_continuous and config.unet.get("time_embedding_type") == "learned":
        raise ConfigError(
            "unet.time_embedding_type=learned knows whole timesteps; loss=vlb_continuous has times between them; give "
            "positional"
        )


def _check_classifier(config):
    if config.label_column is None or (config.resolved and not isinstance(config.classes, int)):
        raise ConfigError("a classifier needs label_column, and classifier.num_classes: how many labels there are")
    _check_channels("classifier", config.classifier)


def _check_channels(part, network):
    channels = network.get("block_out_channels", (224, 448, 672, 896))
    if not isinstance(channels, (list, tuple)) or not 1 <= len(channels) <= 16:
        raise ConfigError(f"{part}.block_out_channels={shown(channels)} must be a list of integers, one for each level")
    return channels


def _check_network(config, size):
    channels = _check_channels("unet", config.unet)
    if not isinstance(config.classes, (int, types.NoneType)):
        raise ConfigError(
            f"unet.num_class_embeds={shown(config.classes)} must be an integer, how many labels there are"
        )
    stride = 2 ** (len(channels) - 1)
    if any(side < 1 or side % stride for side in size):
        raise ConfigError(
            f"image_size={config.image_size} must be a multiple of {stride}: unet.block_out_channels has {len(channels)} "
            f"levels, each halving the image"
        )
    if (config.label_column is None) != (config.unet.get("num_class_embeds") is None):
        raise ConfigError(
            f"label_column={shown_value(config.label_column)} and unet.num_class_embeds={shown_value(config.classes)} go "
            "together: give both for a class-conditional network, or neither"
        )
