"""Class labels of a pipeline, as numbers and as names."""

import difflib

import torch

from ddpm_hf.arguments import shown


def label_ids(names: list[str], class_names: list[str] | None, argument: str = "label") -> list[int]:
    """The label of each name.

    Args:
        names: of classes.
        class_names: the names of the labels 0, 1, ...
        argument: what errors call the names.

    Raises:
        ValueError: a name that no class has, with the nearest ones; no class names are known.
    """
    for name in names:
        if class_names is None:
            raise ValueError(f"{argument}={shown(name)}: the names of the classes are not known; give numbers")
        if name not in class_names:
            lower = {each.lower(): each for each in class_names}
            near = difflib.get_close_matches(str(name).lower(), lower)
            near = [lower[each] for each in near] or [each for key, each in lower.items() if str(name).lower() in key]
            hint = f"did you mean {' or '.join(map(shown, near[:3]))}?" if near else f"known: {shown(class_names)}"
            raise ValueError(f"{argument}={shown(name)} is not the name of a class; {hint}")
    return [class_names.index(name) for name in names]


def label_numbers(labels, class_names: list[str] | None):
    """`class_labels` with the names among them as numbers; what else is in them is checked later. Raises as `label_ids`."""
    if isinstance(labels, str):
        return label_ids([labels], class_names, "class_labels")[0]
    if isinstance(labels, (list, tuple)) and any(isinstance(label, str) for label in labels):
        return [label_numbers(label, class_names) for label in labels]
    return labels


def label_tensor(labels, batch_size: int, num_classes: int | None) -> torch.Tensor:
    """`class_labels` as a tensor with one entry for each image: int64 (B,) below `num_classes`, of any kind if that is None.

    Raises:
        ValueError: no numbers, numbers of no class, or of another number of images.
    """
    try:
        labels = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"class_labels={shown(labels)} must be numbers or names, one for each image") from None
    labels = labels.expand(batch_size) if labels.dim() == 0 else labels
    if num_classes is not None:
        other = labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool
        if other or labels.dim() != 1 or len(labels) == 0 or labels.min() < 0 or labels.max() >= num_classes:
            raise ValueError(
                f"class_labels={shown(labels.tolist())}: give integers from 0 to {num_classes - 1}, one for each image"
            )
        labels = labels.long()
    if labels.shape[0] != batch_size:
        raise ValueError(f"class_labels has {labels.shape[0]} entries for batch_size={batch_size}")
    return labels


class NamedClasses:
    """A pipeline that knows the names of its classes; a base class, listed before diffusers' `DiffusionPipeline`."""

    class_names: list[str] | None = None  # of the labels 0, 1, ...; None if they are not known

    @property
    def labels(self) -> dict[str, int]:
        """Class name -> label, as in diffusers' `DiTPipeline`; empty if the names are not known."""
        return {name: label for label, name in enumerate(self.class_names or [])}

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """The labels of one class name or several, as in diffusers' `DiTPipeline`; `class_labels` takes the names, too.

        Raises:
            ValueError: an unknown name, with the nearest ones.
        """
        return label_ids([label] if isinstance(label, str) else list(label), self.class_names)


def check_names(class_names: list[str] | None, others: list[str] | None, of: tuple[str, str]) -> None:
    """Raises ValueError if labels mean different classes in two networks or data sets whose names are both known.

    Args:
        of: whose names these are, for the message: ("the network", "the classifier").
    """
    if class_names is None or others is None or class_names == others:
        return
    at = next((i for i, (a, b) in enumerate(zip(class_names, others)) if a != b), min(len(class_names), len(others)))
    a, b = (shown(names[at]) if at < len(names) else "none" for names in (class_names, others))
    raise ValueError(
        f"label {at} is {a} of {of[0]}, {b} of {of[1]}: their classes must have the same names in one order"
    )
