"""Super-resolution: a network that sees a small image beside x_t and enlarges it."""

import torch

from ddpm_hf.arguments import sides
from ddpm_hf.models.conditioning import Conditioned, condition_planes, downsample
from ddpm_hf.pipelines.ddpm import DDPMImagePipeline
from ddpm_hf.pipelines.super_resolution import DDPMSuperResolutionPipeline
from ddpm_hf.training.config import TrainConfig


def in_channels(config: TrainConfig) -> int:
    """The network's input channels: those of x_t and, for super-resolution, of the small image and its noise level."""
    if not config.low_resolution:
        return config.channels
    return 2 * config.channels + (config.conditioning_noise > 0)


def conditioned(config: TrainConfig, unet, x_start: torch.Tensor):
    """The network as the loss calls it: for super-resolution with the images x_start (B, C, H, W), made small, beside x_t.

    Their noise level is drawn uniformly from 0 to `conditioning_noise`.
    """
    if not config.low_resolution:
        return unet
    noise_level = None
    if config.conditioning_noise:
        noise_level = torch.rand(len(x_start), device=x_start.device) * config.conditioning_noise
    return Conditioned(
        unet,
        condition_planes(downsample(x_start, sides(config.low_resolution)), x_start.shape[2:], noise_level),  # type: ignore[arg-type]
    )


def pipeline_class(config: TrainConfig) -> type[DDPMImagePipeline]:
    """The class of the pipeline that a run trains."""
    return DDPMSuperResolutionPipeline if config.low_resolution else DDPMImagePipeline


def make_pipeline(config: TrainConfig, unet, scheduler) -> DDPMImagePipeline:
    """The pipeline that a run trains."""
    if not config.low_resolution:
        return DDPMImagePipeline(unet, scheduler)
    sizes = dict(low_resolution=sides(config.low_resolution), conditioning_noise=config.conditioning_noise)
    return DDPMSuperResolutionPipeline(unet, scheduler, **sizes)
