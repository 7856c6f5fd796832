"""Guidance of sampling by class: classifier-free (Ho & Salimans 2021), and by a classifier of noisy images (ADM, section 4)."""

import difflib
import math

import torch

from ddpm_hf.arguments import shown, sides
from ddpm_hf.models.classifier import NoisyClassifier
from ddpm_hf.schedulers.ddpm import VariationalDDPMScheduler
from ddpm_hf.schedulers.prediction import PREDICTION_TYPES, score_weights


def scales(name: str, value: float | torch.Tensor | list[float], batch_size: int) -> torch.Tensor:
    """A scale of guidance, one for all images or one for each, as (B, 1, 1, 1) or (1, 1, 1, 1), float32.

    Raises:
        ValueError: not a number or one for each of batch_size images, negative, or not finite.
    """
    try:
        scale = torch.as_tensor(value, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name}={value!r} must be a number, or one for each image") from None
    if scale.dim() > 1 or (scale.dim() == 1 and len(scale) != batch_size):
        raise ValueError(
            f"{name} has shape {tuple(scale.shape)} for batch_size={batch_size}; give a number or ({batch_size},)"
        )
    if not (scale.isfinite() & (scale >= 0)).all():
        raise ValueError(f"{name}={scale.tolist()} must be 0 or more, and finite")
    return scale.reshape(-1, 1, 1, 1)


def classifier_free(
    conditional: torch.Tensor, unconditional: torch.Tensor, scale: torch.Tensor, channels: int
) -> torch.Tensor:
    """unconditional + scale * (conditional - unconditional): 0 is without the class, 1 the conditional network itself.

    Outputs (B, C or more, H, W), scale (B or 1, 1, 1, 1). What follows the first `channels`, learned variances, is the
    conditional network's. With w of Ho & Salimans 2021, eq. 6, scale is 1 + w.
    """
    mean = torch.lerp(unconditional[:, :channels], conditional[:, :channels], scale.to(conditional.dtype))
    return mean if conditional.shape[1] == channels else torch.cat((mean, conditional[:, channels:]), dim=1)


def shifted_output(model_output: torch.Tensor, gradient: torch.Tensor, scheduler, t: torch.Tensor | float):
    """ADM, Algorithm 2, for schedulers that know nothing of guidance: epsilon - sqrt(1 - abar) * gradient.

    Args:
        model_output: (B, C, H, W), of the scheduler's `prediction_type`: for "sample" and "v_prediction" the same shift.
        gradient: of scale * log p(y | x_t) by x_t, (B, C, H, W), where x_t has variance abar + (1 - abar).
        t: timestep, which may lie between two of the process.
    """
    sigma = sigma_at(scheduler, t)
    abar = 1 / (1 + sigma**2)
    if not 1e-12 <= abar < 1:  # nothing of x_0 is left (zero terminal SNR), and no class; or no noise is left to shift
        return model_output
    # the score gains the gradient, the output what makes it gain as much
    _, of_output = score_weights(scheduler.config.prediction_type, math.sqrt(abar), math.sqrt(1 - abar))
    exact = torch.promote_types(model_output.dtype, torch.float32)
    return model_output.to(exact).add(gradient.to(exact), alpha=1 / of_output).to(model_output.dtype)


def sigma_at(scheduler, t) -> float:
    """sqrt((1 - abar) / abar) at a timestep, between two linear, as diffusers' schedulers of sigmas have it."""
    abar, low = scheduler.alphas_cumprod.cpu().double(), math.floor(float(t))
    high = min(low + 1, len(abar) - 1)
    a, b = (((1 - abar[i]) / abar[i].clamp(min=1e-24)).sqrt().item() for i in (low, high))
    return a + (float(t) - low) * (b - a)


def label_ids(names: list[str], class_names: list[str] | None, argument: str = "label") -> list[int]:
    """The label of each name; `class_names` are those of the labels 0, 1, ..., `argument` is named in messages.

    Raises:
        ValueError: a name that is not among them, with the nearest ones; no names are known.
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


class NamedClasses:
    """What a pipeline has of the names of its classes, before diffusers' `DiffusionPipeline` among its bases."""

    class_names = None  # of the labels 0, 1, ...; None where they are not known

    @property
    def labels(self) -> dict[str, int]:
        """Class name -> label, as diffusers' `DiTPipeline` has it; empty where the names are not known."""
        return {name: label for label, name in enumerate(self.class_names or [])}

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """The labels of class names, or of one, as diffusers' `DiTPipeline`; `class_labels` takes the names, too.

        Raises:
            ValueError: an unknown name, with the nearest ones.
        """
        return label_ids([label] if isinstance(label, str) else list(label), self.class_names)


def check_names(class_names: list[str] | None, others: list[str] | None, of: tuple[str, str]) -> None:
    """Whether labels mean the same in two networks or data sets, where the names of both are known.

    Args:
        of: whose names these are, for the message, as ("the network", "the classifier").

    Raises:
        ValueError: other names, or the same in another order.
    """
    if class_names is None or others is None or class_names == others:
        return
    at = next((i for i, (a, b) in enumerate(zip(class_names, others)) if a != b), min(len(class_names), len(others)))
    a, b = (shown(names[at]) if at < len(names) else "none" for names in (class_names, others))
    raise ValueError(
        f"label {at} is {a} of {of[0]}, {b} of {of[1]}: their classes must have the same names in one order"
    )


def check_classifier(
    classifier: NoisyClassifier,
    scheduler,
    classes: int | None,
    channels: int,
    sample_size: int | tuple[int, int] | None,
    class_names: list[str] | None = None,
) -> None:
    """Whether a classifier was trained on what the network is asked for, by their saved configs.

    Args:
        scheduler: whose steps are to be guided.
        classes: of the network's labels; None for a network without.
        channels, sample_size: of its images; None for any size.
        class_names: of the network's labels, compared where the classifier's are known too.

    Raises:
        ValueError: other classes, channels or image size than the network's; another process than the scheduler's; a scheduler
            whose steps cannot be guided.
    """
    config = classifier.config
    for name, theirs, ours in (
        ("classes", config.num_classes, classes),
        ("channels", config.in_channels, channels),
    ):
        if ours is not None and theirs != ours:
            raise ValueError(f"the classifier has {theirs} {name}, the network {ours}; train one for this network")
    check_names(class_names, classifier.class_names, ("the network", "the classifier"))
    if sample_size is not None and sides(config.sample_size) != sides(sample_size):
        theirs, ours = ("x".join(map(str, sides(size))) for size in (config.sample_size, sample_size))
        raise ValueError(f"the classifier is of {theirs} images, the network of {ours}")
    abar = getattr(scheduler, "alphas_cumprod", None)
    if abar is None or scheduler.config.prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"{type(scheduler).__name__} has no alphas_cumprod; a classifier guides DDPM and DDIM schedulers"
        )
    if config.scheduler is None:
        raise ValueError(
            "the classifier's config does not say of which process its noisy images are; train it by "
            "training/train_classifier.py, or set its `scheduler`"
        )
    trained = VariationalDDPMScheduler.from_config(config.scheduler).alphas_cumprod
    if len(trained) != len(abar):
        raise ValueError(f"the classifier was trained with T={len(trained)}, the scheduler has T={len(abar)}")
    difference = (trained - abar.cpu().double()).abs()
    if difference.max() > 1e-3:  # float32 tables differ by less
        t = int(difference.argmax())
        raise ValueError(
            f"the classifier was trained with another schedule: at t={t} its alphas_cumprod is {trained[t]:.4g}, the "
            f"scheduler's {float(abar[t]):.4g}"
        )
