"""Sheets of samples from a saved pipeline: plain, step by step, interpolated, or upsampled from images of a data set.

    from ddpm_hf.evaluation.samples import draw_samples, open_pipeline

    pipeline = open_pipeline("runs/digits/pipeline")
    draw_samples(pipeline, 64, num_inference_steps=100).picture().save("samples.png")

`**sampling` are arguments of the pipeline's call: generator, num_inference_steps, eta, guidance_scale, classifier_scale.
"""

import dataclasses
import os
from typing import Any

import torch
from PIL import Image

from ddpm_hf.evaluation.animation import animate
from ddpm_hf.evaluation.sheets import as_images, as_sheet, captions_of, class_columns, cycled_labels, row_captions
from ddpm_hf.models.conditioning import downsample
from ddpm_hf.pipelines import PIPELINE_CLASSES, CascadePipeline, DDPMImagePipeline, DDPMSuperResolutionPipeline
from ddpm_hf.pipelines.labels import label_ids

SHEET_BATCH = 256
INTERPOLATION_WEIGHTS = [i / 8 for i in range(9)]


@dataclasses.dataclass(frozen=True)
class SampleSheet:
    """The images of a sheet, row by row, with their captions."""

    images: list[Image.Image]
    columns: int | None = None  # None makes the sheet square
    captions: list[str] | None = None  # one for each image, as `as_sheet` takes them

    def picture(self) -> Image.Image:
        """All images as one picture."""
        return as_sheet(self.images, self.columns, self.captions)


def open_pipeline(path: str) -> DDPMImagePipeline | CascadePipeline:
    """Open a folder or Hub id as the class that its index names; a stock pipeline as `DDPMImagePipeline`."""
    name = DDPMImagePipeline.load_config(path)["_class_name"]
    name = name[-1] if isinstance(name, list) else name
    return next((cls for cls in PIPELINE_CLASSES if cls.__name__ == name), DDPMImagePipeline).from_pretrained(path)


def parse_class_label(pipeline, text: str | None, name: str = "class_label") -> int | None:
    """Return the label that a class name or a number stands for; a number that is also a class name means that class.

    Raises:
        ValueError: neither; the message has the argument's `name` and the nearest class names.
    """
    if text is None or text in pipeline.labels:
        return pipeline.labels.get(text)
    try:
        return int(text)
    except ValueError:
        return label_ids([text], pipeline.class_names, name)[0]


def number_of_classes(pipeline, sampling: dict) -> int | None:
    """The number of classes among which the arguments `sampling` of a pipeline's call choose; None without classes."""
    first = getattr(pipeline, "base", pipeline)
    classes = _labeled_network(first, sampling).num_classes
    return classes if classes or not isinstance(pipeline, CascadePipeline) else pipeline.upsampler.unet.num_classes


def draw_samples(pipeline, count: int, class_label: int | None = None, **sampling) -> SampleSheet:
    """Draw samples of a `DDPMImagePipeline`, all of one class or with a column for each class."""
    labels, columns, captions = _labels(pipeline, _labeled_network(pipeline, sampling), class_label, count)
    images: list[Image.Image] = []
    while len(images) < count:  # in batches, so that large sheets fit into memory
        part = slice(len(images), min(len(images) + SHEET_BATCH, count))
        batch = pipeline(part.stop - part.start, class_labels=None if labels is None else labels[part], **sampling)
        images += batch.images
    return SampleSheet(images, columns, captions)


def draw_cascade(
    pipeline: CascadePipeline, count: int, class_label: int | None = None, noise_level: float = 0.0, **sampling
) -> SampleSheet:
    """Draw samples of both stages of a cascade, as `draw_samples` does; both take the same steps and eta.

    Args:
        noise_level: level of noise added to the small images, 0 to 1.
    """
    network = _labeled_network(pipeline.base, sampling)
    labels, columns, captions = _labels(
        pipeline, network if network.num_classes else pipeline.upsampler.unet, class_label, count
    )
    output: Any = pipeline(
        count,
        class_labels=labels,
        noise_level=noise_level,
        upsampler_steps=sampling.get("num_inference_steps"),
        upsampler_kwargs={"eta": sampling.get("eta")},
        **sampling,
    )
    return SampleSheet(output.images, columns, captions)


