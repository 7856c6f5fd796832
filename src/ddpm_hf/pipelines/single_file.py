"""Pipelines from the checkpoint files of other code bases. No part of a published pipeline.py."""

import os

import torch
from diffusers.models.modeling_utils import ModelMixin

from ddpm_hf.files.diffusers_internals import constructor_arguments
from ddpm_hf.hub.saved import NETWORKS, scheduler_class
from ddpm_hf.original.checkpoint import Original, open_original


class SingleFilePipeline:
    """Base class of pipelines that open the checkpoints of OpenAI's, Ho et al.'s and Song et al.'s code."""

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path: str | os.PathLike,
        like: str | None = None,
        weights: str = "ema",
        torch_dtype: torch.dtype | None = None,
        classifier: ModelMixin | None = None,
        **options: object,
    ):
        """Opens a checkpoint file as a pipeline, with the scheduler of the process that it was trained for.

        Args:
            pretrained_model_link_or_path, like, weights, torch_dtype, options: as `DDPMUNet.from_single_file`.
            classifier: for classifier guidance, such as `NoisyClassifier.from_single_file(...)`; None for none.

        Returns:
            The pipeline, on the CPU.

        Raises:
            ValueError: as `DDPMUNet.from_single_file`; the file holds a classifier, or an upsampler for
                `DDPMSuperResolutionPipeline`.
            OSError: the file is missing or cannot be read.
        """
        original = open_original(pretrained_model_link_or_path, like, weights, **options)
        return cls.from_original(original, torch_dtype, classifier)

    @classmethod
    def from_original(
        cls, original: Original, torch_dtype: torch.dtype | None = None, classifier: ModelMixin | None = None
    ):
        """Builds the pipeline of an opened checkpoint. Raises ValueError."""
        description = original.description
        low_resolution = description.low_resolution
        upsamples = "low_resolution" in constructor_arguments(cls)[1]
        if description.network == NETWORKS["unet"].__name__ and upsamples != (low_resolution is not None):
            kind = "DDPMImagePipeline" if low_resolution is None else "DDPMSuperResolutionPipeline"
            raise ValueError(f"{original.path} is for {kind}; open it with {kind}.from_single_file")
        unet = NETWORKS["unet"].from_original(original, torch_dtype)
        scheduler = scheduler_class(description.scheduler)(**description.scheduler_config)
        settings = {} if low_resolution is None else {"low_resolution": low_resolution}
        return cls(unet, scheduler, classifier, **settings)
