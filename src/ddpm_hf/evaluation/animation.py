"""Moving pictures of the denoising of a grid of samples.

from ddpm_hf.evaluation import animate

animate(pipe.progressive(16, num_inference_steps=50, eta=0.0), "denoising.webp")
"""

import math
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ddpm_hf.arguments import shown
from ddpm_hf.evaluation.sheets import CHANNELS, as_sheet, with_title
from ddpm_hf.extras import require_extra
from ddpm_hf.files.atomic import is_writable, replacing_file

FORMATS = {".gif": "GIF", ".webp": "WEBP", ".mp4": "MP4"}
CONTENTS = ("both", "x_t", "x_0")
SMALLEST, LARGEST = 256, 1024  # sides of a grid in pixels, between which its images are shown as they are
LOSSLESS = 2**18  # values of the samples up to which .webp is lossless; noise of more takes too many bytes
GAP = 12  # pixels between two grids


def animate(
    steps: Iterable[tuple[float, torch.Tensor, torch.Tensor | None]],
    path: str | os.PathLike | None,
    what: str = "both",
    *,
    fps: float = 20,
    pause: float = 2.0,
    max_frames: int = 64,
    columns: int | None = None,
    captions: list[str] | None = None,
) -> list[Image.Image]:
    """Show sampling as a moving picture: a frame for each step, and the samples as the last one.

    With more steps than frames, every second, fourth, eighth ... step is shown. Small images are enlarged, large ones are
    shrunk, and x_t of processes whose noise grows beyond 1 is shown at unit standard deviation.

    Args:
        steps: (t, x_t, predicted x_0) of each step, as `DDPMImagePipeline.progressive` yields them; images (B, C, H, W) in
            [-1, 1]. If it does not end with the samples (`with_samples=True`), the last predicted x_0 stands for them.
        path: file to write, .gif, .webp (lossless for small images) or .mp4; None writes none.
        what: "x_t", "x_0" for its prediction, or "both", side by side, or one above the other if the grid is wide.
        fps: frames per second, at most 50.
        pause: seconds for which the last frame stays.
        max_frames: the number of frames is at most this.
        columns: images in a row of the grid; None makes it square.
        captions: a text above each image, as `as_sheet` takes them.

    Returns:
        The frames.

    Raises:
        ValueError: an argument is invalid, or the file cannot be written, which is checked before the first step; there are
            no steps, or they predict no x_0; images of other than 1, 3 or 4 channels.
        MissingExtra: .mp4 needs the extra "video".
    """
    if what not in CONTENTS:
        raise ValueError(f"what={shown(what)} must be one of {', '.join(CONTENTS)}")
    if not 0 < fps <= 50:
        raise ValueError(f"fps={fps} must be above 0, and at most 50")
    if not 0 <= pause < math.inf:
        raise ValueError(f"pause={pause} must be seconds, 0 or more")
    if max_frames < 2:
        raise ValueError(f"max_frames={max_frames} must be an integer, 2 or more")
    if path is not None:
        check_animation(path)
    frames: list[Image.Image] = []
    stride, t, x_t, x_0 = 1, None, None, None
    for i, (t, x_t, x_0) in enumerate(steps):
        if t != -1 and i % stride == 0:  # other steps are never waited for
            frames.append(_frame(t, x_t, x_0, what, columns, captions))
            if len(frames) == max_frames:
                frames, stride = frames[::2], 2 * stride
    samples = x_t if t == -1 else x_0 if x_0 is not None else x_t
    if samples is None:
        raise ValueError("steps is empty; give what a pipeline's progressive() returns")
    frames.append(_frame(-1, samples, samples, what, columns, captions))
    if path is not None:
        _write(frames, Path(path), fps, pause, lossless=samples.numel() <= LOSSLESS)
    return frames


