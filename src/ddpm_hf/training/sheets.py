"""The pictures that a run draws of its samples."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F

from ddpm_hf.arguments import sides
from ddpm_hf.data.dataset import PixelTensors
from ddpm_hf.data.pixels import pixels_to_batch
from ddpm_hf.evaluation.sheets import (
    as_images,
    as_sheet,
    captions_of,
    channel_statistics,
    class_columns,
    cycled_labels,
    row_captions,
    save_picture,
)
from ddpm_hf.models.conditioning import downsample
from ddpm_hf.training.averages import evaluating
from ddpm_hf.training.inputs import some_items
from ddpm_hf.training.low_resolution import make_pipeline
from ddpm_hf.training.messages import warn_on_write_error
from ddpm_hf.training.nearest import MAX_PAIRS, NearestImages

STRIP_ROWS, STRIP_COLUMNS = 8, 10


class Sheets:
    """Draws pictures from the same noise each time, into `<output_dir>/samples/` and the trackers:

    `<step>.png`, samples of the averaged weights; `<step>-denoising.png`, predictions of x_0 on the way to the first of them;
    `<step>-raw.png`, for the first `sample_raw` sheets, samples of the raw weights; `<step>-nearest.png`, samples beside the
    images that are nearest to them, the most alike first, where the data is kept in memory; instead of it for super-resolution
    `<step>-stages.png`: the small image, the enlarged one, and the original. As numbers: mean and standard deviation of each
    channel, and the median of the root mean square distances to the nearest images.
    """

    def __init__(self, config, unet, scheduler, dataset, *, accelerator, log, interrupts, average):
        self.config, self.unet, self.scheduler = config, unet, scheduler
        self.accelerator, self.log, self.interrupts, self.average = accelerator, log, interrupts, average
        self.folder = Path(config.output_dir, "samples")
        self.nearest = None
        if isinstance(dataset, PixelTensors) and len(dataset) > 1:
            self.nearest = NearestImages(
                dataset.tensors["pixels"], scheduler.levels, accelerator.device, config.random_flip
            )
        # of an upsampler: the images that are made small and enlarged again
        self.originals = some_items(dataset, config.sample_count) if config.low_resolution else None

    def draw(self, step: int) -> dict[str, float]:
        """Draw and save the pictures of this step; return the numbers, in the main process.

        Where sampling fails there are no pictures, and the numbers are NaN.

        Raises:
            Interrupted: a signal came while the network was sampling. In all processes.
        """
        self.log.begin_work(step, f"sampling a sheet of {self.config.sample_count} images")
        with evaluating(self.unet, self.average):
            x_start, strip = self._sample("samples")
        pictures = {"samples": x_start, "denoising": strip}
        every = self.config.sample_every
        if step % every == 0 and step // every <= self.config.sample_raw:
            with evaluating(self.unet):
                raw, _ = self._sample("samples, raw")
            pictures |= {} if raw is None else {"raw": raw}
        if not self.accelerator.is_main_process:
            return {}
        if x_start is None:
            unknown = torch.full((self.config.channels,), math.nan)
            return channel_statistics("samples", unknown, unknown)
        labels, width = self._labels(), strip.shape[1]
        columns: dict[str, int | None] = dict.fromkeys(
            ("samples", "raw"), class_columns(self.unet, len(x_start)) if self.originals is None else None
        )
        captions: dict[str, list[str] | None] = dict.fromkeys(("samples", "raw"), captions_of(self.unet, labels))
        columns["denoising"] = width
        captions["denoising"] = row_captions(captions["samples"], len(strip), width)
        numbers = channel_statistics("samples", x_start.mean((0, 2, 3)), (x_start**2).mean((0, 2, 3)))
        if self.originals is not None:
            pictures["stages"], columns["stages"] = self._stages(x_start), 4
            captions["stages"] = captions["samples"] and captions["samples"][:MAX_PAIRS]
        elif self.nearest:
            pictures["nearest"], distance = self.nearest.compare(x_start)
            columns["nearest"] = None
            of_data = self.nearest.distance_of_data(len(x_start))
            numbers |= {"nearest_rms_samples": distance, "nearest_rms_data": of_data}
        self.log.keep_folder()
        for name, images in pictures.items():
            sheet = as_sheet(as_images(images.flatten(0, -4)), columns[name], captions.get(name))
            with warn_on_write_error("a sheet of samples could not be written"):
                self.folder.mkdir(exist_ok=True)
                save_picture(sheet, self.folder / f"{step:07d}{'' if name == 'samples' else f'-{name}'}.png")
            self.log.show(step, name, sheet)
        return numbers

    def _sample(self, description):
        """Samples (N, C, H, W), of which each process computes a share, and predictions for the first (R, K, C, H, W).

        Both are None where sampling failed, and in all processes but the main one.
        """
        config, index, processes = self.config, self.accelerator.process_index, self.accelerator.num_processes
        scheduler = type(self.scheduler).from_config(self.scheduler.config)  # keeps the training's chain
        pipeline = make_pipeline(config, self.unet, scheduler)
        pipeline.set_progress_bar_config(desc=description, leave=False, disable=None if index == 0 else True)
        labels = self._labels()
        count = config.sample_count if self.originals is None else len(self.originals["pixels"])
        indices = range(index, count, processes)

        def sample():
            if not indices:
                return {}, {}
            # one for each, so that an image does not depend on the number of processes
            seeds = (config.seed * config.sample_count + i for i in indices)
            steps = config.sample_steps or scheduler.config.num_train_timesteps
            first = len(indices) if self.originals is None else self._low()[list(indices)]
            strip = []
            for _, _, x_start in pipeline.progressive(
                first,
                generator=[torch.Generator(self.unet.device).manual_seed(seed) for seed in seeds],
                num_inference_steps=config.sample_steps,
                class_labels=None if labels is None else labels[list(indices)],
                every=math.ceil(steps / STRIP_COLUMNS),
            ):
                strip.append(x_start[: len(range(index, STRIP_ROWS, processes))].cpu())
            samples = dict(zip(indices, x_start.clamp(-1, 1).float().cpu()))
            return samples, dict(zip(indices, torch.stack(strip, dim=1)))

        shares = self.interrupts.run(self.unet, sample)
        if index or shares is None:
            return None, None
        samples, strips = ({i: image for share in shares for i, image in share[kind].items()} for kind in (0, 1))
        return tuple(torch.stack([images[i] for i in sorted(images)]) for images in (samples, strips))

    def _labels(self):
        """The label of each sample (N,), or None without classes."""
        if self.originals is not None:
            return self.originals.get("class_labels")
        return cycled_labels(self.unet, self.config.sample_count)

    def _low(self):
        """The originals, made small: (N, C, h, w)."""
        x_start = pixels_to_batch(self.originals["pixels"], self.scheduler.levels)
        return downsample(x_start, sides(self.config.low_resolution))

    def _stages(self, x_start):
        """The small image, the enlarged one and the original, side by side (N, C, H, 3 W)."""
        low = F.interpolate(self._low(), x_start.shape[2:], mode="nearest")
        originals = pixels_to_batch(self.originals["pixels"], self.scheduler.levels)
        return torch.cat((low, x_start, originals), dim=-1)[:MAX_PAIRS]
