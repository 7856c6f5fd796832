"""Class labels, as numbers and as names."""

import difflib

import torch

from ddpm_hf.arguments import shown


def label_ids(names: list[str], class_names: list[str] | None, argument: str = "label") -> list[int]:
    """Converts class names to labels.

    Args:
        names: class names.
        class_names: the names of labels 0, 1, ...
        argument: the argument that errors name.

    Raises:
        ValueError: a name is unknown (the message has the nearest ones), or there are no class names.
    """
    for name in names:
        if class_names is None:
            raise ValueError(f"{argument}={shown(name)}: the names of the classes are not known; give numbers")
        if name not in class_names:
            lower = {class_name.lower(): class_name for class_name in class_names}
            near = difflib.get_close_matches(str(name).lower(), lower)
            near = [lower[key] for key in near] or [
                class_name for key, class_name in lower.items() if str(name).lower() in key
            ]
            hint = f"did you mean {' or '.join(map(shown, near[:3]))}?" if near else f"known: {shown(class_names)}"
            raise ValueError(f"{argument}={shown(name)} is not the name of a class; {hint}")
    return [class_names.index(name) for name in names]


def label_numbers(labels, class_names: list[str] | None):
    """Replaces names in `class_labels` by numbers; other entries are checked later. Raises as `label_ids`."""
    if isinstance(labels, str):
        return label_ids([labels], class_names, "class_labels")[0]
    if isinstance(labels, (list, tuple)) and any(isinstance(label, str) for label in labels):
        return [label_numbers(label, class_names) for label in labels]
    return labels


def label_tensor(labels, batch_size: int, num_classes: int | None) -> torch.Tensor:
    """Converts `class_labels` to a tensor with one entry per image: int64 (B,) below `num_classes`, unchecked if that is None.

    Raises:
        ValueError: entries that are no numbers or no class, or a wrong number of entries.
    """
    try:
        labels = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"class_labels={shown(labels)} must be numbers or names, one for each image") from None
    labels = labels.expand(batch_size) if labels.dim() == 0 else labels
    if num_classes is not None:
        is_integer = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
        if not is_integer or labels.dim() != 1 or len(labels) == 0 or labels.min() < 0 or labels.max() >= num_classes:
            raise ValueError(
                f"class_labels={shown(labels.tolist())}: give integers from 0 to {num_classes - 1}, one for each image"
            )
        labels = labels.long()
    if labels.shape[0] != batch_size:
        raise ValueError(f"class_labels has {labels.shape[0]} entries for batch_size={batch_size}")
    return labels


class NamedClasses:
    """Base class of pipelines with class names; listed before diffusers' `DiffusionPipeline`."""

    class_names: list[str] | None = None  # of labels 0, 1, ...; None if unknown

    @property
    def labels(self) -> dict[str, int]:
        """Class name -> label, as in diffusers' `DiTPipeline`; empty if the names are unknown."""
        return {name: label for label, name in enumerate(self.class_names or [])}

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """Converts class names to labels, as diffusers' `DiTPipeline`; `class_labels` takes names, too.

        Raises:
            ValueError: a name is unknown; the message has the nearest ones.
        """
        return label_ids([label] if isinstance(label, str) else list(label), self.class_names)


def check_names(first: list[str] | None, second: list[str] | None, owners: tuple[str, str]) -> None:
    """Raises ValueError if two networks or data sets have different class names; None (unknown) agrees with all.

    Args:
        owners: for the message, such as ("the network", "the classifier").
    """
    if first is None or second is None or first == second:
        return
    label = next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))
    a, b = (shown(names[label]) if label < len(names) else "none" for names in (first, second))
    raise ValueError(
        f"label {label} is {a} of {owners[0]}, {b} of {owners[1]}: their classes must have the same names in one order"
    )
