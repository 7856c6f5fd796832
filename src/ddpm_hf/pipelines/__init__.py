"""Pipelines of diffusers that sample images."""

from ddpm_hf.pipelines.cascade import CascadePipeline
from ddpm_hf.pipelines.ddpm import DDPMImagePipeline
from ddpm_hf.pipelines.super_resolution import DDPMSuperResolutionPipeline

__all__ = ["PIPELINE_CLASSES", "CascadePipeline", "DDPMImagePipeline", "DDPMSuperResolutionPipeline"]

PIPELINE_CLASSES = (DDPMImagePipeline, DDPMSuperResolutionPipeline, CascadePipeline)
