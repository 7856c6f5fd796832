"""Networks of the benchmarks: those of the presets digits and cifar10, and cifar10 at a quarter of its width."""

import torch
from diffusers import UNet2DModel

from ddpm_hf import DDPMUNet
from ddpm_hf.training.command_line import load_config

NETWORKS = {
    "digits": {"preset": "digits", "batch_sizes": (1, 64)},
    "quarter": {"preset": "cifar10", "unet": {"block_out_channels": [32, 64, 64, 64]}, "batch_sizes": (1, 16)},
    "cifar10": {"preset": "cifar10", "batch_sizes": (1, 8)},
}


def network_config(name: str) -> dict:
    """Return the arguments of `UNet2DModel` or `DDPMUNet` for a network of NETWORKS."""
    config, _ = load_config(["--config", NETWORKS[name]["preset"], "--resume", "never"])
    data_shape = {"sample_size": config.image_size, "in_channels": config.channels, "out_channels": config.channels}
    return data_shape | config.unet | NETWORKS[name].get("unet", {})


def make_network(name: str, cls: type) -> torch.nn.Module:
    """Make a network of NETWORKS as an instance of `cls`. It gets torch's initial weights, so that its output is not zero."""
    torch.manual_seed(0)
    unet = cls(**network_config(name))
    if hasattr(unet, "reset_parameters"):
        unet.reset_parameters("torch")
    return unet


def make_pair(name: str) -> tuple[UNet2DModel, DDPMUNet]:
    """Make stock's and our network of NETWORKS, with the same weights, in evaluation mode."""
    stock, ours = make_network(name, UNet2DModel).eval(), make_network(name, DDPMUNet).eval()
    ours.load_state_dict(stock.state_dict())
    return stock, ours
