"""How a pipeline's parts are named in the index of its folder, model_index.json."""

import json

from ddpm_hf.files.saved_config import SavedConfig, saved_class, sorted_json


class SavedPipeline(SavedConfig):
    """A pipeline whose index is in diffusers' own class names where diffusers can open it, and names our classes where not.

    A base class, listed before diffusers' `DiffusionPipeline`.
    """

    source_name = "pipeline"

    @property
    def is_stock(self) -> bool:
        """Whether `stock_class` samples the saved pipeline: it cannot if a part's class is only in this package."""
        scheduler = self.components.get("scheduler")
        return self.stock_class is not None and getattr(scheduler, "source_name", None) is None

    def to_json_string(self) -> str:
        """The pipeline's index as it is saved."""
        index = json.loads(super().to_json_string())
        for name, part in self.components.items():
            part = getattr(part, "_orig_mod", part)  # of torch.compile
            if part is None:
                index.pop(name, None)  # stock classes do not know our optional parts
            elif getattr(part, "source_name", None) is not None:
                index[name] = [part.source_name, saved_class(type(part)).__name__]
            elif getattr(part, "stock_class", None) is not None:
                index[name] = ["diffusers", part.stock_class]
        if not self.is_stock:
            index["_class_name"] = [self.source_name, saved_class(type(self)).__name__]
        return sorted_json(index)
