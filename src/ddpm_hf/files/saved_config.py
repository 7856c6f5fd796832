"""How a class is named in the JSON that is saved of it; part of a published pipeline.py."""

import json


def sorted_json(value: dict) -> str:
    """A config or an index as it is written: JSON with sorted keys, indented by two, ending in a newline."""
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def package_only(method):
    """Marks a method that is left out of a published pipeline.py, where calling it says that the package brings it.

    Private methods, and properties (as the decorator below `property`), leave no trace there.
    """
    return method


def saved_class(cls: type) -> type:
    """The class that instances are saved as: the nearest one, itself included, whose own body says how it is saved.

    So a user's bare subclass is saved, and opened again, as the class of this package behind it.
    """
    return next(base for base in cls.__mro__ if vars(base).keys() & {"stock_class", "stands_for", "source_name"})


class SavedConfig:
    """A part of a pipeline that says how it is saved and opened; a base class, listed before diffusers' `ConfigMixin`.

    Class attributes, which subclasses inherit:
        stock_class: the diffusers class under whose name it is saved because that class opens it too; None for its own name.
        stands_for: the diffusers classes whose saved configs this class opens in their place.
        source_name: the file, without ".py", that holds the source of this class beside its config; None where a stock
            class opens the config.
    """

    stock_class: str | None = None
    stands_for: tuple[str, ...] = ()
    source_name: str | None = None

    def to_json_string(self) -> str:
        """The config as JSON, under the name of `stock_class`, or where there is none, of the class that it is saved as."""
        config = json.loads(super().to_json_string())
        config.pop("_name_or_path", None)  # where it was loaded from concerns nobody else
        return sorted_json(config | {"_class_name": self.stock_class or saved_class(type(self)).__name__})
