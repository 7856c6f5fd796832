"""Denoising diffusion probabilistic models for Hugging Face diffusers."""

from .classifier import NoisyClassifier
from .inference import InferenceUNet
from .likelihood import (
    BitsPerDim,
    BitsPerDimEstimate,
    bits_per_dim,
    estimate_bits_per_dim,
    progressive_coding,
    rate_distortion,
)
from .objectives import DiffusionObjective, LossSecondMomentTimesteps, UniformTimesteps
from .pipeline import DDPMImagePipeline
from .scheduler import (
    Gaussian,
    VariationalDDPMScheduler,
    discretized_gaussian_log_likelihood,
    space_timesteps,
)
from .sde import VESDE, VPSDE, SubVPSDE, SubVPSDEScheduler, VESDEScheduler, VPSDEScheduler
from .super_resolution import CascadePipeline, DDPMSuperResolutionPipeline
from .unet import DDPMUNet

__version__ = "0.1.0"
__all__ = [
    "BitsPerDim",
    "BitsPerDimEstimate",
    "CascadePipeline",
    "DDPMImagePipeline",
    "DDPMSuperResolutionPipeline",
    "DDPMUNet",
    "DiffusionObjective",
    "Gaussian",
    "InferenceUNet",
    "LossSecondMomentTimesteps",
    "NoisyClassifier",
    "SubVPSDE",
    "SubVPSDEScheduler",
    "UniformTimesteps",
    "VESDE",
    "VESDEScheduler",
    "VPSDE",
    "VPSDEScheduler",
    "VariationalDDPMScheduler",
    "bits_per_dim",
    "discretized_gaussian_log_likelihood",
    "estimate_bits_per_dim",
    "progressive_coding",
    "rate_distortion",
    "space_timesteps",
]
