"""Classifier-free guidance (Ho & Salimans 2021) and classifier guidance (ADM, section 4)."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ddpm_hf.arguments import sides
from ddpm_hf.pipelines.labels import check_names
from ddpm_hf.schedulers.conditioning_times import conditioning_times, rescales_timesteps
from ddpm_hf.schedulers.ddpm import VariationalDDPMScheduler
from ddpm_hf.schedulers.precision import in_working_precision
from ddpm_hf.schedulers.prediction import PREDICTION_TYPES, score_weights


def scales(name: str, value: float | torch.Tensor | list[float], batch_size: int) -> torch.Tensor:
    """Converts a guidance scale, one for all images or one per image, to float32 (1, 1, 1, 1) or (B, 1, 1, 1).

    Raises:
        ValueError: a scale is no number, negative or not finite, or the number of scales is wrong.
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
    """Returns unconditional + scale * (conditional - unconditional): 0 ignores the class, 1 is the conditional network.

    Outputs (B, C or more, H, W), scale (B or 1, 1, 1, 1). Learned variances, behind the first `channels`, are the
    conditional network's. Ho & Salimans 2021, eq. 6, has scale = 1 + w.
    """
    mean = torch.lerp(unconditional[:, :channels], conditional[:, :channels], scale.to(conditional.dtype))
    return mean if conditional.shape[1] == channels else torch.cat((mean, conditional[:, channels:]), dim=1)


def shifted_output(
    model_output: torch.Tensor, gradient: torch.Tensor, scheduler, t: torch.Tensor | float
) -> torch.Tensor:
    """Guides any scheduler by epsilon - sqrt(1 - abar) * gradient (ADM, Algorithm 2).

    Args:
        model_output: (B, C, H, W), of the scheduler's `prediction_type`; other outputs than epsilon are shifted accordingly.
        gradient: gradient of scale * log p(y | x_t) with respect to x_t, (B, C, H, W), for a variance preserving process.
        t: timestep, which may lie between two timesteps of the process.
    """
    sigma = sigma_at(scheduler, t)
    abar = 1 / (1 + sigma**2)
    if not 1e-12 <= abar < 1:  # nothing of x_0 is left (zero terminal SNR), and no class; or no noise is left to shift
        return model_output
    # the gradient is added to the score, so 1 / of_output times the gradient to the output
    _, of_output = score_weights(scheduler.config.prediction_type, math.sqrt(abar), math.sqrt(1 - abar))
    output = in_working_precision(model_output)
    return output.add(gradient.to(output.dtype), alpha=1 / of_output).to(model_output.dtype)


def sigma_at(scheduler, t) -> float:
    """sqrt((1 - abar) / abar) at a timestep, linear between timesteps, as in diffusers."""
    abar, low = scheduler.alphas_cumprod.cpu().double(), math.floor(float(t))
    high = min(low + 1, len(abar) - 1)
    a, b = (((1 - abar[i]) / abar[i].clamp(min=1e-24)).sqrt().item() for i in (low, high))
    return a + (float(t) - low) * (b - a)


@dataclass
class GuidedNetwork:
    """A network with classifier-free guidance if there is a scale.

    Args:
        network: called as a `DDPMUNet`.
        channels: image channels. The network's output may have twice as many, with its variance behind the mean.
        class_labels: (B,); None for an unconditional network.
        scale: as in `classifier_free`, (B or 1, 1, 1, 1); None for no guidance.
        null_class: the label that means "no class".
        with_variance: whether the output keeps the variance channels.
    """

    network: Callable
    channels: int
    class_labels: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    null_class: int | None = None
    with_variance: bool = True

    def __post_init__(self):
        self._labels = self.class_labels
        if self.scale is not None:  # both in one call
            self._labels = torch.cat((self.class_labels, torch.full_like(self.class_labels, self.null_class)))

    def __call__(self, x_t: torch.Tensor, c_noise: torch.Tensor) -> torch.Tensor:
        """Returns the output at x_t (B, C, H, W) and c_noise (): (B, C, H, W), or (B, 2 C, H, W) with the variance."""
        if self.scale is None:
            output = self.network(x_t, c_noise, class_labels=self._labels, return_dict=False)[0]
        else:
            output = self.network(torch.cat((x_t, x_t)), c_noise, class_labels=self._labels, return_dict=False)[0]
            output = classifier_free(*output.chunk(2), self.scale, self.channels)
        if not self.with_variance and output.shape[1] == 2 * self.channels:
            output = output[:, : self.channels]
        return output


