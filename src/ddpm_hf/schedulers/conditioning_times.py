"""What a network is told in place of a timestep (c_noise of Karras et al. 2022). Decided here and nowhere else."""

from typing import Any


def conditioning_times(scheduler, t: Any) -> Any:
    """The network's input for timestep t of a scheduler of this package or of diffusers.

    It is t itself, or with `rescale_timesteps` of `VariationalDDPMScheduler` t * 1000 / T, a float. diffusers' schedulers that
    are made from its config keep that setting. In continuous time `scheduler.timesteps` are conditioning times already.

    Args:
        t: 0-based timesteps, a number or a tensor of any shape and device, which the host does not wait for.
    """
    if getattr(scheduler, "is_continuous", False) or not rescales_timesteps(scheduler.config):
        return t
    return t * (1000 / scheduler.config.num_train_timesteps)


def rescales_timesteps(config: dict) -> bool:
    """Whether a scheduler's config says that the network is told t * 1000 / T; stock pipelines would tell it t."""
    return bool((config.get("_ddpm_hf") or {}).get("rescale_timesteps"))
