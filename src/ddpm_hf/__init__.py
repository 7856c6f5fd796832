"""Denoising diffusion probabilistic models for Hugging Face diffusers."""

from .classifier import NoisyClassifier
from .flow import (
    Encoding,
    OdeBitsPerDim,
    OdeLikelihood,
    OdeStopped,
    decode,
    encode,
    interpolate_latents,
    ode_bits_per_dim,
    ode_log_likelihood,
)
from .inference import InferenceUNet
from .likelihood import (
    BitsPerDim,
    BitsPerDimEstimate,
    bits_per_dim,
    estimate_bits_per_dim,
    progressive_coding,
    rate_distortion,
)
from .objectives import ContinuousTimes, DiffusionObjective, LossSecondMomentTimesteps, ScoreObjective, UniformTimesteps
from .pipeline import DDPMImagePipeline
from .scheduler import (
    Gaussian,
    VariationalDDPMScheduler,
    discretized_gaussian_log_likelihood,
    space_timesteps,
)
from .sde import VESDE, VPSDE, ChainSDE, SubVPSDE, SubVPSDEScheduler, VESDEScheduler, VPSDEScheduler
from .super_resolution import CascadePipeline, DDPMSuperResolutionPipeline
from .unet import DDPMUNet

__version__ = "0.1.0"
__all__ = [
    "BitsPerDim",
    "BitsPerDimEstimate",
    "CascadePipeline",
    "ChainSDE",
    "ContinuousTimes",
    "DDPMImagePipeline",
    "DDPMSuperResolutionPipeline",
    "DDPMUNet",
    "DiffusionObjective",
    "Encoding",
    "Gaussian",
    "InferenceUNet",
    "LossSecondMomentTimesteps",
    "NoisyClassifier",
    "OdeBitsPerDim",
    "OdeLikelihood",
    "OdeStopped",
    "ScoreObjective",
    "SubVPSDE",
    "SubVPSDEScheduler",
    "UniformTimesteps",
    "VESDE",
    "VESDEScheduler",
    "VPSDE",
    "VPSDEScheduler",
    "VariationalDDPMScheduler",
    "bits_per_dim",
    "decode",
    "discretized_gaussian_log_likelihood",
    "encode",
    "estimate_bits_per_dim",
    "interpolate_latents",
    "ode_bits_per_dim",
    "ode_log_likelihood",
    "progressive_coding",
    "rate_distortion",
    "space_timesteps",
]
