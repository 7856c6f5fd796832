"""Which checkpoint a run resumes from, and whether its config is the one that the checkpoint was trained with."""

import contextlib
import dataclasses
import os
from pathlib import Path

from ddpm_hf.arguments import shown
from ddpm_hf.files.digests import DIGESTS, check_digests
from ddpm_hf.files.guarded import read_json
from ddpm_hf.files.paths import is_same_source
from ddpm_hf.files.strict_yaml import read_yaml
from ddpm_hf.training.checks import typed
from ddpm_hf.training.config import ConfigError, RunConfig, TrainConfig, keys_of, sections_of, shown_value, values_of

# Keys that may differ when a run is resumed; with a constant learning-rate schedule also its steps and learning rate.
MAY_CHANGE = {
    *("num_workers", "output_dir", "resume", "checkpoint_every", "keep_checkpoints"),
    *("compile", "channels_last", "gradient_checkpointing", "memory_gb", "max_steps_skipped"),
    *("trackers", "tracker_project", "tracker_run", "max_broken", "max_image_pixels"),
    *("log_every", "sample_every", "sample_count", "sample_steps", "sample_raw"),
    *("push_to_hub", "hub_private", "license"),
    *("eval_every", "eval_data", "eval_split", "eval_images", "eval_evaluations"),
    *("eval_metrics", "eval_samples", "eval_extractor", "best_by"),
}

# Keys that `plan` sets for a run of so many `minutes`.
PLANNED = {"steps", "lr_schedule", "lr_warmup_steps", "ema_decay", "sample_every", "eval_every", "checkpoint_every"}
PLANNED |= {"sample_raw", "sample_count", "eval_images", "eval_samples"}


def checkpoints_in(output_dir: str | Path) -> list[Path]:
    """The complete checkpoints of a run, `<output_dir>/checkpoints/<step>`, the newest last."""
    return _steps(Path(output_dir, "checkpoints"))


def checkpoints_before(path: Path) -> list[Path]:
    """The checkpoints beside `path` with fewer steps, the newest last; none if its name is no step."""
    if not path.name.isdecimal():
        return []
    return [folder for folder in _steps(path.parent) if int(folder.name) < int(path.name)]


def _steps(folder):
    """The folders in `folder` whose names are steps, in their order."""
    steps = [path for path in folder.glob("*") if path.is_dir() and path.name.isdecimal()]
    return sorted(steps, key=lambda path: int(path.name))


def checkpoint_to_resume(config: RunConfig) -> Path | None:
    """Return the checkpoint from which the run `config` resumes; None for a new run.

    Raises:
        ConfigError: output_dir holds something other than this run, or a run with another config; `resume` names no checkpoint.
    """
    path = find_checkpoint(config)
    check_same_run(config, path)
    return path


def find_checkpoint(config: RunConfig) -> Path | None:
    """As `checkpoint_to_resume`, without comparing configs."""
    output, checkpoints = Path(config.output_dir), checkpoints_in(config.output_dir)
    path = None if config.resume in ("auto", "never") else Path(os.path.expanduser(config.resume))
    if path and (inside := checkpoints_in(path)):
        raise ConfigError(
            f"resume={shown(config.resume)} is the folder of a run; give one of its checkpoints, as {inside[-1]}"
        )
    if path and not any((path / name).is_file() for name in ("run.pt", "config.yaml", "digests.json")):
        raise ConfigError(f"resume={shown(config.resume)} is neither auto, never nor a folder .../checkpoints/<step>")
    if path and path.parent.resolve() == (output / "checkpoints").resolve():
        if not checkpoints or path.name != checkpoints[-1].name:
            raise ConfigError(
                f"output_dir={shown(config.output_dir)} holds something already: "
                f"newer checkpoints than resume={shown(config.resume)}; "
                "to resume from an older one give another output_dir"
            )
        path = None  # what auto does
    ours = config.resume != "never" and bool(checkpoints or _has_begun(config))
    if ours and path:
        ours = _run_of(checkpoints[-1] if checkpoints else output).get("resume") == config.resume
    names = {name for name in os.listdir(output) if name[0] != "."} if output.is_dir() else set()
    # the first file that a run writes
    filled = bool(names - {"environment.json"} if _is_environment(output / "environment.json") else names)
    ended = (output / config.RESULT).exists()
    if filled and (not ours or (not checkpoints and ended)):
        raise ConfigError(f"output_dir={shown(config.output_dir)} holds something already; choose another")
    return checkpoints[-1] if checkpoints else path


