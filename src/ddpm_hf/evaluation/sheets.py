"""Sheets of images with captions, and the picture files that hold them."""

import io
import math
import os
from pathlib import Path

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageDraw, ImageFont, ImageOps

from ddpm_hf.files.atomic import replacing_file

FONT_SIZE = 11  # of captions, in pixels


CHANNELS = {1: ("grey",), 3: ("red", "green", "blue"), 4: ("red", "green", "blue", "alpha")}


def channel_statistics(name: str, mean: torch.Tensor, square: torch.Tensor) -> dict[str, float]:
    """Return mean and standard deviation of each channel from E[x] and E[x^2], (C,) each; they reveal a color cast."""
    spread = (square - mean**2).clamp(min=0).sqrt()
    colors = CHANNELS[len(mean)]
    return {
        f"{name}_{statistic}_{color}": value
        for statistic, values in (("mean", mean.tolist()), ("std", spread.tolist()))
        for color, value in zip(colors, values)
    }


def cycled_labels(network, count: int) -> torch.Tensor | None:
    """Return labels 0, 1, 2, ... in turn for a class-conditional network or a classifier; None for an unconditional network."""
    classes = network.num_classes
    return None if classes is None else torch.arange(count) % classes


def class_columns(network, count: int) -> int | None:
    """Return one column per class for `count` samples with `cycled_labels`; None without classes or with too few samples."""
    classes = network.num_classes
    return classes if classes and classes <= count else None


def captions_of(network, labels: torch.Tensor | None) -> list[str] | None:
    """Return the class name of each image, or its number if the font cannot draw the name; None without labels."""
    names, font = getattr(network, "class_names", None) or [], _font(FONT_SIZE)
    unknown = bytes(font.getmask("\U0010ffff"))  # the box for a character that a font does not have

    def caption(label):
        name = " ".join(names[label].split())[:200] if label < len(names) else ""
        return name if name and all(bytes(font.getmask(character)) != unknown for character in name) else str(label)

    return None if labels is None else [caption(label) for label in labels.tolist()]


def row_captions(captions: list[str] | None, rows: int, columns: int) -> list[str] | None:
    """Return captions for rows of `columns` pictures each: caption i stands above the first picture of row i."""
    return captions and [text for caption in captions[:rows] for text in (caption, *[""] * (columns - 1))]


def as_images(x_start: torch.Tensor) -> list[Image.Image]:
    """Convert (B, C, H, W) in [-1, 1], with 1, 3 or 4 channels, to PIL images."""
    return VaeImageProcessor().postprocess(x_start.float(), "pil")


def as_sheet(
    images: list[Image.Image],
    columns: int | None = None,
    captions: list[str] | None = None,
    *,
    side: int = 64,
    gap: str = "grey",
) -> Image.Image:
    """Join images into one picture, square if columns is None; small images are enlarged to show their pixels.

    Args:
        captions: a text above each image, "" for none; a row equal to the row above is left out.
        side: images are enlarged by the largest integer that leaves their shorter side within these pixels.
        gap: color of the gaps between images.
    """
    scale = max(1, side // min(images[0].size))
    images = [ImageOps.expand(ImageOps.scale(image, scale, Image.Resampling.NEAREST), 2, gap) for image in images]
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


def with_title(picture: Image.Image, title: str) -> Image.Image:
    """Add a white line with a text above a picture."""
    font = _font(max(FONT_SIZE, min(18, picture.width // 20)))
    line = sum(font.getmetrics()) + 4
    titled = Image.new(picture.mode, (picture.width, picture.height + line), "white")
    titled.paste(picture, (0, line))
    ImageDraw.Draw(titled).text((2, 2), _fitted(title, font, picture.width - 4), fill="black", font=font)
    return titled


def _font(size):
    """Load matplotlib's font, which has the letters of many languages, or else Pillow's."""
    try:
        import matplotlib

        return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)
    except (ImportError, OSError):
        return ImageFont.load_default(size)


def _fitted(text, font, width):
    """Cut a text that is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."


def save_picture(image: Image.Image, path: str | os.PathLike) -> None:
    """Write an image atomically, in the format of the path's ending."""
    with replacing_file(path) as temporary:
        image.save(temporary, format=picture_format(path))


def picture_format(path: str | os.PathLike) -> str:
    """Return Pillow's name for the format of a path's ending. Raises ValueError if Pillow cannot write it."""
    formats = Image.registered_extensions()  # of all plugins, which are loaded here
    name = formats.get(Path(path).suffix.lower())
    if name not in Image.SAVE:
        raise ValueError(f"{path}: pictures are written as .png, .jpg, .webp or another ending that Pillow writes")
    return name


def check_picture(path: str | os.PathLike, channels: int) -> None:
    """Check that a sheet of images with this many channels can be written in the format of the path's ending.

    Raises:
        ValueError: the format does not support this number of channels, or it is not 1, 3 or 4.
    """
    picture_format(path)
    if channels not in CHANNELS:
        raise ValueError(f"images of {channels} channels cannot be shown; sheets are of 1, 3 or 4")
    try:
        as_images(torch.zeros(1, channels, 2, 2))[0].save(io.BytesIO(), picture_format(path))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: {error}; give a .png file for images of {channels} channels") from None


def save_figure(figure, path: str | os.PathLike) -> None:
    """Write a matplotlib figure atomically as PNG."""
    with replacing_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
