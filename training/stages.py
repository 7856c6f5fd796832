"""What a network begins with: noise alone, or beside it a low-resolution image that it makes larger."""

import itertools

import torch
from torch.utils.data import default_collate

from config import TrainConfig, sides
from ddpm_hf import DDPMImagePipeline, DDPMSuperResolutionPipeline
from ddpm_hf.conditioning import Conditioned, condition_planes, shrunk


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
    return Conditioned(unet, condition_planes(shrunk(x_start, sides(config.low_resolution)), x_start.shape[2:], level))


def pipeline_class(config: TrainConfig) -> type[DDPMImagePipeline]:
    return DDPMSuperResolutionPipeline if config.low_resolution else DDPMImagePipeline


def pipeline_of(config: TrainConfig, unet, scheduler) -> DDPMImagePipeline:
    """The pipeline that the run makes."""
    how = {}
    if config.low_resolution:
        how = dict(low_resolution=sides(config.low_resolution), conditioning_noise=config.conditioning_noise)
    return pipeline_class(config)(unet, scheduler, **how)


def first_items(dataset, count: int) -> dict[str, torch.Tensor]:
    """The first `count` items of a training set as one batch; fewer where there are no more."""
    return default_collate(list(itertools.islice(iter(_items(dataset)), count)))


def _items(dataset):
    return (dataset[i] for i in range(len(dataset))) if hasattr(dataset, "__getitem__") else dataset
