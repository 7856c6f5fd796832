"""The class names in saved configs; part of a published pipeline.py."""

import json


def sorted_json(value: dict) -> str:
    """Returns a config or index as JSON text with sorted keys, indented by two, ending in a newline."""
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def package_only(method):
    """Marks a method for the package only; in a published pipeline.py it raises an error that names the package.

    Private methods, and properties (with this decorator below `property`), are left out there.
    """
    return method


def saved_class(cls: type) -> type:
    """Returns the class that instances are saved as: the nearest base, or `cls`, whose body sets an attribute of `SavedConfig`.

    A user's plain subclass is thus saved and opened as the package's class.
    """
    return next(base for base in cls.__mro__ if vars(base).keys() & {"stock_class", "stands_for", "source_name"})


class SavedConfig:
    """Base class that defines how a part of a pipeline is saved and opened; listed before diffusers' `ConfigMixin`.

    Class attributes, which subclasses inherit:
        stock_class: the diffusers class that also opens the config, which is saved under its name; None for its own name.
        stands_for: diffusers classes whose configs this class opens.
        source_name: file, without ".py", with the source of this class beside its config; None if a diffusers class opens it.
    """

    stock_class: str | None = None
    stands_for: tuple[str, ...] = ()
    source_name: str | None = None

    @classmethod
    def replaces(cls, part: object) -> bool:
        """Whether a part is of a diffusers class in `stands_for`; subclasses keep their own methods and are not replaced."""
        kind = type(part)
        return kind.__name__ in cls.stands_for and kind.__module__.partition(".")[0] == "diffusers"

    def to_json_string(self) -> str:
        """Returns the config as JSON, with the class name `stock_class`, or without one that of `saved_class`."""
        config = json.loads(super().to_json_string())
        config.pop("_name_or_path", None)  # a local path
        return sorted_json(config | {"_class_name": self.stock_class or saved_class(type(self)).__name__})
