"""Run diffusers' samplers with few steps in a saved pipeline, and check whether their images are still plausible.

    python benchmarks/fast_samplers.py runs/demo/pipeline [--images 64]

Prints, for each scheduler class and 10, 20 and 50 steps, the share of pixels outside [-1, 1], which become black or white, and
the mean and standard deviation of the images. Each scheduler runs with the saved config and, for comparison, with the timestep
spacing "linspace", which begins at the last timestep.
"""

import argparse
import logging

import diffusers
import torch

from ddpm_hf import DDPMImagePipeline

SCHEDULERS = (
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
    logging.getLogger("ddpm_hf").setLevel("ERROR")  # the table shows what it would warn of
    config = pipe.scheduler.config
    print("| scheduler | settings | " + " | ".join(f"{n} steps: share outside, mean, std" for n in (10, 20, 50)) + " |")
    for name in SCHEDULERS:
        changes = [{"timestep_spacing": config.timestep_spacing}, {"timestep_spacing": "linspace"}]
        changes += [{"thresholding": True}] if name == "DPMSolverSinglestep" else []  # it ignores timestep_spacing
        for change in changes:
            pipe.scheduler = getattr(diffusers, f"{name}Scheduler").from_config(config, **change)
            cells = []
            for steps in (10, 20, 50):
                try:
                    x = pipe(options.images, torch.Generator().manual_seed(0), steps, "latent").images
                except ValueError as error:
                    cells.append(str(error).split(":")[0])
                    continue
                clipped = x.clamp(-1, 1)
                cells.append(f"{(x.abs() > 1).float().mean():.2f}, {clipped.mean():+.2f}, {clipped.std():.2f}")
            settings = ", ".join(f"{key} {value}" for key, value in change.items())
            print(f"| {name} | {settings} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
