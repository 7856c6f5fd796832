"""The index of a saved pipeline, model_index.json."""

import json

from ddpm_hf.files.saved_config import SavedConfig, saved_name, sorted_json
from ddpm_hf.schedulers.conditioning_times import rescales_timesteps
from ddpm_hf.torch_internals import without_compiler


class SavedPipeline(SavedConfig):
    """Base class of pipelines whose index names diffusers' classes where these can open it, else the package's classes.

    It is listed before diffusers' `DiffusionPipeline`.
    """

    source_name = "pipeline"

    @property
    def is_stock(self) -> bool:
        """Whether `stock_class` can sample the saved pipeline: not if only this package has its network or its scheduler."""
        unet, scheduler = (without_compiler(self.components.get(name)) for name in ("unet", "scheduler"))
        is_stock = all(getattr(part, "is_stock", True) for part in (unet, scheduler))
        # a scheduler of diffusers may have the setting, too
        return self.stock_class is not None and is_stock and not rescales_timesteps(getattr(scheduler, "config", {}))

    @property
    def own_source(self) -> str:
        """`source_name`: every pipeline has its source beside it."""
        return self.source_name

    def to_json_string(self) -> str:
        """The content of model_index.json."""
        index = json.loads(super().to_json_string())
        for name, part in self.components.items():
            part = without_compiler(part)
            if part is None:
                index.pop(name, None)  # diffusers does not know the optional parts
            elif hasattr(part, "own_source"):
                index[name] = [part.own_source or "diffusers", saved_name(part)]
        index["_class_name"] = self.stock_class if self.is_stock else [self.source_name, saved_name(self)]
        return sorted_json(index)
