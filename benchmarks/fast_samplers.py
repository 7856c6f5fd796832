"""diffusers' samplers with few steps in a saved pipeline: do they still draw the images of the network?

    python benchmarks/fast_samplers.py runs/demo/pipeline [--images 64]

For each scheduler class and 10, 20 and 50 steps: the share of pixels outside [-1, 1], which become black or white, and the mean
and standard deviation of the images. With the scheduler's config as saved, and with "linspace", which begins at the last
timestep, for comparison.
"""

import argparse
import logging

import diffusers
import torch

from ddpm_hf import DDPMImagePipeline

NAMES = (
    "DDPM", "DDIM", "DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep", "SASolver", "EulerDiscrete",
    "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "LMSDiscrete", "PNDM",
)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline")
    parser.add_argument("--images", type=int, default=64)
    options = parser.parse_args()
    pipe = DDPMImagePipeline.from_pretrained(options.pipeline)
    pipe.set_progress_bar_config(disable=True)
    diffusers.logging.set_verbosity_error()
    logging.getLogger("ddpm_hf").setLevel("ERROR")  # what it warns of is in the table
    config = pipe.scheduler.config
    print("| scheduler | with | " + " | ".join(f"{n} steps: outside, mean, std" for n in (10, 20, 50)) + " |")
    for name in NAMES:
        changes = [{"timestep_spacing": config.timestep_spacing}, {"timestep_spacing": "linspace"}]
        changes += [{"thresholding": True}] if name == "DPMSolverSinglestep" else []  # whose spacing is its own
        for change in changes:
            pipe.scheduler = getattr(diffusers, f"{name}Scheduler").from_config(config, **change)
            cells = []
            for steps in (10, 20, 50):
                try:
                    x = pipe(options.images, torch.Generator().manual_seed(0), steps, "latent").images
                except ValueError as error:
                    cells.append(str(error).split(":")[0])
                    continue
                shown = x.clamp(-1, 1)
                cells.append(f"{(x.abs() > 1).float().mean():.2f}, {shown.mean():+.2f}, {shown.std():.2f}")
            settings = ", ".join(f"{key} {value}" for key, value in change.items())
            print(f"| {name} | {settings} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
