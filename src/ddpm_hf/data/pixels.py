"""PIL images to pixels, pixels to tensors in [-1, 1], and back."""

import contextlib
import io
import os
import warnings
from collections.abc import Callable, Iterator

import datasets
import numpy as np
import torch
from PIL import ExifTags, Image, ImageColor, ImageOps

from ddpm_hf.arguments import shown

PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


CROPS = ("center", "none")


# Pillow scales samples of these depths to 8 bits, but not the transparent value that a PNG gives in the original depth
TRANSPARENT_VALUES = {
    "1": lambda value: 255 if value else 0,  # Pillow 12.1 and later scales it, too
    "L;2": lambda value: value * 85,
    "L;4": lambda value: value * 17,
    "RGB;16B": lambda value: value >> 8,
}


class ImageDoesNotFit(ValueError):
    """An image is not broken, but the settings do not allow it: this ends a run, where a broken image is left out."""


def image_to_pixels(
    size: tuple[int, int], channels: int = 3, levels: int = 256, background: str = "white", crop: str = "center"
) -> Callable[[Image.Image], torch.Tensor]:
    """Makes a function from a PIL image to its pixels: uint8 (channels, *size) in 0 .. levels - 1; int32 above 256 levels.

    The image may have any mode. It is turned as its EXIF says, laid on the background where it is transparent (not with 4
    channels), converted to grey for 1 channel or RGB for 3, and resized by Lanczos' filter. Of 16 bits the upper 8 are kept.
    With levels above 256 all 16 are: the image must then be grey and already of this size.

    Args:
        size: (height, width).
        channels: 1, 3 or 4.
        levels: grey levels of the data (17 for the digits).
        background: the color behind transparent images: a name or "#rrggbb", as Pillow reads them.
        crop: "center": scale the image until it covers `size`, then cut it at the center. "none": stretch it to `size`.

    Raises:
        ValueError: an argument that is not allowed.
        ImageDoesNotFit: when called, an image of 32 bits, or one that does not fit `levels`.
    """
    height, width = size
    if channels not in PIL_MODES:
        raise ValueError(f"channels={channels}: images have 1, 3 or 4; choose one of them")
    if crop not in CROPS:
        raise ValueError(f"crop={shown(crop)} must be one of {', '.join(CROPS)}")
    try:
        color = (*ImageColor.getrgb(background)[:3], 255)
    except ValueError:
        raise ValueError(f"background={shown(background)} is not a color; give a name or #rrggbb") from None

    def to_pixels(image):
        image = _upright(image)
        if levels > 256:
            if not (image.mode.startswith("I;16") and channels == 1 and image.size == (width, height)):
                raise ImageDoesNotFit(
                    f"levels={levels} takes 16-bit grey images of {width}x{height} as they are; one is of mode "
                    f"{image.mode}, {image.size[0]}x{image.size[1]}, for {channels} channels"
                )
            pixels = np.asarray(image).astype(np.int32)
            if "transparency" in image.info:
                grey = Image.new("RGB", (1, 1), color[:3]).convert("L").getpixel((0, 0))
                pixels[pixels == image.info["transparency"]] = round(grey / 255 * (levels - 1))
            _check_range(pixels, levels)
        else:
            image = eight_bits(image)
            if levels < 256:
                _check_range(np.asarray(image), levels)
            pixels = np.array(resized(image)).clip(max=levels - 1)  # the filter overshoots a little
        return torch.from_numpy(pixels).view(height, width, channels).permute(2, 0, 1)

    def eight_bits(image):
        if image.mode.startswith("I;16"):  # `convert` would clip at 255
            values = np.asarray(image)
            grey = Image.fromarray((values >> 8).astype(np.uint8))
            if "transparency" in image.info:
                grey.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
            image = grey
        elif image.mode in ("I", "F"):
            raise ImageDoesNotFit(
                f"an image has pixels of 32 bits (mode {image.mode}); convert the data to 8 or 16 bits"
            )
        elif image.mode == "La":  # `convert` knows no other way from it
            image = image.convert("LA")
        if channels != 4 and (image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, color), image)
        return image.convert(PIL_MODES[channels])

    def resized(image):
        if image.size == (width, height):
            return image
        if crop == "none":
            return image.resize((width, height), Image.Resampling.LANCZOS)
        return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)

    return to_pixels