def _has_begun(config):
    """Whether output_dir holds a run, perhaps without checkpoints yet."""
    try:
        values = _read_run(Path(config.output_dir))
    except ConfigError:
        return False
    return values.keys() <= {*values_of(config), "preset"}  # which old versions wrote


def _is_environment(path):
    """Whether a file is the environment.json of a run."""
    try:
        return {"versions", "platform", "processes"} <= read_json(path).keys()
    except (OSError, ValueError):
        return False


def with_values_of_run(config: RunConfig, checkpoint: Path) -> RunConfig:
    """Return the config of a resumed run with the values that `resolve` chose when it began."""
    run, values = _run_of(checkpoint), {}
    for field in keys_of(config):
        key = field.name
        from_data = config.preset is None and field.metadata["from_data"] and key != "output_dir"
        from_pipeline = config.base_pipeline and key in config.FROM_PIPELINE
        if key in run and key not in config.explicit and (from_data or from_pipeline):
            value = typed(key, run[key], field.type)
            if key in sections_of(config):
                section = getattr(config, key)
                value |= {name: section[name] for name in section if f"{key}.{name}" in config.explicit}
            values[key] = value
    # the pipeline that a classifier guides is opened again: it is saved with the classifier
    return dataclasses.replace(config, **values, resolved=not getattr(config, "pipeline", None))


def with_plan_of_run(config: RunConfig) -> RunConfig:
    """Return the config with the plan of the run in output_dir, if that has the same `minutes`."""
    if config.minutes is None:
        return config
    try:
        run = _run_of(find_checkpoint(config) or Path(config.output_dir))
    except ConfigError:
        return config
    if run.get("minutes") != config.minutes:
        return config
    keys = [field for field in keys_of(config) if field.name in PLANNED & run.keys() - config.explicit]
    values = {field.name: typed(field.name, run[field.name], field.type) for field in keys}
    return dataclasses.replace(config, planned=True, **values)


def check_same_run(config: RunConfig, path: Path | None) -> None:
    """Raise ConfigError if the run has changed since the checkpoint `path`, or since it began."""
    if path:
        _compare_with(config, path)
        if path.name.isdigit() and int(path.name) > config.steps:
            raise ConfigError(
                f"steps={config.steps}, but {path} is already further; give more steps or another output_dir"
            )
    rows = Path(config.output_dir, "metrics.jsonl")
    if config.resolved and not checkpoints_in(config.output_dir) and rows.is_file() and rows.stat().st_size:
        _compare_with(config, Path(config.output_dir))  # whose rows would be lost


def already_complete(config: RunConfig) -> str:
    """How a run that has trained all its steps can go on, in words."""
    if config.minutes is None and config.lr_schedule.startswith("constant"):
        remedy = "raise steps to continue"
    else:
        remedy = _train_longer(config, Path(config.output_dir))
    return f"already complete ({config.steps:,} step{'s' if config.steps > 1 else ''}); {remedy}"


def _train_longer(config, run):
    """How a run whose steps cannot be raised can be continued, in words."""
    if isinstance(config, TrainConfig):
        weights = run / config.RESULT
        return f"to train longer start a new run from its weights: --init_from {weights} --output_dir <another>"
    return "to train longer start a new run with more steps and another output_dir"


SOURCES = {"data", "init_from", "pipeline"}  # keys that may be paths


