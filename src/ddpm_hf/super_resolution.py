"""Images made larger by a diffusion model that sees them, and two stages in a row (IDDPM, appendix; ADM, section 5)."""

import inspect
import json
import os
from collections.abc import Iterator
from numbers import Real
from pathlib import Path

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from PIL import Image

from .arguments import checked_arguments, shown
from .classifier import NoisyClassifier
from .conditioning import condition_planes
from .guidance import NamedClasses, check_names
from .pipeline import WHERE, DDPMImagePipeline, local_folder, positive_integer, write_source
from .push import Published
from .saved import STAGES, component_classes, is_inside, read_json
from .unet import DDPMUNet, sides


class DDPMSuperResolutionPipeline(DDPMImagePipeline):
    """Makes images larger: `DDPMImagePipeline` with a network that sees the low-resolution image, scaled up, beside x_t.

    Its network takes the channels of x_t, those of the image, and with conditioning_noise a plane for the noise level. Saved
    folders name this class: without the package they are opened by `DiffusionPipeline.from_pretrained(folder,
    trust_remote_code=True)`; plain diffusers has no class that samples them.

    Args:
        unet, scheduler, classifier: as in `DDPMImagePipeline`; in_channels of the network as above.
        low_resolution: (height, width) of the images that it takes.
        conditioning_noise: highest level of the noise on low-resolution images that it was trained with ("conditioning
            augmentation", Ho et al. 2021, "Cascaded Diffusion Models"), in [0, 1); 0 for none.

    Raises:
        ValueError: a network whose channels do not fit.
    """

    _source_module = __name__

    @checked_arguments(low_resolution="[1, 65536]", conditioning_noise="[0, 1)")
    def __init__(
        self,
        unet: DDPMUNet | UNet2DModel,
        scheduler,
        classifier: NoisyClassifier | None = None,
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
        """Of the images: half of what the network takes, but for the noise level."""
        return self.unet.config.in_channels // 2

    @torch.no_grad()
    def __call__(
        self,
        images,
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
        callback_on_step_end=None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] = ("sample", "latents"),
    ) -> ImagePipelineOutput | tuple:
        """Draws a larger image for each of `images`.

        Args:
            images: of the size `low_resolution`: PIL images or one, an array (B, H, W, C) in [0, 1], or a tensor (B, C, H,
                W) in [-1, 1].
            noise_level: of the noise on them, 0 to conditioning_noise: more gives the network more freedom from the images.
            Others: as in `DDPMImagePipeline.__call__`; latents have the size of the result.

        Returns:
            `ImagePipelineOutput` with `.images`.

        Raises:
            ValueError: images of another size or number of channels, a noise level that it was not trained with; as
                `DDPMImagePipeline.__call__`.
        """
        self._check_output(output_type, callback_on_step_end_tensor_inputs)
        prepared = self._prepare_larger(
            images,
            noise_level,
            generator,
            num_inference_steps,
            eta,
            class_labels,
            latents,
            guidance_scale,
            classifier_scale,
            timesteps,
            sigmas,
        )
        return self._run(prepared, output_type, return_dict, callback_on_step_end, callback_on_step_end_tensor_inputs)

    def progressive(
        self,
        images,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        *,
        every: int = 1,
        noise_level: float = 0.0,
        eta: float | None = None,
        class_labels: torch.Tensor | list[int | str] | int | str | None = None,
        guidance_scale: float | torch.Tensor | None = None,
        classifier_scale: float | torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """As `DDPMImagePipeline.progressive`, of images as `__call__` takes them."""
        every = positive_integer("every", every)
        prepared = self._prepare_larger(
            images,
            noise_level,
            generator,
            num_inference_steps,
            eta,
            class_labels,
            latents,
            guidance_scale,
            classifier_scale,
            timesteps,
            sigmas,
        )
        return self._progress(*prepared, every)

    def _prepare_larger(self, images, noise_level, generator, *arguments):
        """`_prepare` of as many images as there are small ones, with their planes; `arguments` are its own."""
        self._check_generator(generator)
        planes, generator = self._planes(images, noise_level, generator)
        return self._prepare(len(planes), generator, *arguments, planes)

    def check(self, batch_size: int, generator=None, num_inference_steps: int | None = None, **kwargs) -> None:
        """Whether `__call__` takes these arguments, with `batch_size` images that fit: raises what it would raise."""
        try:
            arguments = inspect.signature(type(self).__call__).bind(self, None, **kwargs)
        except TypeError as error:
            raise ValueError(f"upsampler: {error}") from None
        arguments.apply_defaults()
        told = arguments.arguments
        self._check_output(told["output_type"], told["callback_on_step_end_tensor_inputs"])
        if isinstance(generator, (list, tuple)):
            generator = [torch.Generator() for _ in generator]  # nothing is drawn from the caller's
        else:
            generator = torch.Generator()
        images = torch.zeros(positive_integer("batch_size", batch_size), self.channels, *self.config.low_resolution)
        names = ("eta", "class_labels", "latents", "guidance_scale", "classifier_scale", "timesteps", "sigmas")
        how = (told[name] for name in names)
        self._prepare_larger(images, told["noise_level"], generator, num_inference_steps, *how)

    def interpolate(self, *args, **kwargs):
        """Not for this pipeline: interpolate the low-resolution images, by the pipeline that draws them."""
        raise ValueError("a super-resolution pipeline does not interpolate; interpolate its low-resolution images")

    def _planes(self, images, noise_level, generator):
        low, conditioning_noise = tuple(self.config.low_resolution), self.config.conditioning_noise
        if not isinstance(images, torch.Tensor):
            listed = [images] if isinstance(images, (Image.Image, np.ndarray)) else images
            kinds = (Image.Image, np.ndarray, torch.Tensor)
            if (
                not isinstance(listed, (list, tuple))
                or not listed
                or not all(isinstance(each, kinds) for each in listed)
            ):
                raise ValueError("images must be PIL images, an array (B, H, W, C) in [0, 1] or a tensor (B, C, H, W)")
            if any(isinstance(each, np.ndarray) and each.dtype.kind != "f" for each in listed):
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
        images = images.to(self._execution_device, self.unet.dtype)
        size = sides(self.unet.config.sample_size)
        level = torch.full((len(images),), float(noise_level)) if conditioning_noise > 0 else None
        generator = list(generator) if isinstance(generator, tuple) else generator
        return condition_planes(images, size, level, generator if noise_level > 0 else None), generator

    def to_json_string(self) -> str:
        """The pipeline's index as it is saved: it names this class, which stands in `pipeline.py` beside it."""
        index = json.loads(super().to_json_string())
        return json.dumps({**index, "_class_name": ["pipeline", type(self).__name__]}, indent=2, sort_keys=True) + "\n"


class CascadePipeline(NamedClasses, Published, DiffusionPipeline):
    """Two stages: a `DDPMImagePipeline` draws small images, a `DDPMSuperResolutionPipeline` makes them larger (ADM, section 5).

    It is saved to one folder, a sub-folder for each stage, which is a whole pipeline itself.

    Args:
        base: draws images of the size that the upsampler takes.
        upsampler: makes them larger.

    Raises:
        ValueError: images of the base that the upsampler does not take, or other classes.
    """

    def __init__(self, base: DDPMImagePipeline, upsampler: DDPMSuperResolutionPipeline):
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
        """Names of the labels 0, 1, ... of the stages; None if not known."""
        return self.upsampler.class_names if self.base.class_names is None else self.base.class_names

    @property
    def folder(self) -> Path | None:
        """The local folder, or the snapshot of the Hub, that both stages were opened from; None if from neither."""
        folders = {stage.folder and stage.folder.parent for stage in (self.base, self.upsampler)}
        folder = folders.pop() if len(folders) == 1 else None
        return folder if folder and (folder / "model_index.json").is_file() else None

    @classmethod
    def _dict_from_json_file(cls, json_file):
        """diffusers' hook for reading `model_index.json`."""
        return read_json(Path(json_file))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "CascadePipeline":
        """Opens both stages of a folder or of a repository on the Hub; arguments as those of their own.

        Stages can be given in place of the folder's, as base= and upsampler=.
        """
        path = pretrained_model_name_or_path
        index = super().load_config(path, **{name: kwargs[name] for name in WHERE if name in kwargs})
        missing = [stage for stage in STAGES if stage not in component_classes(index, path, STAGES)]
        folder = local_folder(path, all_files=True, **kwargs)
        stages = {stage: kwargs.pop(stage) for stage in STAGES if stage in kwargs}
        opened = [stage for stage in STAGES if stage not in stages]
        missing += [stage for stage in opened if not (folder / stage).is_dir() or not is_inside(folder / stage, folder)]
        if missing:
            raise ValueError(f"{path} is no cascade: it has no folder {missing[0]} of its own")
        kwargs = {name: value for name, value in kwargs.items() if name not in WHERE}
        kinds = dict(zip(STAGES, (DDPMImagePipeline, DDPMSuperResolutionPipeline)))
        stages |= {stage: kinds[stage].from_pretrained(folder / stage, **kwargs) for stage in opened}
        pipeline = cls(**stages)
        pipeline.register_to_config(_name_or_path=str(path))
        return pipeline

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
            batch_size, generator, output_type, return_dict: as in `DDPMImagePipeline.__call__`, of both stages.
            num_inference_steps: network calls of the base; upsampler_steps: of the upsampler. None for all.
            class_labels: of both, where both are class-conditional.
            noise_level: of the upsampler's conditioning augmentation.
            upsampler_kwargs: other arguments of the upsampler.
            Others: of the base.

        Returns:
            `ImagePipelineOutput` with `.images` of the upsampler.
        """
        first, second = dict(kwargs), dict(upsampler_kwargs or {})
        # to those that know classes
        takers = [
            told
            for told, stage in ((first, self.base), (second, self.upsampler))
            if stage.takes_labels or told.get("classifier_scale") is not None
        ]
        if class_labels is not None and not takers:
            raise ValueError("class_labels were given, but neither stage has classes; leave them out")
        for told in takers:
            told.setdefault("class_labels", class_labels)
        second |= dict(noise_level=noise_level, output_type=output_type)
        self.upsampler.check(batch_size, generator, upsampler_steps, **second)  # before the first stage is computed
        small = self.base(batch_size, generator, num_inference_steps, "latent", **first).images.clamp(-1, 1)
        return self.upsampler(small, generator, upsampler_steps, return_dict=return_dict, **second)

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
        """Of both stages, as diffusers' method."""
        for stage in (self.base, self.upsampler):
            stage.set_progress_bar_config(**kwargs)

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """Writes `model_index.json`, and `pipeline.py` with this class and its parts in one self-contained file."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        write_source(__name__, save_directory)

    def to_json_string(self) -> str:
        """The pipeline's index as it is saved: each class stands in the `pipeline.py` of its folder."""
        index = json.loads(super().to_json_string())
        index.pop("_name_or_path", None)
        index |= {"base": ["pipeline", "DDPMImagePipeline"], "upsampler": ["pipeline", "DDPMSuperResolutionPipeline"]}
        return json.dumps({**index, "_class_name": ["pipeline", "CascadePipeline"]}, indent=2, sort_keys=True) + "\n"
