"""The diffusion processes as diffusers schedulers, in discrete and in continuous time."""

from ddpm_hf.schedulers.ddpm import VariationalDDPMScheduler
from ddpm_hf.schedulers.sde_samplers import SubVPSDEScheduler, VESDEScheduler, VPSDEScheduler

SCHEDULERS = (VariationalDDPMScheduler, VPSDEScheduler, SubVPSDEScheduler, VESDEScheduler)
