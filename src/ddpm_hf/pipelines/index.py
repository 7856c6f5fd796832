"""The index of a saved pipeline, model_index.json."""

import json

from ddpm_hf.files.saved_config import SavedConfig, saved_class, sorted_json
from ddpm_hf.torch_internals import without_compiler


class SavedPipeline(SavedConfig):
    """Base class of pipelines whose index names diffusers' classes where these can open it, else the package's classes.

    It is listed before diffusers' `DiffusionPipeline`.
    """

    source_name = "pipeline"

    @property
    def is_stock(self) -> bool:
        """Whether `stock_class` can sample the saved pipeline: not if its scheduler exists only in this package."""
        scheduler = self.components.get("scheduler")
        return self.stock_class is not None and getattr(scheduler, "source_name", None) is None

    def to_json_string(self) -> str:
        """The content of model_index.json."""
        index = json.loads(super().to_json_string())
        for name, part in self.components.items():
            part = without_compiler(part)
            if part is None:
                index.pop(name, None)  # diffusers does not know the optional parts
            elif getattr(part, "source_name", None) is not None:
                index[name] = [part.source_name, saved_class(type(part)).__name__]
            elif getattr(part, "stock_class", None) is not None:
                index[name] = ["diffusers", part.stock_class]
        if not self.is_stock:
            index["_class_name"] = [self.source_name, saved_class(type(self)).__name__]
        return sorted_json(index)
