"""What a network begins with: noise alone, or beside it a low-resolution image that it makes larger."""

import itertools

import numpy as np
import torch
from torch.utils.data import default_collate

from ddpm_hf.arguments import sides
from ddpm_hf.models.conditioning import Conditioned, condition_planes, downsample
from ddpm_hf.pipelines.ddpm import DDPMImagePipeline
from ddpm_hf.pipelines.super_resolution import DDPMSuperResolutionPipeline
from ddpm_hf.training.config import TrainConfig


def in_channels(config: TrainConfig) -> int:
    """Of the network: x_t, and the planes of a low-resolution image."""
    planes = config.channels + (config.conditioning_noise > 0) if config.low_resolution else 0
    return config.channels + planes


def conditioned(config: TrainConfig, unet, x_start: torch.Tensor):
    """The network as the loss calls it: with these images (B, C, H, W), made small, beside x_t where it sees any.

    Their noise level is drawn evenly from 0 to `conditioning_noise`.
    """
    if not config.low_resolution:
        return unet
    level = None
    if config.conditioning_noise:
        level = torch.rand(len(x_start), device=x_start.device) * config.conditioning_noise
    return Conditioned(
        unet, condition_planes(downsample(x_start, sides(config.low_resolution)), x_start.shape[2:], level)
    )


def pipeline_class(config: TrainConfig) -> type[DDPMImagePipeline]:
    return DDPMSuperResolutionPipeline if config.low_resolution else DDPMImagePipeline


def pipeline_of(config: TrainConfig, unet, scheduler) -> DDPMImagePipeline:
    """The pipeline that the run makes."""
    how = {}
    if config.low_resolution:
        how = dict(low_resolution=sides(config.low_resolution), conditioning_noise=config.conditioning_noise)
    return pipeline_class(config)(unet, scheduler, **how)


def some_items(dataset, count: int) -> dict[str, torch.Tensor]:
    """A random subset of a training set, the same each time, as one batch; the first items of a stream, which is shuffled.

    Fewer where there are no more.
    """
    if not hasattr(dataset, "__getitem__"):
        return default_collate(list(itertools.islice(dataset, count)))
    rows = np.random.default_rng(0).permutation(len(dataset))[:count]  # data is often sorted
    return default_collate([dataset[int(i)] for i in rows])
