"""Denoising diffusion probabilistic models for Hugging Face diffusers."""

from .likelihood import BitsPerDim, bits_per_dim
from .objectives import DiffusionObjective
from .pipeline import DDPMImagePipeline
from .scheduler import (
    Gaussian,
    VariationalDDPMScheduler,
    discretized_gaussian_log_likelihood,
    space_timesteps,
)
from .unet import DDPMUNet

__version__ = "0.1.0"
__all__ = [
    "BitsPerDim",
    "DDPMImagePipeline",
    "DDPMUNet",
    "DiffusionObjective",
    "Gaussian",
    "VariationalDDPMScheduler",
    "bits_per_dim",
    "discretized_gaussian_log_likelihood",
    "space_timesteps",
]
