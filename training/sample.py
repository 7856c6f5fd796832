"""A saved pipeline -> a sheet of samples.

python training/sample.py runs/digits/pipeline --count 64 --out samples.png
"""

import argparse

import torch

from ddpm_hf import DDPMImagePipeline
from train import save_sheet


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pipeline", help="folder of a saved pipeline, or its id on the Hub")
    parser.add_argument("--out", default="samples.png", help="PNG file to write")
    parser.add_argument("--count", type=int, default=64, help="number of images")
    parser.add_argument("--steps", type=int, help="network calls an image; all timesteps if left out")
    parser.add_argument("--eta", type=float, help="DDIM with this eta in [0, 1]; ancestral sampling if left out")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = DDPMImagePipeline.from_pretrained(arguments.pipeline).to(device)
    images = pipeline(
        arguments.count,
        generator=torch.Generator(device).manual_seed(arguments.seed),
        num_inference_steps=arguments.steps,
        eta=arguments.eta,
    ).images
    save_sheet(images, arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
