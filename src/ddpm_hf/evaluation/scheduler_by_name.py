"""Another scheduler for a saved pipeline, by its name and settings."""

import inspect
from typing import Any

import diffusers
from diffusers.schedulers.scheduling_utils import SchedulerMixin

import ddpm_hf
from ddpm_hf.arguments import listed, shown
from ddpm_hf.command_help import did_you_mean


def use_scheduler(pipeline, name: str | None, settings: dict[str, Any]) -> None:
    """Replace the scheduler of a pipeline, in a cascade that of both stages, by one made from its config.

    Args:
        name: a scheduler class of diffusers or of this package; None for the class that the pipeline has.
        settings: arguments of the class that differ from the config.

    Raises:
        ValueError: an unknown class or setting, with the nearest name, or a setting that the class refuses.
    """
    for stage in (pipeline.base, pipeline.upsampler) if hasattr(pipeline, "upsampler") else (pipeline,):
        cls = type(stage.scheduler) if name is None else _scheduler_class(name)
        known = [key for key in inspect.signature(cls.__init__).parameters if key not in ("self", "kwargs")]
        for key in settings:
            if key not in known:
                raise ValueError(
                    f"scheduler.{key} is no setting of {cls.__name__}{did_you_mean(key, known) or f'; it has {listed(known)}'}"
                )
        try:
            stage.scheduler = cls.from_config(stage.scheduler.config, **settings)
        except (ValueError, TypeError, NotImplementedError, ImportError) as error:
            raise ValueError(f"{cls.__name__} with {shown(settings)}: {' '.join(str(error).split())}") from None


def _scheduler_class(name):
    cls = getattr(ddpm_hf, name, None) or getattr(diffusers, name, None)
    if isinstance(cls, type) and issubclass(cls, SchedulerMixin):
        return cls
    known = [key for key in dir(diffusers) if key.endswith("Scheduler") and not key.startswith("Flax")]
    raise ValueError(f"scheduler={shown(name)} is no scheduler of diffusers{did_you_mean(name, known)}")
