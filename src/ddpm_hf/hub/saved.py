"""The registry of saved classes: networks, schedulers and pipelines.

Networks and schedulers describe themselves by the class attributes of `SavedConfig` (schedulers are listed in
`schedulers/__init__.py`). Pipelines are described here, because their modules import this one.
"""

import os
from typing import NamedTuple

import diffusers
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ddpm_hf.files.pipeline_folder import PARTS, STAGES, component_classes, pipeline_class
from ddpm_hf.files.saved_config import SavedConfig
from ddpm_hf.models.classifier import NoisyClassifier
from ddpm_hf.models.unet import DDPMUNet
from ddpm_hf.schedulers import SCHEDULERS
from ddpm_hf.schedulers.conditioning_times import rescales_timesteps

NETWORKS = {"unet": DDPMUNet, "classifier": NoisyClassifier}


# files with the source of a class, beside its config
SOURCES = {cls.source_name for cls in (*NETWORKS.values(), *SCHEDULERS) if cls.source_name}


class PipelineKind(NamedTuple):
    """A kind of pipeline folder, and of repository.

    Attributes:
        name: the class of this package.
        components: the sub-folders.
        stock_class: the diffusers class that can also sample it, and which its index then names; None if there is none.
    """

    name: str
    components: tuple[str, ...] = PARTS
    stock_class: str | None = None

    @property
    def index_names(self) -> list:
        """The values that `_class_name` may have in the index of a repository of this kind."""
        return [["pipeline", self.name], *([self.stock_class] if self.stock_class else [])]

    def saved_name(self, index: dict, scheduler: dict) -> str | list[str]:
        """Returns `_class_name` for an index: the stock class if it can sample these parts, else [module, class].

        Args:
            scheduler: the config of the scheduler.
        """
        is_own = not own_sources(index).keys().isdisjoint({"unet", "scheduler"}) or rescales_timesteps(scheduler)
        return self.index_names[0] if self.stock_class is None or is_own else self.stock_class


IMAGE = PipelineKind("DDPMImagePipeline", stock_class="DDPMPipeline")
SUPER_RESOLUTION = PipelineKind("DDPMSuperResolutionPipeline")
CASCADE = PipelineKind("CascadePipeline", components=STAGES)
PIPELINES = (IMAGE, SUPER_RESOLUTION, CASCADE)


def kind_of_class(name: str) -> PipelineKind:
    """Returns the kind of pipeline for the class name in an index; other classes open as `DDPMImagePipeline`."""
    return next((kind for kind in PIPELINES if kind.name == name), IMAGE)


def kind_of_folder(index: dict, path: str | os.PathLike) -> PipelineKind | None:
    """Returns the kind of a saved pipeline by its index; None if this package did not save it.

    Raises:
        ValueError: the index is invalid.
    """
    name = pipeline_class(index, path)
    kind = next((kind for kind in PIPELINES if name in (kind.name, kind.stock_class)), None)
    if kind is not None:
        component_classes(index, path, kind.components)
    return kind


def own_sources(index: dict) -> dict[str, str]:
    """Returns part -> source file, for the parts in an index that diffusers cannot open."""
    entries = {name: entry for name, entry in index.items() if name in PARTS and isinstance(entry, list) and entry}
    return {name: f"{entry[0]}.py" for name, entry in entries.items() if entry[0] in SOURCES}


def class_of_part(part: str, class_name: str) -> type[SavedConfig] | None:
    """Returns the class of this package that opens a part saved under this class name; None if there is none."""
    classes = SCHEDULERS if part == "scheduler" else (NETWORKS[part],)
    names = ((cls, (cls.__name__, cls.stock_class, *cls.stands_for)) for cls in classes)
    return next((cls for cls, names_of_class in names if class_name in names_of_class), None)


def scheduler_class(class_name: str) -> type | None:
    """Returns the class, of this package or of diffusers, that opens a scheduler saved under this class name, or None."""
    cls = class_of_part("scheduler", class_name) or getattr(diffusers, class_name, None)
    return cls if isinstance(cls, type) and issubclass(cls, SchedulerMixin) else None
