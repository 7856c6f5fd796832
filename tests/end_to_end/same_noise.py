"""train.py with timesteps and noise that hang on the image and the step alone, not on the process that draws them."""

import sys

import torch

from ddpm_hf.training import diffusion, train
from ddpm_hf.training.command_line import load_config

CONFIG = load_config(sys.argv[1:])[0]


class SameNoise(diffusion.DiffusionObjective):
    calls = 0

    def __call__(self, unet, x_start, class_labels, t, noise=None):
        if noise is not None:  # of held-out images
            return super().__call__(unet, x_start, class_labels, t, noise)
        step = SameNoise.calls // CONFIG.gradient_accumulation_steps
        SameNoise.calls += 1
        noise = torch.empty_like(x_start)
        for i, image in enumerate(x_start):
            place = torch.arange(1, image.numel() + 1, dtype=torch.float64)
            generator = torch.Generator().manual_seed(int((image.flatten().double() + 2) @ place * 1000) + step)
            noise[i] = torch.randn(image.shape, generator=generator)
            t[i] = torch.randint(self.scheduler.config.num_train_timesteps, (), generator=generator)
        return super().__call__(unet, x_start, class_labels, t, noise)


diffusion.DiffusionObjective = SameNoise
train(CONFIG)
