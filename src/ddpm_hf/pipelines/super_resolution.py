"""Super-resolution by a diffusion model that sees the low-resolution image (IDDPM, appendix; ADM, section 5)."""

import inspect
from collections.abc import Callable, Iterator
from numbers import Real
from typing import NoReturn

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from PIL import Image

from ddpm_hf.arguments import checked_arguments, shown, sides
from ddpm_hf.models.conditioning import condition_planes
from ddpm_hf.models.unet import DDPMUNet
from ddpm_hf.pipelines.ddpm import DDPMImagePipeline
from ddpm_hf.pipelines.options import SamplingOptions, check_generator, positive_integer


class DDPMSuperResolutionPipeline(DDPMImagePipeline):
    """Enlarges images: a `DDPMImagePipeline` whose network also sees the low-resolution image, scaled up.

    The network's input is x_t, the low-resolution image, and with conditioning_noise a plane with the noise level. Without
    the package, `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` opens a saved folder; diffusers itself
    has no such pipeline.

    Args:
        unet, scheduler, classifier: as in `DDPMImagePipeline`; the network has the input channels above.
        low_resolution: (height, width) of the input images.
        conditioning_noise: highest noise level of low-resolution images in training ("conditioning augmentation",
            Ho et al. 2021, "Cascaded Diffusion Models"), in [0, 1); 0 for none.

    Raises:
        ValueError: the network has other channels.
    """

    stock_class = None

    @checked_arguments(low_resolution="[1, 65536]", conditioning_noise="[0, 1)")
    def __init__(
        self,
        unet: DDPMUNet | UNet2DModel | ModelMixin,
        scheduler: SchedulerMixin,
        classifier: ModelMixin | None = None,
        low_resolution: list[int] | int = (8, 8),
        conditioning_noise: float = 0.0,
    ):
        sides = [low_resolution] * 2 if isinstance(low_resolution, int) else list(low_resolution)
        if len(sides) != 2:
            raise ValueError(f"low_resolution={shown(low_resolution)} must be a side in pixels, or (height, width)")
        super().__init__(unet, scheduler, classifier)
        self.register_to_config(low_resolution=sides, conditioning_noise=float(conditioning_noise))
        config, channels = self.unet.config, self.channels
        if config.in_channels != 2 * channels + (conditioning_noise > 0) or config.out_channels not in (
            channels,
            2 * channels,
        ):
            raise ValueError(
                f"the network takes {config.in_channels} channels and gives {config.out_channels}; with "
                f"conditioning_noise={conditioning_noise} it must take x_t and the low-resolution image"
                f"{', and its noise level' if conditioning_noise > 0 else ''}, and give as many as x_t has, or twice"
            )
        if config.sample_size is None:
            raise ValueError("the network's config has no sample_size, the side of the images that it makes; set it")

    @property
    def channels(self) -> int:
        """Channels of the images: half of the network's input channels, without the noise level."""
        return self.unet.config.in_channels // 2

    @torch.no_grad()
    def __call__(
        self,
        images: torch.Tensor | np.ndarray | Image.Image | list,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        noise_level: float = 0.0,
        eta: float | None = None,
        class_labels: torch.Tensor | list[int | str] | int | str | None = None,
        guidance_scale: float | torch.Tensor | None = None,
        classifier_scale: float | torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        callback_on_step_end: Callable[..., dict] | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] = ("sample", "latents"),
    ) -> ImagePipelineOutput | tuple:
        """Draws a larger image for each of `images`.

        Args:
            images: PIL images, an array (B, H, W, C) in [0, 1], or a tensor (B, C, H, W) in [-1, 1], of the size
                `low_resolution`.
            noise_level: level of noise added to them, 0 to conditioning_noise; more lets the result differ more from them.
            generator, num_inference_steps and the others: as in `DDPMImagePipeline.__call__`; latents have the size of the
                result.

        Returns:
            `ImagePipelineOutput` with `.images`.

        Raises:
            ValueError: images of another size or number of channels, a noise level outside the range; as
                `DDPMImagePipeline.__call__`.
        """
        self._check_output(output_type, callback_on_step_end_tensor_inputs)
        options = SamplingOptions(
            generator=generator,
            num_inference_steps=num_inference_steps,
            eta=eta,
            class_labels=class_labels,
            guidance_scale=guidance_scale,
            classifier_scale=classifier_scale,
            latents=latents,
            timesteps=timesteps,
            sigmas=sigmas,
        )
        sampling = self._prepare_images(images, noise_level, options)
        return self._sample(
            sampling, output_type, return_dict, callback_on_step_end, callback_on_step_end_tensor_inputs
        )

    def progressive(
        self,
        images: torch.Tensor | np.ndarray | Image.Image | list,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        *,
        every: int = 1,
        noise_level: float = 0.0,
        **options,
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """`DDPMImagePipeline.progressive` for low-resolution images."""
        every = positive_integer("every", every)
        options = SamplingOptions(generator, num_inference_steps, **options)
        return self._progress(self._prepare_images(images, noise_level, options), every)

    def _prepare_images(self, images, noise_level, options):
        """`_prepare` with one result per low-resolution image."""
        check_generator(options.generator, self.execution_device)
        generator = options.generator
        options.generator = list(generator) if isinstance(generator, tuple) else generator
        planes = self._planes(images, noise_level, options.generator)
        return self._prepare(len(planes), options, planes)

    def check(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        **kwargs,
    ) -> None:
        """Checks the arguments of `__call__` for `batch_size` valid images without sampling. Raises ValueError."""
        try:
            arguments = inspect.signature(type(self).__call__).bind(self, None, **kwargs)
        except TypeError as error:
            raise ValueError(f"upsampler: {error}") from None
        arguments.apply_defaults()
        values = arguments.arguments
        self._check_output(values["output_type"], values["callback_on_step_end_tensor_inputs"])
        check_generator(generator, self.execution_device)
        if isinstance(generator, (list, tuple)):
            generator = [torch.Generator() for _ in generator]  # the caller's keep their state
        else:
            generator = torch.Generator()
        images = torch.zeros(positive_integer("batch_size", batch_size), self.channels, *self.config.low_resolution)
        options = SamplingOptions(generator, num_inference_steps)
        for name in kwargs.keys() & vars(options).keys():
            setattr(options, name, kwargs[name])
        self._prepare_images(images, values["noise_level"], options)

    def interpolate(self, *args, **kwargs) -> NoReturn:
        """Raises ValueError: interpolate low-resolution images instead."""
        raise ValueError("a super-resolution pipeline does not interpolate; interpolate its low-resolution images")

    def _planes(self, images, noise_level, generator):
        """The network's input planes beside x_t: (B, P, H, W)."""
        low, conditioning_noise = tuple(self.config.low_resolution), self.config.conditioning_noise
        if not isinstance(images, torch.Tensor):
            listed = [images] if isinstance(images, (Image.Image, np.ndarray)) else images
            kinds = (Image.Image, np.ndarray, torch.Tensor)
            if (
                not isinstance(listed, (list, tuple))
                or not listed
                or not all(isinstance(image, kinds) for image in listed)
            ):
                raise ValueError("images must be PIL images, an array (B, H, W, C) in [0, 1] or a tensor (B, C, H, W)")
            if any(isinstance(image, np.ndarray) and image.dtype.kind != "f" for image in listed):
                raise ValueError("images is an array of integers; give floating point in [0, 1]")
            grey = {"do_convert_grayscale": True} if self.channels == 1 else {"do_convert_rgb": self.channels == 3}
            images = VaeImageProcessor(do_resize=False, **grey).preprocess(images)
        if not images.is_floating_point():
            raise ValueError(f"images is a tensor of {images.dtype}; give floating point in [-1, 1]")
        if images.dim() != 4 or images.shape[1] != self.channels or tuple(images.shape[2:]) != low:
            raise ValueError(
                f"images have the shape {tuple(images.shape)}; this pipeline takes (B, {self.channels}, {low[0]}, {low[1]})"
            )
        if not (isinstance(noise_level, Real) and 0 <= noise_level <= conditioning_noise):
            raise ValueError(
                f"noise_level={noise_level!r} must be 0 to {conditioning_noise}, what the network was trained with"
            )
        images = images.to(self.execution_device, self.unet.dtype)
        size = sides(self.unet.config.sample_size)
        noise_levels = torch.full((len(images),), float(noise_level)) if conditioning_noise > 0 else None
        return condition_planes(images, size, noise_levels, generator if noise_level > 0 else None)
