"""Denoising diffusion probabilistic models for Hugging Face diffusers."""

import importlib

__version__ = "0.1.0"
# module -> its public names; each is imported when it is first used, so that a mistyped option need not wait for torch
MODULES = {
    "classifier": ["NoisyClassifier"],
    "flow": [
        "Encoding",
        "OdeBitsPerDim",
        "OdeLikelihood",
        "OdeStopped",
        "decode",
        "encode",
        "interpolate_latents",
        "ode_bits_per_dim",
        "ode_log_likelihood",
    ],
    "inference": ["InferenceUNet"],
    "likelihood": [
        "BitsPerDim",
        "BitsPerDimEstimate",
        "bits_per_dim",
        "estimate_bits_per_dim",
        "progressive_coding",
        "rate_distortion",
    ],
    "objectives": [
        "ContinuousTimes",
        "DiffusionObjective",
        "LossSecondMomentTimesteps",
        "ScoreObjective",
        "UniformTimesteps",
    ],
    "pipeline": ["DDPMImagePipeline"],
    "scheduler": [
        "Gaussian",
        "VariationalDDPMScheduler",
        "discretized_gaussian_log_likelihood",
        "space_timesteps",
    ],
    "sde": ["VESDE", "VPSDE", "ChainSDE", "SubVPSDE", "SubVPSDEScheduler", "VESDEScheduler", "VPSDEScheduler"],
    "super_resolution": ["CascadePipeline", "DDPMSuperResolutionPipeline"],
    "unet": ["DDPMUNet"],
}
__all__ = sorted(name for names in MODULES.values() for name in names)


def __getattr__(name):
    if name in MODULES:
        return importlib.import_module(f".{name}", __name__)
    for module, names in MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return [*globals(), *__all__]
