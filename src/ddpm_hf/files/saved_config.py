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


def saved_name(part: "SavedConfig") -> str | None:
    """Returns the class name under which an instance is saved: `stock_class`, or `saved_class` with its source beside."""
    return saved_class(type(part)).__name__ if part.own_source else part.stock_class


class SavedConfig:
    """Base class that defines how a part of a pipeline is saved and opened; listed before diffusers' `ConfigMixin`.

    Class attributes, which subclasses inherit:
        stock_class: the diffusers class that also opens the config of an instance that `is_stock`; None if there is none.
        stands_for: diffusers classes whose configs this class opens.
        source_name: file, without ".py", with the source of this class, beside the config of an instance that is not.
    """

    stock_class: str | None = None
    stands_for: tuple[str, ...] = ()
    source_name: str | None = None

    @property
    def is_stock(self) -> bool:
        """Whether `stock_class` samples this instance rightly; it is then saved under that name, else under its own."""
        return self.stock_class is not None

    @property
    def own_source(self) -> str | None:
        """`source_name` if the source is saved beside the config; None if `is_stock`."""
        return None if self.is_stock else self.source_name

    @classmethod
    def replaces(cls, part: object) -> bool:
        """Whether a part is of a diffusers class in `stands_for`; subclasses keep their own methods and are not replaced."""
        kind = type(part)
        return kind.__name__ in cls.stands_for and kind.__module__.partition(".")[0] == "diffusers"

    def to_json_string(self) -> str:
        """Returns the config as JSON, with the class name `saved_name`."""
        config = json.loads(super().to_json_string())
        config.pop("_name_or_path", None)  # a local path
        return sorted_json(config | {"_class_name": saved_name(self)})
