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
from ddpm_hf.training.interrupts import going_on
from ddpm_hf.training.stages import pipeline_of, some_items

STRIP_ROWS, STRIP_COLUMNS, PAIRS = 8, 10, 32


AT_ONCE = 2**24  # values of the data that a search holds, as float32


class Sheets:
    """Every `sample_every` steps, from the same noise each time, into `<output_dir>/samples/` and the trackers:

    `<step>.png`, samples of the averaged weights; `<step>-denoising.png`, what the first of them were predicted to be on the
    way; `<step>-raw.png`, for the first `sample_raw` sheets, samples of the weights as they are; `<step>-nearest.png`, samples
    beside the images that are nearest to them, the most alike first, where the data is kept in memory. Of a network that
    makes images larger `<step>-stages.png` in place of this one: what it was given, what it made of it, and the image itself.
    In numbers: mean
    and standard deviation of each channel, and the median of the root mean square distances to the nearest images.
    """

    def __init__(self, config, accelerator, unet, scheduler, dataset, log, signals, average, raw):
        self.config, self.accelerator, self.unet, self.scheduler = config, accelerator, unet, scheduler
        self.signals = signals
        self.average, self.raw, self.log = average, raw, log
        self.folder = Path(config.output_dir, "samples")
        self.pixels = dataset.tensors["pixels"] if isinstance(dataset, PixelTensors) else None
        self.distance_of_data = None  # not before it is needed
        self.given = some_items(dataset, config.sample_count) if config.low_resolution else None

    def draw(self, step: int) -> dict[str, float]:
        """Draws and saves the pictures of this step; returns the numbers, in the main process.

        Where sampling fails there are no pictures, and the numbers are not finite.

        Raises:
            Interrupted: a signal came while the network was sampling. In all processes.
        """
        self.log.say(f"step {step:,}: sampling a sheet of {self.config.sample_count} images")
        with self.average:
            x_start, strip = self._sample("samples")
        pictures = {"samples": x_start, "denoising": strip}
        if step // self.config.sample_every <= self.config.sample_raw:
            with self.raw:
                raw, _ = self._sample("samples, raw")
            pictures |= {} if raw is None else {"raw": raw}
        if not self.accelerator.is_main_process:
            return {}
        if x_start is None:
            unknown = torch.full((self.config.channels,), math.nan)
            return channel_statistics("samples", unknown, unknown)
        labels, width = self._labels(), strip.shape[1]
        columns = dict.fromkeys(
            ("samples", "raw"), class_columns(self.unet, len(x_start)) if self.given is None else None
        )
        captions = dict.fromkeys(("samples", "raw"), captions_of(self.unet, labels))
        columns["denoising"] = width
        captions["denoising"] = row_captions(captions["samples"], len(strip), width)
        numbers = channel_statistics("samples", x_start.mean((0, 2, 3)), (x_start**2).mean((0, 2, 3)))
        if self.given is not None:
            pictures["stages"], columns["stages"] = self._stages(x_start), 4
            captions["stages"] = captions["samples"] and captions["samples"][:PAIRS]
        elif self.pixels is not None and len(self.pixels) > 1:
            pictures["nearest"], distances = self._nearest(x_start)
            columns["nearest"] = None
            numbers |= {"nearest_rms_samples": distances, "nearest_rms_data": self.distance_of_data}
        self.log.keep_folder()
        for name, images in pictures.items():
            sheet = as_sheet(as_images(images.flatten(0, -4)), columns[name], captions.get(name))
            with going_on("a sheet of samples could not be written"):
                self.folder.mkdir(exist_ok=True)
                save_picture(sheet, self.folder / f"{step:07d}{'' if name == 'samples' else f'-{name}'}.png")
            self.log.show(step, name, sheet)
        return numbers

    def _sample(self, told):
        """Samples (N, C, H, W), each process's share computed there; the way to the first (R, K, C, H, W).

        None for both but in main, and there where `measure` failed.
        """
        config, index, processes = self.config, self.accelerator.process_index, self.accelerator.num_processes
        scheduler = type(self.scheduler).from_config(self.scheduler.config)  # the training's own chain shall stay
        pipeline = pipeline_of(config, self.unet, scheduler)
        pipeline.set_progress_bar_config(desc=told, leave=False, disable=None if index == 0 else True)
        labels = self._labels()
        count = config.sample_count if self.given is None else len(self.given["pixels"])
        mine = range(index, count, processes)

        def sample():
            if not mine:
                return {}, {}
            # of its own for each, so that an image does not hang on how many processes there are
            seeds = (config.seed * config.sample_count + i for i in mine)
            steps = config.sample_steps or scheduler.config.num_train_timesteps
            first = len(mine) if self.given is None else self._low()[list(mine)]
            strip = []
            for _, _, x_start in pipeline.progressive(
                first,
                generator=[torch.Generator(self.unet.device).manual_seed(seed) for seed in seeds],
                num_inference_steps=config.sample_steps,
                class_labels=None if labels is None else labels[list(mine)],
                every=math.ceil(steps / STRIP_COLUMNS),
            ):
                strip.append(x_start[: len(range(index, STRIP_ROWS, processes))].cpu())
            found = dict(zip(mine, x_start.clamp(-1, 1).float().cpu()))
            return found, dict(zip(mine, torch.stack(strip, dim=1)))

        shares = self.signals.measure(self.unet, sample)
        if index or shares is None:
            return None, None
        found, strip = ({i: image for share in shares for i, image in share[which].items()} for which in (0, 1))
        return tuple(torch.stack([images[i] for i in sorted(images)]) for images in (found, strip))

    def _labels(self):
        """The label of each sample, (N,); None without classes."""
        if self.given is not None:
            return self.given.get("class_labels")
        return cycled_labels(self.unet, self.config.sample_count)

    def _low(self):
        """Some images of the data, made small: (N, C, h, w)."""
        x_start = pixels_to_batch(self.given["pixels"], self.scheduler.levels)
        return downsample(x_start, sides(self.config.low_resolution))

    def _stages(self, x_start):
        """What the network was given, what it made of it, and the image itself, side by side (N, C, H, 3 W)."""
        low = F.interpolate(self._low(), x_start.shape[2:], mode="nearest")
        itself = pixels_to_batch(self.given["pixels"], self.scheduler.levels)
        return torch.cat((low, x_start, itself), dim=-1)[:PAIRS]

    def _nearest(self, x_start):
        """Pairs of a sample and its nearest image, side by side (P, C, H, 2 W), and the median of all distances."""
        if self.distance_of_data is None:
            few = torch.randperm(len(self.pixels), generator=torch.Generator().manual_seed(0))[: len(x_start)]
            distances, _ = self._search(pixels_to_batch(self.pixels[few], self.scheduler.levels), but=few)
            self.distance_of_data = distances.median().item()
        distances, indices = self._search(x_start)
        first = distances.argsort()[:PAIRS]
        found = pixels_to_batch(self.pixels[indices[first]], self.scheduler.levels)
        return torch.cat((x_start[first], found), dim=-1), distances.median().item()

    def _search(self, x_start, but=None):
        """Root mean square distance (N,) to the nearest image of the data, itself left out, and its index (N,)."""
        count, device = len(x_start), self.accelerator.device
        flips = (x_start, x_start.flip(-1)) if self.config.random_flip else (x_start,)
        queries, best, indices = torch.cat(flips).flatten(1).to(device), [], []
        count_at_once = max(1, AT_ONCE // queries.shape[1])
        for start in range(0, len(self.pixels), count_at_once):
            part = self.pixels[start : start + count_at_once].to(device)
            part = pixels_to_batch(part, self.scheduler.levels).flatten(1)
            distances = torch.cdist(queries, part).view(len(flips), count, -1).amin(0)
            if but is not None:
                here = ((but >= start) & (but < start + len(part))).nonzero()[:, 0]
                distances[here, but[here] - start] = math.inf
            smallest, where = distances.min(1)
            best.append(smallest.cpu())
            indices.append(where.cpu() + start)
        smallest, part = torch.stack(best).min(0)
        return smallest / queries.shape[1] ** 0.5, torch.stack(indices).gather(0, part[None])[0]
