"""With what a run is computed: versions, device, memory and trackers."""

import platform
import subprocess
import sys
from pathlib import Path

import accelerate
import datasets
import diffusers
import psutil
import torch
from accelerate.tracking import get_available_trackers

import ddpm_hf
from ddpm_hf.arguments import shown
from ddpm_hf.training.config import ConfigError, nearest

try:
    import resource
except ImportError:
    resource = None


MODULES = (ddpm_hf, torch, diffusers, accelerate, datasets)


def check_trackers(names: list[str]) -> None:
    """Raises ConfigError for a tracker that accelerate does not know, or that is not installed."""
    known = [str(kind) for kind in accelerate.tracking.LOGGER_TYPE_TO_CLASS]
    there = [str(kind) for kind in get_available_trackers()]
    for name in names:
        if name not in known:
            raise ConfigError(f"trackers={shown(names)}: {shown(name)} is not known{nearest(name, known)}")
        if name not in there:
            raise ConfigError(f"trackers={shown(names)}: {shown(name)} is not installed; pip install {name}")


def environment(accelerator) -> dict:
    """Where and with what a run is computed."""
    try:
        git = ["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # there is no git
        commit = None
    cuda = accelerator.device.type == "cuda"
    return {
        "versions": {module.__name__: module.__version__ for module in MODULES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if cuda else str(accelerator.device),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "mixed_precision": accelerator.mixed_precision,
        "commit": commit or None,
    }


def memory_gb(device: torch.device) -> float:
    """The most that was held so far, of the device, or of this process for the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if resource is None:  # Windows
        return psutil.Process().memory_info().peak_wset / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
