"""PIL images to pixels, pixels to tensors in [-1, 1], and back."""

import contextlib
import io
import os
import warnings
from collections.abc import Callable

import numpy as np
import torch
from PIL import ExifTags, Image, ImageColor, ImageOps

from ddpm_hf.arguments import shown

PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


CROPS = ("center", "none")


# what Pillow cuts samples of other depths to, without doing so to the transparent value that stands beside them
TRANSPARENT_VALUES = {
    "L;2": lambda value: value * 85,
    "L;4": lambda value: value * 17,
    "RGB;16B": lambda value: value >> 8,
}


class ImageDoesNotFit(ValueError):
    """An image that was read, but that the settings do not allow: it ends a run, where a broken one is left out."""


def image_to_pixels(
    size: tuple[int, int], channels: int = 3, levels: int = 256, background: str = "white", crop: str = "center"
) -> Callable[[Image.Image], torch.Tensor]:
    """A function from a PIL image to its pixels, uint8 (channels, *size) in 0 .. levels - 1; int32 above 256 levels.

    Of any mode: turned as EXIF says, what is transparent laid on the background (but for 4 channels), then grey for 1 channel,
    RGB for 3. 16 bits lose the lower 8, but for levels above 256: then images must be of one channel and that size. Scaled by
    Lanczos' filter, which covers the whole image.

    Args:
        size: (height, width).
        levels: grey levels of the data (17 for the digits).
        background: a name or "#rrggbb", as Pillow reads them.
        crop: "center": scaled until it covers `size`, and cut at the center. "none": stretched to it. One of that size is left
            as it is.

    Raises:
        ValueError: an argument that is not one of these; when called, an image of 32 bits or of more levels, or one that levels
            above 256 do not fit.
    """
    height, width = size
    if channels not in PIL_MODES:
        raise ValueError(f"channels={channels}: images have 1, 3 or 4")
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
            pixels = np.array(scaled(image)).clip(max=levels - 1)  # the filter goes a little beyond
        return torch.from_numpy(pixels).view(height, width, channels).permute(2, 0, 1)

    def eight_bits(image):
        if image.mode.startswith("I;16"):  # convert would cut off all above 255
            values = np.asarray(image)
            grey = Image.fromarray((values >> 8).astype(np.uint8))
            if "transparency" in image.info:
                grey.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
            image = grey
        elif image.mode in ("I", "F"):
            raise ImageDoesNotFit(
                f"an image has pixels of 32 bits (mode {image.mode}); convert the data to 8 or 16 bits"
            )
        elif image.mode == "La":  # which convert takes no further
            image = image.convert("LA")
        if channels != 4 and (image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, color), image)
        return image.convert(PIL_MODES[channels])

    def scaled(image):
        if image.size == (width, height):
            return image
        if crop == "none":
            return image.resize((width, height), Image.Resampling.LANCZOS)
        return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)

    return to_pixels


def _upright(image):
    """An image that may be opened only, loaded and turned as its EXIF says; its transparent value is on its pixels' scale."""
    mode = image.tile[0][3] if getattr(image, "format", None) == "PNG" and getattr(image, "tile", None) else None
    if mode in TRANSPARENT_VALUES and "transparency" in image.info:
        value, scale = image.info["transparency"], TRANSPARENT_VALUES[mode]
        image.info["transparency"] = tuple(map(scale, value)) if isinstance(value, tuple) else scale(value)
    image.load()
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    return ImageOps.exif_transpose(image) if turned else image


def image_transform(
    size: tuple[int, int], channels: int = 3, levels: int = 256, background: str = "white", crop: str = "center"
) -> Callable[[Image.Image], torch.Tensor]:
    """A function from a PIL image to a float32 tensor (channels, *size) in [-1, 1], by way of `image_to_pixels`."""
    to_pixels = image_to_pixels(size, channels, levels, background, crop)
    return lambda image: _scaled(to_pixels(image), levels)


def pixels_to_batch(pixels: torch.Tensor, levels: int = 256, flip: bool = False) -> torch.Tensor:
    """Pixels (B, C, H, W) as `image_to_pixels` gives them -> x_start, float32 in [-1, 1], where they are, and unchecked.

    flip: every other one at random left to right, by torch's generator of their device.
    """
    if flip:
        chosen = torch.rand(len(pixels), 1, 1, 1, device=pixels.device) < 0.5
        pixels = torch.where(chosen, pixels.flip(-1), pixels)
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
    """[-1, 1] of any shape -> the nearest grey levels 0 .. levels - 1, uint8 (int64 above 256 levels)."""
    pixels = ((images.float().clamp(-1, 1) + 1) * ((levels - 1) / 2)).round()
    return pixels.to(torch.uint8 if levels <= 256 else torch.int64)


def open_image(bytes: bytes | None, path: str | None) -> Image.Image:
    """The image of what an undecoded `datasets.Image` holds; its pixels are read when they are needed."""
    if bytes is None and not os.path.isfile(path):
        import datasets

        return datasets.Image().decode_example({"bytes": None, "path": path})  # on the Hub; or no such file
    return Image.open(path if bytes is None else io.BytesIO(bytes))


def decode_image(bytes, path):
    with open_image(bytes, path) as image:
        return _upright(image)


@contextlib.contextmanager
def pixel_limit(pixels):
    """Sets Pillow's limit of pixels an image, within this context; None leaves it."""
    if pixels is None:
        yield
        return
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = pixels / 2  # Pillow warns of an image above it, and refuses one above twice it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before
