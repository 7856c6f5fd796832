"""Another scheduler for a saved pipeline, by its name and settings."""

import inspect
from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

import ddpm_hf
from ddpm_hf.arguments import listed, shown
from ddpm_hf.command_help import did_you_mean
from ddpm_hf.evaluation.generation import stages_of
from ddpm_hf.files.diffusers_internals import missing_packages

TOLERANCE = 0.005  # between a process in continuous time and its timesteps


def use_scheduler(pipeline, name: str | None, settings: dict[str, Any]) -> None:
    """Replace the scheduler of a pipeline, in a cascade that of both stages, by one made from its config.

    Args:
        name: a scheduler class of diffusers or of this package; None for the class that the pipeline has.
        settings: arguments of the class that differ from the config.

    Raises:
        ValueError: an unknown class or setting, with the nearest name, a setting that the class refuses, or a class that does
            not sample the process of the pipeline.
    """
    for stage in stages_of(pipeline):
        cls = type(stage.scheduler) if name is None else _scheduler_class(name)
        known = [key for key in inspect.signature(cls.__init__).parameters if key not in ("self", "kwargs")]
        for key in settings:
            if key not in known:
                raise ValueError(
                    f"scheduler.{key} is no setting of {cls.__name__}{did_you_mean(key, known) or f'; it has {listed(known)}'}"
                )
        old = stage.scheduler
        try:
            plain, stage.scheduler = (cls.from_config(old.config, **kwargs) for kwargs in ({}, settings))
        except (ValueError, TypeError, NotImplementedError, ImportError) as error:
            given = f" with {shown(settings)}" if settings else ""
            raise ValueError(f"{cls.__name__}{given}: {' '.join(str(error).split())}") from None
        if cls is not type(old) and not any(_has_process_of(old, new) for new in (plain, stage.scheduler)):
            raise ValueError(
                f"{cls.__name__} does not sample the process of this pipeline ({type(old).__name__}); use DDIMScheduler, "
                "DPMSolverMultistepScheduler or another one with the same noise"
            )
        if hasattr(old, "levels") and "levels" not in vars(stage.scheduler):
            stage.scheduler.levels = old.levels  # of the data, which another scheduler does not change


def _has_process_of(old, new):
    """Whether the noise of the new scheduler is that of the old one, and its steps take the usual arguments."""
    step = inspect.signature(new.step).parameters if hasattr(new, "step") else {}
    required = {key for key, value in step.items() if value.default is value.empty and value.kind != value.VAR_KEYWORD}
    ours, theirs = _noise(old), _noise(new)
    if required != {"model_output", "timestep", "sample"} or ours is None or theirs is None:
        return False
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() < TOLERANCE)


def _noise(scheduler):
    """The factor of x_0 and the standard deviation of the noise in x_t at each timestep (2, T); None without them."""
    if getattr(scheduler, "is_continuous", False):
        count = scheduler.config.num_train_timesteps
        t = torch.arange(1, count + 1, dtype=torch.float64) / count
        return torch.stack((scheduler.sde.scale(t), scheduler.sde.std(t)))
    alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
    if alphas_cumprod is None:
        return None
    alphas_cumprod = torch.as_tensor(alphas_cumprod).double()
    return torch.stack((alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()))


def _scheduler_class(name):
    cls = getattr(ddpm_hf, name, None) or getattr(diffusers, name, None)
    if isinstance(cls, type) and issubclass(cls, SchedulerMixin):
        return cls
    if packages := missing_packages(cls):
        raise ValueError(f"{name} needs {' and '.join(packages)}; install them, or use another scheduler")
    known = [key for key in dir(diffusers) if key.endswith("Scheduler") and not key.startswith("Flax")]
    raise ValueError(f"scheduler={shown(name)} is no scheduler of diffusers{did_you_mean(name, known)}")
