"""How each class is saved and opened: the one registry of networks, schedulers and pipelines.

A network or a scheduler says it itself, by the class attributes of `SavedConfig`, and is listed here (schedulers in
`schedulers/__init__.py`). Pipelines lie above this module, so what they are is written here.
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

NETWORKS = {"unet": DDPMUNet, "classifier": NoisyClassifier}


# files with the source of a class, beside its config
SOURCES = {cls.source_name for cls in (*NETWORKS.values(), *SCHEDULERS) if cls.source_name}


class PipelineKind(NamedTuple):
    """A kind of pipeline folder, and of repository.

    Attributes:
        name: of the class in this package.
        parts: folders of its parts.
        stock_class: the diffusers class that samples it too, whose name its index has then; None if there is none.
    """

    name: str
    parts: tuple[str, ...] = PARTS
    stock_class: str | None = None

    @property
    def index_names(self) -> list:
        """What `_class_name` in the index of a repository of this kind may be."""
        return [["pipeline", self.name], *([self.stock_class] if self.stock_class else [])]

    def saved_name(self, index: dict) -> str | list[str]:
        """`_class_name` as it is saved: the stock class if that samples the parts of this index, else ours with its source."""
        own_scheduler = "scheduler" in own_sources(index)
        return self.index_names[0] if self.stock_class is None or own_scheduler else self.stock_class


IMAGE = PipelineKind("DDPMImagePipeline", stock_class="DDPMPipeline")
SUPER_RESOLUTION = PipelineKind("DDPMSuperResolutionPipeline")
CASCADE = PipelineKind("CascadePipeline", parts=STAGES)
PIPELINES = (IMAGE, SUPER_RESOLUTION, CASCADE)


def kind_of_class(name: str) -> PipelineKind:
    """The kind of pipeline that an index with this class is: stock pipelines of a U-Net and a scheduler are images'."""
    return next((kind for kind in PIPELINES if kind.name == name), IMAGE)


def kind_of_folder(index: dict, path: str | os.PathLike) -> PipelineKind | None:
    """The kind of the saved pipeline with this index; None if it is not one of this package.

    Raises:
        ValueError: an index that is not as it is saved.
    """
    name = pipeline_class(index, path)
    kind = next((kind for kind in PIPELINES if name in (kind.name, kind.stock_class)), None)
    if kind is not None:
        component_classes(index, path, kind.parts)
    return kind


def own_sources(index: dict) -> dict[str, str]:
    """Part -> file with the source of its class, of the parts in an index that no stock class opens."""
    entries = {name: entry for name, entry in index.items() if name in PARTS and isinstance(entry, list) and entry}
    return {name: f"{entry[0]}.py" for name, entry in entries.items() if entry[0] in SOURCES}


def class_of_part(part: str, class_name: str) -> type[SavedConfig] | None:
    """The class of this package that opens a part saved under this name; None if there is none."""
    known = SCHEDULERS if part == "scheduler" else (NETWORKS[part],)
    names = ((cls, (cls.__name__, cls.stock_class, *cls.stands_for)) for cls in known)
    return next((cls for cls, its_names in names if class_name in its_names), None)


def scheduler_class(class_name: str) -> type | None:
    """The class that opens a scheduler saved under this name: of this package, or of diffusers; None if there is none."""
    cls = class_of_part("scheduler", class_name) or getattr(diffusers, class_name, None)
    return cls if isinstance(cls, type) and issubclass(cls, SchedulerMixin) else None
