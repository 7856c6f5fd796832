"""Conditioning times: what a network is given in place of a timestep (c_noise of Karras et al. 2022). Decided only here."""

from typing import Any


def conditioning_times(scheduler, t: Any) -> Any:
    """The conditioning times of timesteps: what to pass to the network in a sampling loop of your own.

    The result is t itself. With `rescale_timesteps` of `VariationalDDPMScheduler` it is t * 1000 / T, a float in [0, 1000);
    diffusers' schedulers that are made from its config keep that setting. In continuous time `scheduler.timesteps` are
    conditioning times already, and come back unchanged.

    Args:
        scheduler: of this package or of diffusers.
        t: 0-based timesteps: a number, or a tensor of any shape on any device. The host does not wait for a device.
    """
    if getattr(scheduler, "is_continuous", False) or not rescales_timesteps(scheduler.config):
        return t
    return t * (1000 / scheduler.config.num_train_timesteps)


def rescales_timesteps(config: dict) -> bool:
    """Whether a scheduler's config says that the network is given t * 1000 / T; stock pipelines would give it t."""
    return bool((config.get("_ddpm_hf") or {}).get("rescale_timesteps"))
