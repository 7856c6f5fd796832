"""The diffusion process of a run, from its config."""

from ddpm_hf.arguments import shown
from ddpm_hf.schedulers.ddpm import VARIANCE_TYPES, VariationalDDPMScheduler
from ddpm_hf.schedulers.sde_samplers import SDEScheduler, SubVPSDEScheduler, VESDEScheduler, VPSDEScheduler
from ddpm_hf.training.config import ConfigError, RunConfig, learns_betas, nearest
from ddpm_hf.training.noise_schedule import LearnedNoiseSchedule

PROCESSES = {"ddpm": VariationalDDPMScheduler, "vp": VPSDEScheduler, "subvp": SubVPSDEScheduler, "ve": VESDEScheduler}


def process_class(config: RunConfig) -> type[VariationalDDPMScheduler] | type[SDEScheduler]:
    """The class of the process; classifiers are trained in discrete time."""
    return PROCESSES[getattr(config, "process", "ddpm")]


def make_noise_schedule(config: RunConfig) -> LearnedNoiseSchedule | None:
    """The noise schedule that a run learns, as it begins; None where the betas are known."""
    if not learns_betas(config):
        return None
    keys = ("num_train_timesteps", "beta_start", "beta_end")
    return LearnedNoiseSchedule(**{key: config.scheduler[key] for key in keys if key in config.scheduler})


def make_scheduler(config: RunConfig) -> VariationalDDPMScheduler | SDEScheduler:
    """The process of a run; where its betas are learned, with those that the run begins with.

    Raises:
        ValueError: a key or value that it does not take.
    """
    variance_type = config.scheduler.get("variance_type", "fixed_small")
    if variance_type not in VARIANCE_TYPES:  # the scheduler itself only warns, as diffusers' does
        raise ConfigError(
            f"scheduler.variance_type={shown(variance_type)} is not known{nearest(variance_type, VARIANCE_TYPES)}"
        )
    keys = config.scheduler
    if noise_schedule := make_noise_schedule(config):
        keys = keys | {"trained_betas": noise_schedule.betas()[0].tolist()}
    return process_class(config)(**keys)
