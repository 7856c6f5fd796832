"""Denoising diffusion probabilistic models for Hugging Face diffusers."""

import importlib

__version__ = "0.1.0"
# module -> its public names; each is imported when it is first used, so that a mistyped option need not wait for torch
MODULES = {
    "fast.inference": ["InferenceUNet"],
    "likelihood.bound": ["BitsPerDim", "bits_per_dim", "progressive_coding", "rate_distortion"],
    "likelihood.encoding": ["Encoding", "decode", "encode", "interpolate_latents"],
    "likelihood.estimate": ["BitsPerDimEstimate", "estimate_bits_per_dim"],
    "likelihood.ode": ["OdeBitsPerDim", "OdeLikelihood", "OdeStopped", "ode_bits_per_dim", "ode_log_likelihood"],
    "models.classifier": ["NoisyClassifier"],
    "models.unet": ["DDPMUNet"],
    "pipelines.cascade": ["CascadePipeline"],
    "pipelines.ddpm": ["DDPMImagePipeline"],
    "pipelines.super_resolution": ["DDPMSuperResolutionPipeline"],
    "schedulers.betas": ["space_timesteps"],
    "schedulers.ddpm": ["VariationalDDPMScheduler"],
    "schedulers.gaussian": ["Gaussian", "discretized_gaussian_log_likelihood"],
    "schedulers.sde": ["ChainSDE", "SubVPSDE", "VESDE", "VPSDE"],
    "schedulers.sde_samplers": ["SubVPSDEScheduler", "VESDEScheduler", "VPSDEScheduler"],
    "training.losses": ["DiffusionObjective", "ScoreObjective"],
    "training.timesteps": ["ContinuousTimes", "LossSecondMomentTimesteps", "UniformTimesteps"],
}
ROOMS = {module.partition(".")[0] for module in MODULES} | {"data", "evaluation", "files", "hub"}
__all__ = sorted(name for names in MODULES.values() for name in names)


def __getattr__(name):
    if name in ROOMS:
        return importlib.import_module(f".{name}", __name__)
    for module, names in MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return [*globals(), *__all__]
