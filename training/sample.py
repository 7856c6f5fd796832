"""A saved pipeline -> a sheet of samples.

python training/sample.py runs/digits/pipeline --count 64 --out samples.png
"""

import argparse
import sys
from pathlib import Path

import torch

from ddpm_hf import DDPMImagePipeline
from train import cycled_labels, save_sheet


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pipeline", help="folder of a saved pipeline, or its id on the Hub")
    parser.add_argument("--out", default="samples.png", help="PNG file to write")
    parser.add_argument("--count", type=int, default=64, help="number of images")
    parser.add_argument("--steps", type=int, help="network calls an image; all timesteps if left out")
    parser.add_argument("--eta", type=float, help="DDIM with this eta in [0, 1]; ancestral sampling if left out")
    parser.add_argument("--class_label", type=int, help="of every image; all in turn if left out")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not Path(arguments.out).absolute().parent.is_dir():
        parser.error(f"--out {arguments.out}: there is no such folder")
    if arguments.count < 1:
        parser.error(f"--count {arguments.count} must be 1 or more")
    pipeline = DDPMImagePipeline.from_pretrained(arguments.pipeline).to(device)
    images = pipeline(
        arguments.count,
        generator=torch.Generator(device).manual_seed(arguments.seed),
        num_inference_steps=arguments.steps,
        eta=arguments.eta,
        class_labels=cycled_labels(pipeline.unet, arguments.count)
        if arguments.class_label is None
        else arguments.class_label,
    ).images
    save_sheet(images, arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"sample.py: {' '.join(str(error).split())}")