def classifier_free_arguments(pipeline, class_labels: torch.Tensor | None, guidance_scale, batch_size: int) -> dict:
    """Returns the arguments class_labels, scale and null_class of `GuidedNetwork`.

    Raises:
        ValueError: an invalid scale, a scale without labels or label dropout in training, or missing labels.
    """
    null = getattr(pipeline.unet, "null_class", None)
    scale = None if guidance_scale is None else scales("guidance_scale", guidance_scale, batch_size)
    if scale is not None and (null is None or class_labels is None):
        needed = "class_labels: give them" if null is not None else "a network trained with label dropout (null_class)"
        raise ValueError(f"guidance_scale={guidance_scale} needs {needed}, or leave it out")
    if class_labels is None and null is not None:
        class_labels = torch.full((batch_size,), null, device=pipeline.execution_device)
    if class_labels is None and pipeline.takes_labels:
        raise ValueError("class_labels are missing: this network is class-conditional; give one for each image")
    labels = class_labels if pipeline.takes_labels else None  # else they are the classifier's
    if scale is None or (scale == 1).all():
        return {"class_labels": labels}
    return {"class_labels": labels, "scale": scale.to(pipeline.execution_device), "null_class": null}


@dataclass
class ClassifierGradient:
    """The gradient of classifier guidance, with a scale (B or 1, 1, 1, 1) and class labels y (B,)."""

    classifier: torch.nn.Module
    class_labels: torch.Tensor
    scale: torch.Tensor

    def __call__(self, x_t: torch.Tensor, c_noise: torch.Tensor) -> torch.Tensor:
        """Returns the gradient of scale * log p(y | x_t) with respect to x_t, (B, C, H, W), float32."""
        return self.classifier.gradient(x_t, c_noise, self.class_labels, self.scale)

    def shifted(self, model_output: torch.Tensor, x_t: torch.Tensor, scheduler, t: torch.Tensor) -> torch.Tensor:
        """Returns `shifted_output` with the gradient at x_t."""
        return shifted_output(model_output, self(x_t, conditioning_times(scheduler, t)), scheduler, t)


def classifier_gradient(
    pipeline, class_labels: torch.Tensor | None, classifier_scale, batch_size: int
) -> ClassifierGradient | None:
    """Returns the gradient of a pipeline's classifier, in float32 and evaluation mode; None for no guidance.

    Raises:
        ValueError: an invalid scale, no labels or classifier, or a classifier of other images or another process.
    """
    scale = None if classifier_scale is None else scales("classifier_scale", classifier_scale, batch_size)
    if scale is None:
        return None
    classifier, unet = pipeline.classifier, pipeline.unet
    if classifier is None or class_labels is None:
        needed = "class_labels" if classifier is not None else "a classifier: DDPMImagePipeline(..., classifier=)"
        raise ValueError(f"classifier_scale={classifier_scale} needs {needed}")
    check_classifier(
        classifier,
        pipeline.scheduler,
        num_classes=getattr(unet, "num_classes", None),
        channels=pipeline.channels,
        sample_size=unet.config.sample_size,
        class_names=getattr(unet, "class_names", None),
    )
    if (scale == 0).all():
        return None
    if classifier.dtype != torch.float32 or classifier.training:
        classifier = copy.deepcopy(classifier).float().eval()
    return ClassifierGradient(classifier, class_labels, scale.to(pipeline.execution_device))


def check_classifier(
    classifier: torch.nn.Module,
    scheduler,
    *,
    num_classes: int | None,
    channels: int,
    sample_size: int | tuple[int, int] | None,
    class_names: list[str] | None = None,
) -> None:
    """Checks that a `NoisyClassifier` fits the network and the scheduler that it guides.

    Args:
        num_classes: the network's number of classes; None for none.
        channels, sample_size: the network's; None for any size.
        class_names: the network's; None if unknown.

    Raises:
        ValueError: classes, channels, image size or process differ, or the scheduler cannot be guided.
    """
    config = classifier.config
    for name, theirs, ours in (
        ("classes", config.num_classes, num_classes),
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
    process = VariationalDDPMScheduler.from_config(config.scheduler)
    theirs, ours = (rescales_timesteps(of.config) for of in (process, scheduler))
    if theirs != ours:
        raise ValueError(f"the classifier was trained with rescale_timesteps={theirs}, the scheduler has {ours}")
    trained = process.alphas_cumprod
    if len(trained) != len(abar):
        raise ValueError(f"the classifier was trained with T={len(trained)}, the scheduler has T={len(abar)}")
    difference = (trained - abar.cpu().double()).abs()
    if difference.max() > 1e-3:  # float32 tables differ by less
        t = int(difference.argmax())
        raise ValueError(
            f"the classifier was trained with another schedule: at t={t} its alphas_cumprod is {trained[t]:.4g}, the "
            f"scheduler's {float(abar[t]):.4g}"
        )
