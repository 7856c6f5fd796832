"""Animate the sampling of every class of a class-conditional pipeline: x_t above, the predicted x_0 below, step by step.

python examples/denoising_animation.py runs/digits-classes/pipeline docs/denoising.webp
"""

import argparse

import numpy as np
import torch
from PIL import Image, ImageDraw

from ddpm_hf import DDPMImagePipeline
from ddpm_hf.data import tensor_to_pixels

GAP, MARGIN = 4, 16  # pixels between images, and above each of the two grids


def grid(images: torch.Tensor, rows: int, scale: int) -> np.ndarray:
    """Arrange images (B, 1, H, W) in [-1, 1] in `rows` rows, each pixel enlarged to a square of `scale` pixels."""
    pixels = tensor_to_pixels(images)[:, 0].numpy().repeat(scale, axis=1).repeat(scale, axis=2)
    pixels = np.pad(pixels, ((0, 0), (0, GAP), (0, GAP)), constant_values=255)
    return np.concatenate([np.concatenate(row, axis=1) for row in np.split(pixels, rows)])


def frame(x_t: torch.Tensor, x_start: torch.Tensor, rows: int, scale: int, t: int) -> Image.Image:
    """Draw one frame: the grid of x_t above the grid of predicted x_0, each with its title."""
    grids = [grid(images, rows, scale) for images in (x_t, x_start)]
    height, width = grids[0].shape
    picture = Image.new("L", (width, 2 * (height + MARGIN)), 255)
    draw = ImageDraw.Draw(picture)
    for i, (title, pixels) in enumerate(zip((f"x_t, t = {t}", "predicted x_0"), grids)):
        top = i * (height + MARGIN)
        draw.text((0, top + 2), title, fill=0)
        picture.paste(Image.fromarray(pixels), (0, top + MARGIN))
    return picture


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pipeline", help="folder of a class-conditional pipeline of grey images, or its id on the Hub")
    parser.add_argument("out", help="file to write, .webp or .gif")
    parser.add_argument("--rows", type=int, default=2, help="rows of samples (%(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps, one frame per step (%(default)s)")
    parser.add_argument("--guidance_scale", type=float, default=2.0, help="classifier-free guidance (%(default)s)")
    parser.add_argument("--scale", type=int, default=8, help="side in screen pixels of one image pixel (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (%(default)s)")
    arguments = parser.parse_args()

    pipeline = DDPMImagePipeline.from_pretrained(arguments.pipeline)
    class_labels = list(range(pipeline.unet.num_classes)) * arguments.rows
    steps = pipeline.progressive(
        len(class_labels),
        class_labels=class_labels,
        guidance_scale=arguments.guidance_scale,
        num_inference_steps=arguments.steps,
        eta=0.0,
        generator=torch.Generator().manual_seed(arguments.seed),
    )
    frames = [frame(x_t, x_start, arguments.rows, arguments.scale, t=int(t)) for t, x_t, x_start in steps]
    durations = [60] * (len(frames) - 1) + [2500]  # milliseconds; the last frame stays longer
    frames[0].save(arguments.out, save_all=True, append_images=frames[1:], duration=durations, loop=0, lossless=True)
    print(f"wrote {arguments.out}, {len(frames)} frames")


if __name__ == "__main__":
    main()
