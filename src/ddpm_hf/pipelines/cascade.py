"""A cascade of two pipelines: one draws small images, the other enlarges them (ADM, section 5)."""

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput

from ddpm_hf.arguments import sides
from ddpm_hf.pipelines.ddpm import DDPMImagePipeline
from ddpm_hf.pipelines.index import SavedPipeline
from ddpm_hf.pipelines.labels import NamedClasses, check_names
from ddpm_hf.pipelines.packaged import PackagedCascade
from ddpm_hf.pipelines.super_resolution import DDPMSuperResolutionPipeline


class CascadePipeline(NamedClasses, SavedPipeline, PackagedCascade, DiffusionPipeline):
    """A `DDPMImagePipeline` that draws small images and a `DDPMSuperResolutionPipeline` that enlarges them (ADM, section 5).

    A saved folder has a sub-folder for each stage, which is itself a saved pipeline.

    Args:
        base: a `DDPMImagePipeline` that draws images of the upsampler's input size.
        upsampler: a `DDPMSuperResolutionPipeline` that enlarges them.

    Raises:
        ValueError: the stages differ in image size, channels or classes.
    """

    stock_class = None
    stage_classes = {"base": DDPMImagePipeline, "upsampler": DDPMSuperResolutionPipeline}

    # not annotated with our classes: diffusers warns of stages whose classes come from a repository
    def __init__(self, base: DiffusionPipeline, upsampler: DiffusionPipeline):
        super().__init__()
        size, low = base.unet.config.sample_size, tuple(upsampler.config.low_resolution)
        if size is not None and sides(size) != low:
            raise ValueError(
                f"base draws images of {'x'.join(map(str, sides(size)))}, upsampler takes {low[0]}x{low[1]}"
            )
        if base.channels != upsampler.channels:
            raise ValueError(f"base draws images of {base.channels} channels, upsampler takes {upsampler.channels}")
        check_names(base.class_names, upsampler.class_names, ("base", "upsampler"))
        self.register_modules(base=base, upsampler=upsampler)

    @property
    def class_names(self) -> list[str] | None:
        """Class names of labels 0, 1, ...; None if unknown."""
        return self.upsampler.class_names if self.base.class_names is None else self.base.class_names

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        class_labels: torch.Tensor | list[int | str] | int | str | None = None,
        upsampler_steps: int | None = None,
        noise_level: float = 0.0,
        upsampler_kwargs: dict | None = None,
        **kwargs,
    ) -> ImagePipelineOutput | tuple:
        """Draws small images with the base and enlarges them with the upsampler.

        Args:
            batch_size, generator, output_type, return_dict: as in `DDPMImagePipeline.__call__`.
            num_inference_steps, upsampler_steps: steps of the base and of the upsampler; None for all.
            class_labels: for each stage that is class-conditional.
            noise_level: level of noise added to the small images.
            upsampler_kwargs: other arguments for the upsampler.
            Others: for the base.

        Returns:
            `ImagePipelineOutput` with `.images`.
        """
        base_kwargs, upsampler_kwargs = dict(kwargs), dict(upsampler_kwargs or {})
        with_classes = [
            stage_kwargs
            for stage_kwargs, stage in ((base_kwargs, self.base), (upsampler_kwargs, self.upsampler))
            if stage.takes_labels or stage_kwargs.get("classifier_scale") is not None
        ]
        if class_labels is not None and not with_classes:
            raise ValueError("class_labels were given, but neither stage has classes; leave them out")
        for stage_kwargs in with_classes:
            stage_kwargs.setdefault("class_labels", class_labels)
        upsampler_kwargs |= dict(noise_level=noise_level, output_type=output_type)
        self.upsampler.check(batch_size, generator, upsampler_steps, **upsampler_kwargs)  # before the base computes
        small = self.base(batch_size, generator, num_inference_steps, "latent", **base_kwargs).images.clamp(-1, 1)
        return self.upsampler(small, generator, upsampler_steps, return_dict=return_dict, **upsampler_kwargs)

    def to(self, *args, **kwargs) -> "CascadePipeline":
        """Moves both stages, as diffusers' method."""
        for stage in (self.base, self.upsampler):
            stage.to(*args, **kwargs)
        return self

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    def set_progress_bar_config(self, **kwargs) -> None:
        """Configures the progress bars of both stages, as diffusers' method."""
        for stage in (self.base, self.upsampler):
            stage.set_progress_bar_config(**kwargs)
