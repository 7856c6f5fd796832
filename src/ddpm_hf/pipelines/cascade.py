"""Two pipelines in a row: small images, then larger ones (ADM, section 5)."""

import json
import os
from pathlib import Path

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput

from ddpm_hf.arguments import sides
from ddpm_hf.files.guarded import is_inside, read_json
from ddpm_hf.files.pipeline_folder import STAGES, component_classes
from ddpm_hf.hub.source import write_source
from ddpm_hf.hub.upload import Published
from ddpm_hf.pipelines.ddpm import WHERE, DDPMImagePipeline, local_folder
from ddpm_hf.pipelines.guidance import NamedClasses, check_names
from ddpm_hf.pipelines.super_resolution import DDPMSuperResolutionPipeline


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
