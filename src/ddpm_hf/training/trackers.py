"""The trackers of accelerate to which a run logs: tensorboard, wandb, trackio, ..."""

from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image

from ddpm_hf.arguments import shown
from ddpm_hf.training.accelerate_internals import installed_trackers, known_trackers
from ddpm_hf.training.config import ConfigError, RunConfig, nearest, values_of

# the argument with which a tracker takes the name of a run; the others name it by folder or project
RUN_NAMES = {
    "wandb": "name",
    "trackio": "name",
    "mlflow": "run_name",
    "clearml": "task_name",
    "swanlab": "experiment_name",
}


def check_trackers(names: list[str]) -> None:
    """Raise ConfigError for a tracker that accelerate does not know, or that is not installed."""
    supported, installed = known_trackers(), installed_trackers()
    for name in names:
        if name not in supported:
            raise ConfigError(f"trackers={shown(names)}: {shown(name)} is not known{nearest(name, supported)}")
        if name not in installed:
            raise ConfigError(f"trackers={shown(names)}: {shown(name)} is not installed; pip install {name}")


def open_trackers(config: RunConfig, accelerator: Accelerator) -> None:
    """Start accelerate's trackers with the run's project, name and config."""
    name = config.tracker_run or Path(config.output_dir).absolute().name
    names = {tracker: {key: name} for tracker, key in RUN_NAMES.items()}
    values = {key: str(value) for key, value in {**values_of(config), "preset": config.preset}.items()}
    accelerator.init_trackers(config.tracker_project, values, names)


def log_picture(accelerator: Accelerator, step: int, name: str, picture: Image.Image) -> None:
    """Log a picture to the trackers that take pictures."""
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: np.asarray(picture.convert("RGB"))[None]}, step=step, **options)
