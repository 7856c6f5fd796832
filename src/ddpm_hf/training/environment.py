"""The environment of a run: versions, device, memory and trackers."""

import platform
import subprocess
import sys
from pathlib import Path

import accelerate
import datasets
import diffusers
import psutil
import torch

import ddpm_hf

try:
    import resource
except ImportError:
    resource = None  # type: ignore[assignment]


MODULES = (ddpm_hf, torch, diffusers, accelerate, datasets)


def environment(accelerator) -> dict:
    """Return the content of environment.json."""
    try:
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
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
    """Return the peak memory in GiB, of the device, or on the CPU of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if resource is None:  # Windows
        return psutil.Process().memory_info().peak_wset / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
