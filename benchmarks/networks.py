"""The networks of the benchmarks: those of two presets, and the cifar10 network at a quarter of its width."""

import torch
from diffusers import UNet2DModel

from ddpm_hf import DDPMUNet
from ddpm_hf.training.command_line import load_config

NETWORKS = {
    "digits": {"preset": "digits", "batch_sizes": (1, 64)},
    "quarter": {"preset": "cifar10", "unet": {"block_out_channels": [32, 64, 64, 64]}, "batch_sizes": (1, 16)},
    "cifar10": {"preset": "cifar10", "batch_sizes": (1, 8)},
}


def config_of(name: str) -> dict:
    """The arguments of `UNet2DModel` or `DDPMUNet` for a network of this list."""
    run, _ = load_config(["--config", NETWORKS[name]["preset"], "--resume", "never"])
    own = {"sample_size": run.image_size, "in_channels": run.channels, "out_channels": run.channels}
    return own | run.unet | NETWORKS[name].get("unet", {})


def network(name: str, cls: type) -> torch.nn.Module:
    """A network of this list as an instance of `cls`, with torch's initial weights from seed 0, so that it is not zero."""
    torch.manual_seed(0)
    unet = cls(**config_of(name))
    if hasattr(unet, "reset_parameters"):
        unet.reset_parameters("torch")
    return unet


def pair(name: str) -> tuple[UNet2DModel, DDPMUNet]:
    """Stock's network of this list and ours with the same weights, in evaluation mode."""
    stock, ours = network(name, UNet2DModel).eval(), network(name, DDPMUNet).eval()
    ours.load_state_dict(stock.state_dict())
    return stock, ours
