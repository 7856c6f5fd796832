"""Numbers the labels of a data set as classes 0, 1, ..., and names the classes."""

import contextlib
import dataclasses

import datasets

from ddpm_hf.arguments import listed, shown
from ddpm_hf.data.folders import in_order


@dataclasses.dataclass(frozen=True)
class LabelColumn:
    """A label column of a data set, and the class of each of its values."""

    name: str
    ids: dict | None  # value -> class, see `label_ids`; None if the values are the classes
    num_classes: int | None  # classes are 0 to num_classes - 1; None for no limit

    def class_of(self, label) -> int:
        """Returns the class of one image's label. Raises ValueError if the label is missing or has no class."""
        label_id = label if self.ids is None else self.ids.get(label)
        if isinstance(label_id, int) and 0 <= label_id < (self.num_classes or label_id + 1):
            return int(label_id)
        problem = f"label_column={shown(self.name)} holds {shown(label)}"
        if label is None:
            raise ValueError(f"{problem} for an image; give it a label, or remove it")
        if self.ids is not None:
            raise ValueError(f"{problem}, which is none of the known labels")
        raise ValueError(
            f"{problem}; labels of a stream must be integers, 0 to {(self.num_classes or 0) - 1}: other labels cannot be "
            "numbered before the whole stream has been read"
        )


def label_ids(
    dataset: datasets.Dataset | datasets.IterableDataset,
    label_column: str | None,
    num_classes: int | None = None,
    class_names: list[str] | None = None,
) -> dict | None:
    """Returns the class 0, 1, ... of each value of a label column.

    Args:
        label_column: its name; None for a data set without labels.
        num_classes: the largest number of classes; integers below it are taken as classes.
        class_names: names of the classes 0, 1, ... of another data set; values get the class of the same name.

    Returns:
        value -> class, in the order of classes; None if the values are the classes already. Also None for a stream, whose
        values are unknown before it is read, unless the type of the column or `class_names` lists them.

    Raises:
        ValueError: a missing label, more labels than `num_classes`, or a label that is not among `class_names`.
    """
    if label_column is None:
        return None
    feature = _label_feature(dataset, label_column)
    type_names, streaming = _names_by_type(feature), isinstance(dataset, datasets.IterableDataset)
    present = set() if streaming else _present_values(dataset, label_column, type_names)
    values = present | set(range(len(type_names or ())))
    if class_names is not None:
        ids = {name: i for i, name in enumerate(class_names)}
        if streaming and not type_names:
            return {_parse_value(name, feature): i for name, i in ids.items()}
        names = {value: type_names[value] if type_names else str(value) for value in values}
        unknown = {names[value] for value in present} - ids.keys()
        if unknown:
            raise ValueError(
                f"label_column={shown(label_column)} has the label {shown(min(unknown))}; known are {listed(class_names)}"
            )
        return {value: ids[name] for value, name in names.items() if name in ids}
    if num_classes is not None and len(values) > num_classes:
        raise ValueError(
            f"label_column={shown(label_column)} has {len(values)} labels, the network {num_classes} classes; set "
            f"unet.num_class_embeds, or classifier.num_classes, to {len(values)}"
        )
    if type_names or all(isinstance(value, int) and 0 <= value < (num_classes or len(values)) for value in values):
        return None
    texts = [value for value in values if isinstance(value, str)]
    return {value: i for i, value in enumerate(in_order(texts) if len(texts) == len(values) else sorted(values))}


def label_names(
    dataset: datasets.Dataset | datasets.IterableDataset, label_column: str | None, num_classes: int | None = None
) -> list[str] | None:
    """Returns the names of the classes 0, 1, ... that `training_set` makes of a label column.

    They are the texts of the column, the names of a `ClassLabel`, or the numbers themselves. The result is None without a
    label column, and for a stream unless the column's type has the names or, for integers, `num_classes` is given.
    """
    if label_column is None:
        return None
    ids = label_ids(dataset, label_column, num_classes)
    if ids is not None:
        return [str(value) for value in ids]
    feature = dataset.features[label_column]
    if names := _names_by_type(feature):
        return names
    if isinstance(dataset, datasets.IterableDataset):
        count = num_classes if "int" in feature.dtype else None
    else:
        count = num_classes or len(dataset.unique(label_column))
    return None if count is None else [str(i) for i in range(count)]


def _label_feature(dataset, label_column):
    if label_column not in dataset.column_names:
        hint = "; for no labels give null" if label_column.lower() == "none" else ""
        raise ValueError(
            f"label_column={shown(label_column)} is not in the data; it has {listed(dataset.column_names)}{hint}"
        )
    feature = dataset.features[label_column]
    if not isinstance(feature, (datasets.Value, datasets.ClassLabel)):
        raise ValueError(f"label_column={shown(label_column)} holds {shown(feature)}, not labels")
    return feature


def _names_by_type(feature):
    """Returns the names of the values 0, 1, ... of a column if its type has names, else None."""
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    return ["False", "True"] if feature.dtype == "bool" else None


def _present_values(dataset, label_column, type_names):
    """Returns the distinct values of a column. Raises ValueError for a missing value: None, NaN, or -1 in a `ClassLabel`."""

    def is_missing(value):
        return value is None or value != value or (type_names is not None and value < 0)

    values = set(dataset.unique(label_column))  # takes milliseconds for a million rows
    if any(map(is_missing, values)):
        count = sum(map(is_missing, dataset[label_column]))
        raise ValueError(
            f"label_column={shown(label_column)} has no value in {count} of {len(dataset)} rows; fill or remove them"
        )
    return values


def _parse_value(name, feature):
    """Converts the name of a class to a value of the column's type."""
    if "int" in feature.dtype:
        with contextlib.suppress(ValueError):
            return int(name)
    return name
