"""Pictures of what a run's network makes: samples, how they come out of noise, and what in the data is nearest to them."""

import importlib.util
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageDraw, ImageFont, ImageOps
from stages import pipeline_of, some_items
from stops import going_on

from config import ConfigError, sides
from ddpm_hf.atomic import replacing_file
from ddpm_hf.conditioning import shrunk
from ddpm_hf.data import PixelTensors, pixels_to_batch

STRIP_ROWS, STRIP_COLUMNS, PAIRS = 8, 10, 32
FONT_SIZE = 11  # pixels; of the names of classes
AT_ONCE = 2**24  # values of the data that a search holds, as float32
CHANNELS = {1: ("grey",), 3: ("red", "green", "blue"), 4: ("red", "green", "blue", "alpha")}


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
        return shrunk(x_start, sides(self.config.low_resolution))

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


def channel_statistics(name: str, mean: torch.Tensor, square: torch.Tensor) -> dict[str, float]:
    """Mean and standard deviation of each channel, of their means (C,) and those of their squares: tints are seen there."""
    spread = (square - mean**2).clamp(min=0).sqrt()
    colors = CHANNELS[len(mean)]
    return {
        f"{name}_{what}_{color}": value
        for what, values in (("mean", mean.tolist()), ("std", spread.tolist()))
        for color, value in zip(colors, values)
    }


def cycled_labels(network, count: int) -> torch.Tensor | None:
    """Labels 0, 1, 2, ... in turn for a class-conditional network, or of a classifier; None for another network."""
    classes = network.num_classes
    return None if classes is None else torch.arange(count) % classes


def class_columns(network, count: int) -> int | None:
    """Columns of a sheet of `count` samples with `cycled_labels`: one for each class; None where there are none, or too few."""
    classes = network.num_classes
    return classes if classes and classes <= count else None


def captions_of(network, labels: torch.Tensor | None) -> list[str] | None:
    """The name of each image's class, its number where it has none that can be drawn; None without labels."""
    names, font = getattr(network, "class_names", None) or [], _font(FONT_SIZE)
    unknown = bytes(font.getmask("\U0010ffff"))  # the box for a character that a font does not have

    def caption(label):
        name = " ".join(names[label].split())[:200] if label < len(names) else ""
        return name if name and all(bytes(font.getmask(each)) != unknown for each in name) else str(label)

    return None if labels is None else [caption(label) for label in labels.tolist()]


def row_captions(captions: list[str] | None, rows: int, columns: int) -> list[str] | None:
    """Those of the first images as captions of rows of `columns` pictures each: above the first of a row."""
    return captions and [text for caption in captions[:rows] for text in (caption, *[""] * (columns - 1))]


def as_images(x_start: torch.Tensor) -> list[Image.Image]:
    """Of (B, C, H, W) in [-1, 1], C 1, 3 or 4."""
    return VaeImageProcessor().postprocess(x_start.float(), "pil")


def as_sheet(images: list[Image.Image], columns: int | None = None, captions: list[str] | None = None) -> Image.Image:
    """One picture of many with grey gaps, square if columns is None; small ones enlarged so that pixels can be seen.

    captions: a text for each image, "" for none, above it; a row of them is left out where it repeats the row above.
    """
    scale = max(1, 64 // min(images[0].size))
    images = [ImageOps.expand(ImageOps.scale(image, scale, Image.Resampling.NEAREST), 2, "grey") for image in images]
    columns = columns or math.ceil(len(images) ** 0.5)
    width, height = images[0].size
    font = _font(max(FONT_SIZE, width // 12))
    line, shown, places, texts, y = sum(font.getmetrics()) + 2, [], [], [], 0
    for start in range(0, len(images), columns):
        row = captions[start : start + columns] if captions else []
        if row != shown[: len(row)]:
            texts += [(y, i, text) for i, text in enumerate(row) if text]
            y, shown = y + line, row
        places += [(i * width, y) for i in range(len(images[start : start + columns]))]
        y += height
    sheet = Image.new(images[0].mode, (columns * width, y))
    for image, place in zip(images, places):
        sheet.paste(image, place)
    draw = ImageDraw.Draw(sheet)
    for top in {top for top, *_ in texts}:
        draw.rectangle((0, top, sheet.width, top + line - 1), fill="white")
    for (top, i, text), (next_top, end, _) in zip(texts, [*texts[1:], (None, columns, "")]):
        room = ((end if next_top in (top, None) else columns) - i) * width - 4
        draw.text((i * width + 2, top + 1), _fitted(text, font, room), fill="black", font=font)
    return sheet


def _font(size):
    """matplotlib's, which has the letters of many languages; Pillow's own without it."""
    try:
        import matplotlib

        return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)
    except (ImportError, OSError):
        return ImageFont.load_default(size)


def _fitted(text, font, width):
    """A text in one line of this width in pixels, cut where it is longer."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."


def save_picture(image: Image.Image, path: str | os.PathLike) -> None:
    """Writes an image in the format of the path's ending, whole or not at all."""
    with replacing_file(path) as temporary:
        image.save(temporary, format=picture_format(path))


def picture_format(path: str | os.PathLike) -> str:
    """Pillow's name of the format of a path's ending. Raises ValueError for an ending that Pillow does not write."""
    formats = Image.registered_extensions()  # of all plugins, which are loaded here
    name = formats.get(Path(path).suffix.lower())
    if name not in Image.SAVE:
        raise ValueError(f"{path}: pictures are written as .png, .jpg, .webp or another ending that Pillow writes")
    return name


def check_matplotlib(extra: str) -> None:
    """Raises ConfigError where the package that draws plots is missing, before anything is computed for them."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            f'plots need matplotlib; pip install "ddpm-hf[{extra}]", or pip install -e ".[{extra}]" in a checkout'
        )


def save_figure(figure, path: str | os.PathLike) -> None:
    """Writes a plot of matplotlib as PNG, whole or not at all."""
    with replacing_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
