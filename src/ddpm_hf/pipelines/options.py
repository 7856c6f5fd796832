"""Options of a sampling call, and their checks."""

import inspect
import operator
from dataclasses import dataclass
from numbers import Integral

import torch

from ddpm_hf.arguments import shown
from ddpm_hf.schedulers.ddpm import check_ddim_eta

OUTPUT_TYPES = ("pil", "np", "numpy", "pt", "latent")


@dataclass
class SamplingOptions:
    """Sampling options, as the arguments of `DDPMImagePipeline.__call__` of the same names."""

    generator: torch.Generator | list[torch.Generator] | None = None
    num_inference_steps: int | None = None
    eta: float | None = None
    class_labels: torch.Tensor | list[int | str] | int | str | None = None
    guidance_scale: float | torch.Tensor | None = None
    classifier_scale: float | torch.Tensor | None = None
    latents: torch.Tensor | None = None
    timesteps: list[int] | None = None
    sigmas: list[float] | None = None


def positive_integer(name: str, value) -> int:
    """Converts an integer argument, also of NumPy or a 0-d tensor, to an int. Raises ValueError if it is below 1."""
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{name}={value!r} must be an integer, 1 or more")
    return number


def check_output(output_type: str, channels: int) -> None:
    """Raises ValueError if `output_type` is unknown or cannot show images with this many channels."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type={output_type!r} is not known; choose one of {', '.join(OUTPUT_TYPES)}")
    if output_type == "pil" and channels not in (1, 3, 4):
        raise ValueError(f"output_type='pil' shows 1, 3 or 4 channels, this network has {channels}; use 'np' or 'pt'")


def check_callback_inputs(names: tuple[str, ...], allowed: list[str]) -> None:
    """Raises ValueError if `callback_on_step_end_tensor_inputs` has names that are not allowed."""
    try:
        unknown = [name for name in names if name not in allowed]
    except TypeError:
        raise ValueError(f"callback_on_step_end_tensor_inputs={shown(names)} must be a list of names") from None
    if unknown:
        raise ValueError(f"callback_on_step_end_tensor_inputs names {unknown[0]!r}; known are {', '.join(allowed)}")


def check_generator(generator, device: torch.device) -> None:
    """Raises ValueError unless this is None, a generator or a list of them, all on the CPU or all on `device`."""
    generators = generator if isinstance(generator, (list, tuple)) else [] if generator is None else [generator]
    wrong = [entry for entry in generators if not isinstance(entry, torch.Generator)]
    if wrong:
        seed = wrong[0] if isinstance(wrong[0], Integral) else 0
        raise ValueError(
            f"generator={generator!r} must be a torch.Generator or a list of them; use "
            f"torch.Generator().manual_seed({seed})"
        )
    devices = {entry.device.type for entry in generators}
    if len(devices) > 1 or devices - {"cpu", device.type}:
        raise ValueError(
            f"generator is on {', '.join(sorted(devices))}, the pipeline on {device.type}; give generators of one device, "
            f"{device.type}{' or cpu' if device.type != 'cpu' else ''}"
        )


def check_batch(options: SamplingOptions, batch_size: int, channels: int) -> int:
    """Returns the number of images: `batch_size`, or if that is 1, the number of latents.

    Raises:
        ValueError: wrong number of generators or latents, or latents with other channels.
    """
    batch_size, latents, generator = positive_integer("batch_size", batch_size), options.latents, options.generator
    if latents is not None and not isinstance(latents, torch.Tensor):
        raise ValueError(f"latents={shown(latents)} must be a tensor (B, {channels}, H, W)")
    if latents is not None and latents.dim() > 0 and latents.shape[0] != batch_size and batch_size == 1:
        batch_size = latents.shape[0]
    if isinstance(generator, (list, tuple)) and len(generator) != batch_size:
        raise ValueError(
            f"generator is a list of {len(generator)} for batch_size={batch_size}; give one for each image"
        )
    if latents is not None and (latents.dim() != 4 or latents.shape[:2] != (batch_size, channels)):
        raise ValueError(
            f"latents has shape {tuple(latents.shape)}; for batch_size={batch_size} give ({batch_size}, {channels}, H, W)"
        )
    return batch_size


def check_eta(eta: float | None, scheduler) -> None:
    """Raises ValueError if eta is outside [0, 1], or the scheduler has no eta."""
    if eta is None:
        return
    check_ddim_eta(eta)
    if "eta" not in inspect.signature(scheduler.step).parameters:
        raise ValueError(f"eta={eta}: {type(scheduler).__name__} has none; leave it out or use another scheduler")


def sample_from_callback(answer, sample: torch.Tensor) -> torch.Tensor:
    """Returns the sample for the next step: `callback_on_step_end` may replace it under "sample" or "latents".

    Raises:
        ValueError: the callback returned something other than None or a dict with a tensor.
    """
    if not isinstance(answer, torch.Tensor) and not answer:
        return sample
    values = [answer.get(name, sample) for name in ("sample", "latents")] if hasattr(answer, "get") else [None]
    changed = next((value for value in values if value is not sample), sample)
    if not isinstance(changed, torch.Tensor):
        raise ValueError(
            f"callback_on_step_end returned {shown(answer)}; return a dict, its sample or latents a tensor"
        )
    return changed


def repeated(values, count: int):
    """Repeats each value `count` times; a single or invalid value is returned as it is and checked later."""
    try:
        values = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        return values
    return values.repeat_interleave(count, dim=0) if values.dim() > 0 else values


def check_mixture(images_a: torch.Tensor, images_b: torch.Tensor, weights: list[float]) -> None:
    """Checks pairs of images (B, C, H, W) and the weights of their mixtures.

    Raises:
        ValueError: they are no tensors of one shape, or the weights are not one or more numbers in [0, 1].
    """
    if not (isinstance(images_a, torch.Tensor) and isinstance(images_b, torch.Tensor)):
        raise ValueError("images_a and images_b must be tensors (B, C, H, W) in [-1, 1]")
    if images_a.shape != images_b.shape:
        raise ValueError(f"images_a has shape {tuple(images_a.shape)}, images_b {tuple(images_b.shape)}; give the same")
    try:
        valid = len(weights) > 0 and all(0 <= weight <= 1 for weight in weights)
    except TypeError:
        valid = False
    if not valid:
        raise ValueError(f"weights={weights} must be numbers in [0, 1], one at least")