def draw_denoising(pipeline, count: int, columns: int, class_label: int | None = None, **sampling) -> SampleSheet:
    """Draw a row for each sample: its predicted x_0 at evenly spaced steps from noise to image (Ho et al. 2020, figure 6)."""
    labels, _, captions = _labels(pipeline, _labeled_network(pipeline, sampling), class_label, count)
    steps = pipeline.progressive(count, class_labels=labels, **sampling)
    shown = {round(i * (pipeline.num_timesteps - 1) / (columns - 1)) for i in range(columns)}
    predictions = [x_start for i, (_, _, x_start) in enumerate(steps) if i in shown]
    images = as_images(torch.stack(predictions, dim=1).flatten(0, 1))
    return SampleSheet(images, len(predictions), row_captions(captions, count, len(predictions)))


def animate_samples(
    pipeline,
    path: str | os.PathLike,
    count: int,
    class_label: int | None = None,
    what: str = "both",
    fps: float = 20,
    **sampling,
) -> None:
    """Draw the samples of `draw_samples` as a moving picture of their denoising; `path`, `what` and `fps` as in `animate`."""
    labels, columns, captions = _labels(pipeline, _labeled_network(pipeline, sampling), class_label, count)
    steps = pipeline.progressive(count, class_labels=labels, with_samples=True, **sampling)
    if not pipeline.scheduler.config.get("centered", True):  # NCSN's images are in [0, 1]
        steps = ((t, 2 * x_t - 1, None if x_0 is None else 2 * x_0 - 1) for t, x_t, x_0 in steps)
    animate(steps, path, what, fps=fps, columns=columns, captions=captions)


def draw_interpolations(
    pipeline, x_start: torch.Tensor, timestep: int, class_label: int | None = None, **sampling
) -> SampleSheet:
    """Draw a row for each pair of images: source, mixtures with weights from 0 to 1, source (Ho et al. 2020, figure 8).

    Args:
        x_start: images (2 N, C, H, W) in [-1, 1]; images 2 i and 2 i + 1 are a pair.
        timestep: timestep at which the noisy images are mixed.
    """
    first, second = x_start[::2].to(pipeline.device), x_start[1::2].to(pipeline.device)
    count, columns = len(first), len(INTERPOLATION_WEIGHTS)
    labels, _, captions = _labels(pipeline, _labeled_network(pipeline, sampling), class_label, count)
    mixed = pipeline.interpolate(
        first, second, INTERPOLATION_WEIGHTS, timestep, output_type="latent", class_labels=labels, **sampling
    ).images
    rows = torch.cat((first[:, None], mixed.unflatten(0, (count, columns)), second[:, None]), dim=1)
    return SampleSheet(as_images(rows.flatten(0, 1)), columns + 2, row_captions(captions, count, columns + 2))


def draw_upsampled(
    pipeline: DDPMSuperResolutionPipeline,
    x_start: torch.Tensor,
    labels: torch.Tensor | None = None,
    noise_level: float = 0.0,
    **sampling,
) -> SampleSheet:
    """Draw the low-resolution, the upsampled and the original version of each image, four images to a row.

    Args:
        x_start: images (N, C, H, W) in [-1, 1].
        labels: labels of the images, (N,), for a class-conditional network.
        noise_level: level of noise added to the small images, 0 to 1.
    """
    small = downsample(x_start.to(pipeline.device), tuple(pipeline.config.low_resolution))
    output: Any = pipeline(small, output_type="latent", class_labels=labels, noise_level=noise_level, **sampling)
    enlarged = torch.nn.functional.interpolate(small.cpu(), x_start.shape[2:], mode="nearest")
    images = as_images(torch.cat((enlarged, output.images.cpu().clamp(-1, 1), x_start), dim=-1))
    return SampleSheet(images, 4, captions_of(pipeline, labels))


def _labeled_network(pipeline, sampling):
    """Return the network that defines the classes: the classifier if it guides, else the U-Net."""
    guided = sampling.get("classifier_scale") is not None and pipeline.classifier
    return pipeline.classifier if guided else pipeline.unet


def _labels(pipeline, network, class_label, count):
    """Return labels (N,) of one class or of all in turn, and the columns and captions of their sheet."""
    if class_label is not None:
        return torch.full((count,), class_label), None, None
    labels = cycled_labels(network, count)
    return labels, class_columns(network, count), captions_of(pipeline, labels)
