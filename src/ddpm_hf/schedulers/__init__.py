"""The diffusion processes as diffusers schedulers, in discrete and in continuous time."""

from ddpm_hf.schedulers.betas import BETA_SCHEDULES, space_timesteps
from ddpm_hf.schedulers.conditioning_times import conditioning_times
from ddpm_hf.schedulers.ddpm import VariationalDDPMScheduler
from ddpm_hf.schedulers.gaussian import Gaussian, discretized_gaussian_log_likelihood
from ddpm_hf.schedulers.sde import SDE, VESDE, VPSDE, ChainSDE, SubVPSDE
from ddpm_hf.schedulers.sde_samplers import SDEScheduler, SubVPSDEScheduler, VESDEScheduler, VPSDEScheduler

__all__ = [
    "BETA_SCHEDULES",
    "SCHEDULERS",
    "SDE",
    "VESDE",
    "VPSDE",
    "ChainSDE",
    "Gaussian",
    "SDEScheduler",
    "SubVPSDE",
    "SubVPSDEScheduler",
    "VESDEScheduler",
    "VPSDEScheduler",
    "VariationalDDPMScheduler",
    "conditioning_times",
    "discretized_gaussian_log_likelihood",
    "space_timesteps",
]

# The scheduler classes of this package. Their class attributes say how they are saved and opened (`SavedConfig`).
SCHEDULERS = (VariationalDDPMScheduler, VPSDEScheduler, SubVPSDEScheduler, VESDEScheduler)