def check_animation(path: str | os.PathLike) -> None:
    """Check, before anything is computed, that an animation can be written to this file.

    Raises:
        ValueError: another ending than .gif, .webp and .mp4; a folder, or a file in a folder that is missing or not writable.
        MissingExtra: .mp4 needs the extra "video".
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: animations are written as .gif, .webp or .mp4")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give a file")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path}: there is no such folder")
    if not is_writable(path.absolute().parent):
        raise ValueError(f"{path}: its folder may not be written to; give another one")
    if path.suffix.lower() == ".mp4":
        for module in ("imageio", "av"):
            require_extra(module, "video", ".mp4 files")


def _frame(t, x_t, x_0, what, columns, captions):
    """Draw one frame. Only this, and no more than what it shows, is copied from the device."""
    if x_0 is None and what != "x_t":
        raise ValueError(f"what={what!r} needs steps that predict x_0, as those of DDPM and DDIM; show x_t")
    time = f"t = {t if isinstance(t, int) else format(t, '.4g')}"
    is_last = t == -1
    grids = []
    if what != "x_0":
        spread = 1 if is_last else x_t.float().std(correction=0).clamp(min=1)
        grids.append(("x_0" if is_last else f"x_t, {time}", x_t / spread))
    if what != "x_t":
        title = "predicted x_0" if what == "both" else "x_0" if is_last else f"x_0 predicted at {time}"
        grids.append((title, x_0))
    pictures = [with_title(_grid(images, columns, captions), title) for title, images in grids]
    if len(pictures) == 1:
        return pictures[0]
    first, second = pictures
    width, height = first.size
    is_wide = width > 2 * height
    place = (0, height + GAP) if is_wide else (width + GAP, 0)
    frame = Image.new(first.mode, (place[0] + width, place[1] + height), "white")
    frame.paste(first, (0, 0))
    frame.paste(second, place)
    return frame


def _grid(images, columns, captions):
    """Convert (B, C, H, W) in [-1, 1] to one picture, "L" or "RGB"; RGBA is shown on white."""
    count, channels, height, width = images.shape
    if channels not in CHANNELS:
        raise ValueError(f"images of {channels} channels cannot be shown; animations are of 1, 3 or 4")
    columns = columns or math.ceil(count**0.5)
    rows = math.ceil(count / columns)
    cells = max(columns, rows)
    images, side = images.float() / 2 + 0.5, LARGEST // cells
    if max(height, width) > side:
        size = [max(1, length * side // max(height, width)) for length in (height, width)]
        images = torch.nn.functional.interpolate(images, size, mode="area")
    pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    tiles = [Image.fromarray(tile[..., 0] if channels == 1 else tile) for tile in pixels]
    if channels == 4:
        tiles = [Image.alpha_composite(Image.new("RGBA", tile.size, "white"), tile).convert("RGB") for tile in tiles]
    tiles += [Image.new(tiles[0].mode, tiles[0].size, "white")] * (columns * rows - count)
    return as_sheet(tiles, columns, captions, side=max(64, SMALLEST // cells), gap="white")


def _write(frames, path, fps, pause, lossless):
    """Write frames atomically, in the format of the path's ending."""
    kind = FORMATS[path.suffix.lower()]
    with replacing_file(path) as temporary:
        if kind == "MP4":
            _write_video(frames, temporary, fps, pause)
            return
        unit = 10 if kind == "GIF" else 1  # milliseconds
        usual, last = (unit * max(1, round(seconds * 1000 / unit)) for seconds in (1 / fps, pause))
        if kind == "GIF" and frames[0].mode == "RGB":
            frames = [frame.quantize(palette=frame.quantize()) for frame in frames]  # dithered: 256 colors show bands
        options = {} if kind == "GIF" else {"lossless": True, "method": 6} if lossless else {"quality": 85}
        frames[0].save(
            temporary,
            format=kind,
            save_all=True,
            append_images=frames[1:],
            duration=[usual] * (len(frames) - 1) + [last],
            loop=0,
            **options,
        )


def _write_video(frames, path, fps, pause):
    """Write H.264; its colors are of half the resolution, so sides are made even."""
    import imageio.v3

    width, height = frames[0].size
    canvas = Image.new("RGB", (width + width % 2, height + height % 2), "white")
    with (
        open(path, "wb") as file,
        imageio.v3.imopen(file, "w", plugin="pyav", extension=".mp4", container="mp4") as video,
    ):
        video.init_video_stream("libx264", fps=fps, pixel_format="yuv420p")
        for frame in [*frames[:-1], *[frames[-1]] * max(1, round(pause * fps))]:
            canvas.paste(frame)
            video.write_frame(np.asarray(canvas))