def _compare_with(config, path):
    """Raise ConfigError if the config differs from that of the checkpoint or run in the folder `path`."""
    defaults = values_of(type(config)())
    before, now = (flat(values, config) for values in ({**defaults, **_run_of(path)}, values_of(config)))
    before |= {key: now[key] for key in SOURCES & now.keys() if is_same_source(before[key], now[key])}
    run = path.parents[1] if path.parent.name == "checkpoints" else path
    _compare_classes(config, run, before, now)
    _compare_minutes(config, run, before, now)
    may_change = MAY_CHANGE
    if config.lr_schedule.startswith("constant"):
        may_change = may_change | {"steps", "learning_rate", "noise_schedule_learning_rate"}
    if not config.resolved:  # they are the pipeline's, which has not been opened yet
        may_change = may_change | {*config.FROM_PIPELINE}
    may_change -= {"num_workers"} if config.streaming else set()  # they divide the stream
    changed = [
        f"{key}={_shown(now, key)}, but {path} was trained with {_shown(before, key)}"
        for key in {**now, **{key: None for key in before if "." in key}}
        if key.partition(".")[0] not in may_change and before.get(key) != now.get(key)
    ]
    if changed:
        more = f" ({len(changed) - 1} more: {'; '.join(changed[1:4])})".replace(f"{path} was trained with", "it had")
        remedy = "another output_dir"
        if isinstance(config, TrainConfig) and path != Path(config.output_dir):
            remedy = f"start a new run from its weights: --init_from {run / 'pipeline'} --output_dir <another>"
        raise ConfigError(f"{changed[0]}{more if len(changed) > 1 else ''}; give that, or {remedy}")


def _compare_classes(config, run, before, now):
    """Raise ConfigError for a run with classes that would go on without them, or the other way round."""
    was, is_now = (values.get("label_column") for values in (before, now))
    if not config.resolved or (was is None) == (is_now is None):
        return
    classes = before.get(f"{config.NETWORK}.{config.CLASSES}")
    was_trained = "without classes" if was is None else f"with {classes} classes (label_column={shown_value(was)})"
    raise ConfigError(
        f"label_column={shown_value(is_now)}, but {run} was trained {was_trained}; give another --output_dir"
    )


def _compare_minutes(config, run, before, now):
    """Raise ConfigError where one of the two was planned by `minutes`, or both by different ones: the plans differ, too."""
    was, is_now = before.get("minutes"), now["minutes"]
    if was == is_now:
        return
    if was is None:
        raise ConfigError(
            f"minutes={is_now:g}, but {run} was trained with steps={before['steps']}; leave --minutes out, or give "
            "another --output_dir"
        )
    given, trained = ("null" if minutes is None else f"{minutes:g}" for minutes in (is_now, was))
    start = f"minutes={given}, but {run} was trained with {trained}"
    if is_now is None and "steps" in config.explicit:
        start = f"steps={config.steps}, but {run} was trained with minutes={trained}"
    raise ConfigError(
        f"{start}; a run planned by minutes cannot be lengthened: give --minutes {trained} to resume it; "
        f"{_train_longer(config, run)}"
    )


def flat(values: dict, config: RunConfig) -> dict:
    """Flatten sections: {"unet": {"dropout": 0.1}} -> {"unet.dropout": 0.1}."""
    flat: dict = {}
    for key, value in values.items():
        inner = key in sections_of(config) and isinstance(value, dict)
        flat |= {f"{key}.{name}": entry for name, entry in value.items()} if inner else {key: value}
    return flat


def _shown(values, key):
    if key not in values:
        return "its default"
    text = "null" if values[key] is None else repr(values[key])
    return text if len(text) <= 80 else f"{text[:76]} ..."


def _run_of(checkpoint):
    """Read the config of a checkpoint, or if that is damaged, of an older one or of the run: they agree in what matters."""
    path = checkpoint.absolute()
    fallbacks = [*reversed(checkpoints_before(path)), *([path.parents[1]] if path.parent.name == "checkpoints" else [])]
    for folder in (checkpoint, *fallbacks):
        with contextlib.suppress(ConfigError):
            return _read_run(folder)
    return _read_run(checkpoint)


def _read_run(folder):
    try:
        if (folder / DIGESTS).exists():
            check_digests(folder, "config.yaml")
        values = read_yaml(folder / "config.yaml")
    except (OSError, ValueError):
        values = None
    if not isinstance(values, dict):
        raise ConfigError(f"{folder / 'config.yaml'} cannot be read; put it back, or take another output_dir")
    return values