def _upright(image):
    """Loads an opened image and turns it as its EXIF says; scales its transparent value like its pixels."""
    mode = image.tile[0][3] if getattr(image, "format", None) == "PNG" and getattr(image, "tile", None) else None
    if mode in TRANSPARENT_VALUES and "transparency" in image.info:
        value, scale = image.info["transparency"], TRANSPARENT_VALUES[mode]
        image.info["transparency"] = tuple(map(scale, value)) if isinstance(value, tuple) else scale(value)
    image.load()
    is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    return ImageOps.exif_transpose(image) if is_turned else image


def image_transform(
    size: tuple[int, int], channels: int = 3, levels: int = 256, background: str = "white", crop: str = "center"
) -> Callable[[Image.Image], torch.Tensor]:
    """Makes a function from a PIL image to a float32 tensor (channels, *size) in [-1, 1]. Arguments as `image_to_pixels`."""
    to_pixels = image_to_pixels(size, channels, levels, background, crop)
    return lambda image: _scaled(to_pixels(image), levels)


def pixels_to_batch(pixels: torch.Tensor, levels: int = 256, flip: bool = False) -> torch.Tensor:
    """Pixels (B, C, H, W), see `image_to_pixels` -> x_start, float32 in [-1, 1], on the same device. Values are not checked.

    flip: mirror each image left to right with probability 1/2, by the global generator of the device.
    """
    if flip:
        mirrored = torch.rand(len(pixels), 1, 1, 1, device=pixels.device) < 0.5
        pixels = torch.where(mirrored, pixels.flip(-1), pixels)
    return _scaled(pixels, levels)


def pixels_to_tensor(pixels: torch.Tensor, levels: int = 256) -> torch.Tensor:
    """Grey levels 0 .. levels - 1 of any shape -> float32 in [-1, 1]: 2 * pixel / (levels - 1) - 1.

    Raises:
        ValueError: a pixel at or above `levels`.
    """
    if levels != 256 or pixels.dtype != torch.uint8:
        _check_range(pixels, levels)
    return _scaled(pixels, levels)


def _check_range(pixels, levels):
    highest = int(pixels.max())  # a number: levels = 256 would wrap around in uint8
    if highest >= levels:
        raise ImageDoesNotFit(f"levels={levels}, but the data has a pixel of {highest}; set levels to its grey levels")


def _scaled(pixels, levels):
    return pixels.float() * (2 / (levels - 1)) - 1


def tensor_to_pixels(images: torch.Tensor, levels: int = 256) -> torch.Tensor:
    """Values in [-1, 1], of any shape -> the nearest grey levels 0 .. levels - 1, uint8 (int64 above 256 levels)."""
    pixels = ((images.float().clamp(-1, 1) + 1) * ((levels - 1) / 2)).round()
    return pixels.to(torch.uint8 if levels <= 256 else torch.int64)


def open_image(bytes: bytes | None, path: str | None) -> Image.Image:
    """Opens the image of an undecoded `datasets.Image`; Pillow reads its pixels when they are needed."""
    if bytes is not None:
        return Image.open(io.BytesIO(bytes))
    if path is None or not os.path.isfile(path):  # on the Hub, or missing
        return datasets.Image().decode_example({"bytes": None, "path": path})
    return Image.open(path)


def decode_image(bytes: bytes | None, path: str | None) -> Image.Image:
    """Opens, loads and turns the image of an undecoded `datasets.Image`."""
    with open_image(bytes, path) as image:
        return _upright(image)


@contextlib.contextmanager
def pixel_limit(pixels: int | None) -> Iterator[None]:
    """Within this context, Pillow refuses images with more pixels; None keeps Pillow's own limit."""
    if pixels is None:
        yield
        return
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = pixels / 2  # type: ignore[assignment]  # Pillow warns above this number, and refuses above twice it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before
