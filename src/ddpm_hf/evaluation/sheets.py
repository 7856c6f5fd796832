"""Pictures of what a run's network makes: samples, how they come out of noise, and what in the data is nearest to them."""

import io
import math
import os
from pathlib import Path

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageDraw, ImageFont, ImageOps

from ddpm_hf.files.atomic import replacing_file

FONT_SIZE = 11  # pixels; of the names of classes


CHANNELS = {1: ("grey",), 3: ("red", "green", "blue"), 4: ("red", "green", "blue", "alpha")}


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
    line, y = sum(font.getmetrics()) + 2, 0
    shown: list[str] = []
    places: list[tuple[int, int]] = []
    texts: list[tuple[int, int, str]] = []
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


def check_picture(path: str | os.PathLike, channels: int) -> None:
    """Check that a sheet of images with this many channels can be written in the format of the path's ending.

    Raises:
        ValueError: images of other than 1, 3 or 4 channels, or a format that does not have them.
    """
    picture_format(path)
    if channels not in CHANNELS:
        raise ValueError(f"images of {channels} channels cannot be shown; sheets are of 1, 3 or 4")
    try:
        as_images(torch.zeros(1, channels, 2, 2))[0].save(io.BytesIO(), picture_format(path))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: {error}; give a .png file for images of {channels} channels") from None


def save_figure(figure, path: str | os.PathLike) -> None:
    """Writes a plot of matplotlib as PNG, whole or not at all."""
    with replacing_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
