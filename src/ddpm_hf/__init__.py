"""Denoising diffusion probabilistic models for Hugging Face diffusers."""

import importlib
from typing import TYPE_CHECKING

from ddpm_hf.version import __version__ as __version__

if TYPE_CHECKING:  # the same names for type checkers and editors
    from ddpm_hf.fast.inference import InferenceUNet as InferenceUNet
    from ddpm_hf.likelihood.bound import (
        BitsPerDim as BitsPerDim,
        bits_per_dim as bits_per_dim,
        progressive_coding as progressive_coding,
        rate_distortion as rate_distortion,
    )
    from ddpm_hf.likelihood.encoding import (
        Encoding as Encoding,
        decode as decode,
        encode as encode,
        interpolate_latents as interpolate_latents,
    )
    from ddpm_hf.likelihood.estimate import (
        BitsPerDimEstimate as BitsPerDimEstimate,
        estimate_bits_per_dim as estimate_bits_per_dim,
    )
    from ddpm_hf.likelihood.ode import (
        OdeBitsPerDim as OdeBitsPerDim,
        OdeLikelihood as OdeLikelihood,
        OdeStopped as OdeStopped,
        ode_bits_per_dim as ode_bits_per_dim,
        ode_log_likelihood as ode_log_likelihood,
    )
    from ddpm_hf.models.classifier import NoisyClassifier as NoisyClassifier
    from ddpm_hf.models.unet import DDPMUNet as DDPMUNet
    from ddpm_hf.pipelines.cascade import CascadePipeline as CascadePipeline
    from ddpm_hf.pipelines.ddpm import DDPMImagePipeline as DDPMImagePipeline
    from ddpm_hf.pipelines.super_resolution import DDPMSuperResolutionPipeline as DDPMSuperResolutionPipeline
    from ddpm_hf.schedulers.betas import space_timesteps as space_timesteps
    from ddpm_hf.schedulers.ddpm import VariationalDDPMScheduler as VariationalDDPMScheduler
    from ddpm_hf.schedulers.gaussian import (
        Gaussian as Gaussian,
        discretized_gaussian_log_likelihood as discretized_gaussian_log_likelihood,
    )
    from ddpm_hf.schedulers.sde import VESDE as VESDE, VPSDE as VPSDE, ChainSDE as ChainSDE, SubVPSDE as SubVPSDE
    from ddpm_hf.schedulers.sde_samplers import (
        SubVPSDEScheduler as SubVPSDEScheduler,
        VESDEScheduler as VESDEScheduler,
        VPSDEScheduler as VPSDEScheduler,
    )
    from ddpm_hf.training.losses import (
        ContinuousBoundObjective as ContinuousBoundObjective,
        DiffusionObjective as DiffusionObjective,
        ScoreObjective as ScoreObjective,
    )
    from ddpm_hf.training.noise_schedule import LearnedNoiseSchedule as LearnedNoiseSchedule
    from ddpm_hf.training.timesteps import (
        ContinuousTimes as ContinuousTimes,
        FractionalTimesteps as FractionalTimesteps,
        LossSecondMomentTimesteps as LossSecondMomentTimesteps,
        LowDiscrepancyTimesteps as LowDiscrepancyTimesteps,
        UniformTimesteps as UniformTimesteps,
    )

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
    "training.losses": ["ContinuousBoundObjective", "DiffusionObjective", "ScoreObjective"],
    "training.noise_schedule": ["LearnedNoiseSchedule"],
    "training.timesteps": [
        "ContinuousTimes",
        "FractionalTimesteps",
        "LossSecondMomentTimesteps",
        "LowDiscrepancyTimesteps",
        "UniformTimesteps",
    ],
}
PACKAGES = {module.partition(".")[0] for module in MODULES} | {"data", "evaluation", "files", "hub"}
__all__ = sorted(name for names in MODULES.values() for name in names)


def __getattr__(name: str):
    if name in PACKAGES:
        return importlib.import_module(f".{name}", __name__)
    for module, names in MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
