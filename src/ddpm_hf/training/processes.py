"""The diffusion process of a run, from its config."""

from ddpm_hf.arguments import shown
from ddpm_hf.schedulers.ddpm import VARIANCE_TYPES, VariationalDDPMScheduler
from ddpm_hf.schedulers.sde_samplers import SDEScheduler, SubVPSDEScheduler, VESDEScheduler, VPSDEScheduler
from ddpm_hf.training.config import ConfigError, RunConfig, nearest

PROCESSES = {"ddpm": VariationalDDPMScheduler, "vp": VPSDEScheduler, "subvp": SubVPSDEScheduler, "ve": VESDEScheduler}


def process_class(config: RunConfig) -> type[VariationalDDPMScheduler] | type[SDEScheduler]:
    """The class of the process; classifiers are trained in discrete time."""
    return PROCESSES[getattr(config, "process", "ddpm")]


def make_scheduler(config: RunConfig) -> VariationalDDPMScheduler | SDEScheduler:
    """The process of a run.

    Raises:
        ValueError: a key or value that it does not take.
    """
    variance_type = config.scheduler.get("variance_type", "fixed_small")
    if variance_type not in VARIANCE_TYPES:  # the scheduler itself only warns, as diffusers' does
        raise ConfigError(
            f"scheduler.variance_type={shown(variance_type)} is not known{nearest(variance_type, VARIANCE_TYPES)}"
        )
    return process_class(config)(**config.scheduler)
