"""Image generation with a DDPM, as a diffusers pipeline that saves to one folder every diffusers user can open."""

import copy
import functools
import inspect
import json
import math
import operator
import os
import threading
from collections.abc import Callable, Iterator
from numbers import Integral, Real
from pathlib import Path

import diffusers
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import snapshot_download

from ddpm_hf.arguments import shown, sides
from ddpm_hf.fast.inference import InferenceUNet
from ddpm_hf.files.guarded import naming, read_json
from ddpm_hf.files.pipeline_folder import check_part, component_classes, pipeline_class, read_config, variants_in
from ddpm_hf.hub.source import write_source
from ddpm_hf.hub.upload import Published
from ddpm_hf.models.classifier import NoisyClassifier
from ddpm_hf.models.conditioning import Conditioned
from ddpm_hf.models.evaluation_mode import evaluation_mode
from ddpm_hf.models.unet import DDPMUNet
from ddpm_hf.pipelines.guidance import (
    NamedClasses,
    check_classifier,
    classifier_free,
    label_ids,
    scales,
    shifted_output,
)
from ddpm_hf.schedulers.ddpm import LEARNED_VARIANCES, VariationalDDPMScheduler
from ddpm_hf.schedulers.sde_samplers import SubVPSDEScheduler, VESDEScheduler, VPSDEScheduler

logger = logging.get_logger(__name__)


# of a repository: no pickled weights, and what stands beside them
FILES = ("*.json", "*.safetensors", "*.py")


BESIDE = ("training.*", "evaluation.*", "samples.png", "README.md", "LICENSE")


OUTPUT_TYPES = ("pil", "np", "numpy", "pt", "latent")


# By default, of solvers: twice what their papers need. In as many as the process has they visit timesteps twice or begin at
# pure noise, and either is garbage.
SOLVER_STEPS = 50


# Class names as they are saved. Classes are compared by name: a published pipeline.py is executed anew at every load.
STOCK_CLASSES = {"DDPMUNet": "UNet2DModel", "VariationalDDPMScheduler": "DDPMScheduler"}


# Pipelines that no stock class stands for, saved under their own name.
OTHER_CLASSES = ("DDPMSuperResolutionPipeline", "CascadePipeline")


# Parts that no stock class stands for: class -> the module of its source, saved beside its config.
OWN_PARTS = {
    "NoisyClassifier": "noisy_classifier",
    "VPSDEScheduler": "sde_scheduler",
    "SubVPSDEScheduler": "sde_scheduler",
    "VESDEScheduler": "sde_scheduler",
}


OUR_SCHEDULERS = {  # by their own names and those of diffusers that they stand for
    "DDPMScheduler": VariationalDDPMScheduler,
    "ScoreSdeVeScheduler": VESDEScheduler,
    "ScoreSdeVpScheduler": VPSDEScheduler,
    **{each.__name__: each for each in (VariationalDDPMScheduler, VPSDEScheduler, SubVPSDEScheduler, VESDEScheduler)},
}


# arguments of from_pretrained: where a repository is, and what is handed to the networks
WHERE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


NETWORK_KWARGS = (
    "device_map", "disable_mmap", "low_cpu_mem_usage", "max_memory", "offload_folder", "offload_state_dict", "use_safetensors",
)  # fmt: skip


_UPDATING = threading.Lock()  # of an optimized network's weights


class DDPMImagePipeline(NamedClasses, Published, DiffusionPipeline):
    """Draws images by running a diffusion process backwards (Ho, Jain, Abbeel 2020, Algorithm 2; DDIM with `eta`).

    A saved folder is in stock terms, with this class and its parts in a self-contained `pipeline.py` beside the weights:
    plain `DiffusionPipeline.from_pretrained(folder)` gives diffusers' `DDPMPipeline`; the same with
    `custom_pipeline=folder, trust_remote_code=True` gives this class without the package.

    Args:
        unet: `DDPMUNet`, or diffusers' `UNet2DModel`, which becomes one that shares its weights.
        scheduler: `VariationalDDPMScheduler`, or diffusers' `DDPMScheduler`, which becomes one; `VPSDEScheduler` and its like,
            or diffusers' ScoreSdeVeScheduler and ScoreSdeVpScheduler, which become ones; any other diffusers scheduler of
            discrete timesteps is used as it is.
        classifier: `NoisyClassifier` for classifier guidance, of a conditional or an unconditional network; None for none.
    """

    model_cpu_offload_seq = "unet"
    _optional_components = ["classifier"]
    _exclude_from_cpu_offload = ["classifier"]  # gradients go through it
    _callback_tensor_inputs = ["sample", "latents", "model_output"]
    _inference = None  # the optimized network
    _source_module = __name__  # what a published pipeline.py holds

    def __init__(self, unet: DDPMUNet | UNet2DModel, scheduler, classifier: NoisyClassifier | None = None):
        super().__init__()
        if type(unet).__name__ == "UNet2DModel":
            lost = [name for name, weight in unet.state_dict().items() if weight.is_meta]
            if lost:
                raise ValueError(
                    f"the network has no values for {len(lost)} of its tensors, {lost[0]} first: its weights lack them"
                )
            with torch.device("meta"):
                ours = DDPMUNet.from_config(unet.config)
            ours.load_state_dict(unet.state_dict(), assign=True)
            unet = ours.train(unet.training)
        self.register_modules(unet=unet, scheduler=our_scheduler(scheduler), classifier=classifier)

    @classmethod
    def _dict_from_json_file(cls, json_file):
        """diffusers' hook for reading `model_index.json`."""
        return read_json(Path(json_file))

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """As diffusers' method: the index of a folder or repository."""
        config = super().load_config(pretrained_model_name_or_path, **kwargs)
        index = config[0] if isinstance(config, tuple) else config
        # of [module of the folder, class], the class: this one
        index["_class_name"] = pipeline_class(index, pretrained_model_name_or_path)
        return config

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "DDPMImagePipeline":
        """As diffusers' method, of any pipeline of a network, a scheduler, and perhaps our classifier.

        The components are opened by the classes of this package and of diffusers alone: no code of the folder is run. Of
        weights safetensors alone are read, unless use_safetensors=False. Components can be given in place of the folder's.

        Raises:
            ValueError: another kind of pipeline; a file that is a link to outside of the folder, or not as it is saved; weights
                that are pickled, or not of the network's config. One line that names the file.
            OSError: a file that is missing or cannot be read, named.
        """
        path = pretrained_model_name_or_path
        where = {name: kwargs[name] for name in WHERE if name in kwargs}
        index = cls.load_config(path, **where)
        classes, saved = component_classes(index, path), pipeline_class(index, path)
        needed = {"unet", "scheduler"}
        if not needed <= classes.keys() or classes["unet"] not in ("UNet2DModel", "DDPMUNet"):
            found = ", ".join(f"{name} {class_name}" for name, class_name in sorted(classes.items()))
            raise ValueError(
                f"{path} holds a {saved} of {found}; this class opens pipelines of a UNet2DModel and a scheduler"
            )
        if classes.get("classifier", "NoisyClassifier") != "NoisyClassifier":
            raise ValueError(
                f"{path} has a classifier of the class {classes['classifier']}; only NoisyClassifier is known"
            )
        own = [base.__name__ for base in cls.__mro__ if base.__name__ in OTHER_CLASSES]
        if ({saved} & {*OTHER_CLASSES}) != {*own}:
            raise ValueError(f"{path} holds a {saved}; open it with that class, not with {cls.__name__}")
        kwargs["use_safetensors"] = kwargs.get("use_safetensors") is not False
        # of a repository diffusers would run the code for a class that it does not know
        ours = own or saved == "DDPMImagePipeline" or any(each in OWN_PARTS for each in classes.values())
        folder = local_folder(path, all_files=ours, **kwargs)
        parts, settings = (
            {name: kwargs.pop(name) for name in each if name in kwargs} for each in cls._get_signature_keys(cls)
        )
        # the files of the oldest pipelines lie in the folder itself
        places = {name: folder / name if (folder / name).is_dir() else folder for name in classes.keys() - parts.keys()}
        for place in places.values():
            check_part(place, folder)
        networks, variant, dtype = places.keys() - {"scheduler"}, kwargs.get("variant"), kwargs.pop("dtype", None)
        dtype = kwargs.get("torch_dtype") if dtype is None else dtype
        having = {name for name in networks if f"diffusion_pytorch_model.{variant}" in variants_in(places[name])}
        for name, place in places.items():
            if name == "scheduler":
                parts[name] = open_scheduler(place, classes[name], folder)
                continue
            network_kwargs = {key: kwargs[key] for key in NETWORK_KWARGS if key in kwargs}
            network_kwargs["variant"] = variant if name in having or not having else None  # one at least must have it
            network_kwargs["torch_dtype"] = dtype.get(name, dtype.get("default")) if isinstance(dtype, dict) else dtype
            with naming(place / "config.json"):
                parts[name] = (DDPMUNet if name == "unet" else NoisyClassifier).from_pretrained(place, **network_kwargs)
            # for `folder`, from wherever it is asked
            parts[name].register_to_config(_name_or_path=os.path.abspath(place))
        settings = {name: index[name] for name in cls._get_signature_keys(cls)[1] if name in index} | settings
        with naming(folder / "model_index.json"):
            pipeline = cls(**parts, **settings)
        pipeline.register_to_config(_name_or_path=str(path))
        if "device_map" in kwargs:
            pipeline.hf_device_map = kwargs["device_map"]
        if ignored := kwargs.keys() - {*WHERE, *NETWORK_KWARGS, "torch_dtype", "variant"}:
            logger.warning(f"{cls.__name__}.from_pretrained does not use {', '.join(sorted(ignored))}")
        return pipeline

    def optimize(self, dtype: torch.dtype | None = None, compile: bool = True) -> str:
        """Makes later calls of the pipeline faster, at the same images within rounding; `unet` itself stays as it is.

        They then use an `InferenceUNet` made of `unet`; where weights have changed since, it is given the new ones first.

        Args:
            dtype: of the network's activations; None for that of its weights, torch.bfloat16 for more speed and the rounding
                of autocast. Samples keep the dtype of `unet`.
            compile: by torch.compile; the first call with each batch and image size then takes up to some minutes.

        Returns:
            One line on what was done.

        Raises:
            ValueError: a network that is not a `DDPMUNet`, or has adapters, hooks or offloading.
        """
        self._inference = InferenceUNet(self.unet, dtype, compile)
        return self._inference.report

    def _network(self, timesteps):
        """What is called at these timesteps: the optimized network where there is one, up to date, else `unet`."""
        if self._inference is None:
            return self.unet
        with _UPDATING:
            self._inference = network = self._inference.updated(self.unet)
        return network.at_timesteps(timesteps)

    @property
    def channels(self) -> int:
        """Of the images."""
        return self.unet.config.in_channels

    @property
    def takes_labels(self) -> bool:
        """Whether the network is class-conditional."""
        return getattr(self.unet, "class_embedding", None) is not None

    @property
    def class_names(self) -> list[str] | None:
        """Names of the labels 0, 1, ... of the network, or where it takes none, of the classifier; None if not known."""
        return getattr(
            self.unet if self.takes_labels or self.classifier is None else self.classifier, "class_names", None
        )

    @property
    def interrupt(self) -> bool:
        """True once a callback has set `pipe._interrupt = True`: the loop then stops early."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """Length of the chain of the latest call: more than its steps for schedulers of second order."""
        return self._num_timesteps

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
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
        """Draws images. The network and its classifier are in evaluation mode during the call.

        Args:
            batch_size: number of images.
            generator: one for the batch, or a list with one for each image: image i is then the same alone or in a batch.
            num_inference_steps: steps of the scheduler. None for every timestep the process was trained with, or 50 for
                diffusers' solvers (DPM-Solver, UniPC, DEIS, SA-Solver, Euler, Heun, ...). The chain is set anew in each call:
                what was set on `pipe.scheduler` is neither used nor changed.
            output_type: "pil" (mode L for one channel), "np" or "numpy" (B, H, W, C) in [0, 1], "pt" (B, C, H, W) in [0, 1],
                or "latent" (B, C, H, W), the samples as they are, [-1, 1] but for stray values.
            return_dict: False for a tuple (images,).
            eta: None for the scheduler's own steps; a number in [0, 1] for DDIM, 0 deterministic.
            class_labels: for a class-conditional network or a classifier: (B,) labels, a list, or one label for all; numbers,
                or names of `labels`. None of a network that was trained with label dropout: images of no class.
            guidance_scale: classifier-free guidance of a network that was trained with label dropout, two network calls a
                step in one: 0 is without the class, None and 1 the conditional network, more is more of the class. A number,
                or (B,) with one for each image.
            classifier_scale: classifier guidance (ADM): a number or (B,), of which the gradient of the classifier's
                log p(y | x_t) is taken; None and 0 for none. Ancestral steps of this package's scheduler follow Algorithm 1,
                DDIM and every other scheduler Algorithm 2. A pass of the classifier and back each step, in float32.
            latents: x_T, (B, C, H, W), standard normal; drawn if None. They set the size of the images.
            timesteps: the chain itself in place of num_inference_steps, descending, for schedulers whose `set_timesteps` takes
                them (this package's, DDPM, DPM-Solver, Euler, Heun and others).
            sigmas: likewise, noise levels, for schedulers whose `set_timesteps` takes these.
            callback_on_step_end: called as `callback(pipe, step_index, timestep, tensors)` after each step, `tensors` a dict
                of those named next; what it returns under "sample" or "latents" replaces the sample.
                `pipe._interrupt = True` stops.
            callback_on_step_end_tensor_inputs: of "sample", "latents" (the same by diffusers' name) and "model_output".

        Returns:
            `ImagePipelineOutput` with `.images`.

        Raises:
            ValueError: an argument that cannot be used, named, before any computing; samples that are not finite.
        """
        self._check_output(output_type, callback_on_step_end_tensor_inputs)
        prepared = self._prepare(
            batch_size,
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

    def _run(self, prepared, output_type, return_dict, callback, tensor_inputs):
        """Down the chain that `_prepare` has prepared."""
        sample, scheduler, step = prepared
        self._interrupt = False
        with evaluation_mode(self.unet, self.classifier):
            for i, t in enumerate(self.progress_bar(scheduler.timesteps)):
                model_output, sample, _ = step(t, sample)
                if callback is not None:
                    tensors = {"sample": sample, "latents": sample, "model_output": model_output}
                    changed = callback(self, i, t, {name: tensors[name] for name in tensor_inputs})
                    sample = _changed_sample(changed, sample)
                if self.interrupt:
                    break

        self.maybe_free_model_hooks()
        if not self.interrupt:
            _check_samples(sample, scheduler)
        images = self._to_output(sample, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def progressive(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        *,
        every: int = 1,
        eta: float | None = None,
        class_labels: torch.Tensor | list[int | str] | int | str | None = None,
        guidance_scale: float | torch.Tensor | None = None,
        classifier_scale: float | torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Progressive generation (Ho, Jain, Abbeel 2020, section 4.3, figure 6): what x_0 looks like while t goes down.

        Args:
            every: yield each so many steps, and at the last one.
            Others: as in `__call__`; the images are those of the same call.

        Yields:
            (t, x_t, predicted x_0): t the 0-based timestep, in continuous time what the network is told, a float; x_t (B, C,
            H, W) before the step, the prediction at it (B, C, H, W), [-1, 1] where the scheduler clips. The last prediction is
            the image, but for the shift of classifier guidance.

        Raises:
            ValueError: as `__call__`; every below 1; a scheduler whose steps predict no x_0.
        """
        every = positive_integer("every", every)  # now, and not when the first step is asked for
        prepared = self._prepare(
            batch_size,
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

    @torch.no_grad()
    def _progress(self, sample, scheduler, step, every):
        timesteps = scheduler.timesteps
        for i, t in enumerate(self.progress_bar(timesteps)):
            x_t = sample
            with evaluation_mode(self.unet, self.classifier):  # between steps the modes are the caller's
                _, sample, x_start = step(t, x_t)
            if x_start is None:
                raise ValueError(
                    f"the steps of {type(self.scheduler).__name__} predict no x_0; use a DDPM or DDIM scheduler"
                )
            if i == len(timesteps) - 1:
                _check_samples(sample, scheduler)
            if i % every == 0 or i == len(timesteps) - 1:
                yield t.item(), x_t, x_start
        self.maybe_free_model_hooks()

    @torch.no_grad()
    def interpolate(
        self,
        images_a: torch.Tensor,
        images_b: torch.Tensor,
        weights: list[float],
        timestep: int,
        *,
        generator: torch.Generator | None = None,
        num_inference_steps: int | None = None,
        eta: float | None = None,
        class_labels: torch.Tensor | list[int | str] | int | str | None = None,
        guidance_scale: float | torch.Tensor | None = None,
        classifier_scale: float | torch.Tensor | None = None,
        timesteps: list[int] | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Images between two, mixed at x_t and denoised (Ho, Jain, Abbeel 2020, section 4.4, figures 8 and 9).

        Both images of a pair are diffused with the same noise, whatever the weight, so that the mixture has the marginal
        distribution of x_t; then (1 - weight) x_t of a + weight x_t of b goes down the chain.

        Args:
            images_a, images_b: (B, C, H, W) in [-1, 1].
            weights: K numbers in [0, 1]: 0 is a (reconstructed), 1 is b.
            timestep: 0-based t at which they are mixed; high ones vary more. The chain starts at its first step at or below.
            generator: of all noise.
            class_labels, guidance_scale, classifier_scale: one, or one for each pair; else as in `__call__`.
            num_inference_steps, timesteps, eta, output_type: as in `__call__`; the chain is cut at `timestep`.

        Returns:
            `ImagePipelineOutput` with B * K `.images`: the K of the first pair, those of the second, ...

        Raises:
            ValueError: as `__call__`; images of different shapes, weights outside [0, 1], a timestep that is not one of the
                process, or below the whole chain; a scheduler whose first steps prepare the others (PNDM).
        """
        if not (isinstance(images_a, torch.Tensor) and isinstance(images_b, torch.Tensor)):
            raise ValueError("images_a and images_b must be tensors (B, C, H, W) in [-1, 1]")
        if images_a.shape != images_b.shape:
            raise ValueError(
                f"images_a has shape {tuple(images_a.shape)}, images_b {tuple(images_b.shape)}; give the same"
            )
        try:
            valid = len(weights) > 0 and all(0 <= weight <= 1 for weight in weights)
        except TypeError:
            valid = False
        if not valid:
            raise ValueError(f"weights={weights} must be numbers in [0, 1], one at least")
        continuous = getattr(self.scheduler, "is_continuous", False)
        most = (
            self.scheduler.sde.conditioning_times(1.0).item()
            if continuous
            else self.scheduler.config.num_train_timesteps - 1
        )
        if not (isinstance(timestep, (Real, torch.Tensor)) and timestep <= most):
            raise ValueError(f"timestep={timestep} is beyond the process; choose one from 0 to {most}")
        self._check_output(output_type, ())
        pairs, count = len(images_a), len(weights)
        class_labels, *guidance = (
            _for_each_image(each, count) for each in (self._numbers(class_labels), guidance_scale, classifier_scale)
        )
        self._check_generator(generator)
        noise = randn_tensor(images_a.shape, generator=generator, device=self._execution_device, dtype=self.unet.dtype)
        latents = noise.repeat_interleave(count, dim=0)
        _, scheduler, step = self._prepare(
            pairs * count, generator, num_inference_steps, eta, class_labels, latents, *guidance, timesteps
        )
        chain, order = scheduler.timesteps, getattr(scheduler, "order", 1)
        if order == 1 and not hasattr(scheduler, "sigmas") and len(chain.unique()) < len(chain):
            raise ValueError(
                f"{type(scheduler).__name__} visits its first timesteps twice and cannot start at another; use a DDIM scheduler"
            )
        start = next((i for i in range(0, len(chain), order) if chain[i] <= timestep), None)
        if start is None:
            raise ValueError(f"timestep={timestep} is below the chain, which ends at {chain[-1].item()}")
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(start)
        weight = torch.tensor(weights, dtype=latents.dtype, device=latents.device).repeat(pairs).view(-1, 1, 1, 1)
        a, b = (images.to(latents).repeat_interleave(count, dim=0) for images in (images_a, images_b))
        if not self._centered:
            a, b = a / 2 + 0.5, b / 2 + 0.5
        at = chain[start].expand(pairs * count)
        sample = scheduler.add_noise((1 - weight) * a + weight * b, latents, at)  # linear, as the mixture of both
        with evaluation_mode(self.unet, self.classifier):
            for t in self.progress_bar(chain[start:]):
                _, sample, _ = step(t, sample)
        self.maybe_free_model_hooks()
        _check_samples(sample, scheduler)
        return ImagePipelineOutput(images=self._to_output(sample, output_type))

    def _prepare(
        self,
        batch_size,
        generator,
        num_inference_steps,
        eta,
        class_labels,
        latents,
        guidance_scale=None,
        classifier_scale=None,
        timesteps=None,
        sigmas=None,
        planes=None,
    ):
        """x_T, a scheduler of this call alone, and step(t, x_t) -> (model_output, next sample, predicted x_0 or None)."""
        channels, sample_size = self.channels, self.unet.config.sample_size
        generator = list(generator) if isinstance(generator, tuple) else generator
        batch_size = positive_integer("batch_size", batch_size)
        if latents is not None and not isinstance(latents, torch.Tensor):
            raise ValueError(f"latents={shown(latents)} must be a tensor (B, {channels}, H, W)")
        if latents is not None and latents.dim() > 0 and latents.shape[0] != batch_size and batch_size == 1:
            batch_size = latents.shape[0]
        self._check_arguments(batch_size, generator, eta, latents, channels)
        scheduler = self._prepared_scheduler(num_inference_steps, timesteps, sigmas)
        self._num_timesteps = len(scheduler.timesteps)
        if latents is None:
            _check_start(scheduler)
        device, dtype = self._execution_device, self.unet.dtype
        if class_labels is not None:
            class_labels = self._check_labels(class_labels, batch_size).to(device)
        predict = self._predictor(class_labels, batch_size, guidance_scale, channels)
        gradient = self._guide(class_labels, batch_size, classifier_scale)
        if latents is not None and planes is not None and latents.shape[2:] != planes.shape[2:]:
            raise ValueError(
                f"latents has shape {tuple(latents.shape)}; this network makes {planes.shape[2]}x{planes.shape[3]} images"
            )
        if latents is None:
            if sample_size is None:
                raise ValueError("the network's config has no sample_size; give latents of shape (B, C, H, W)")
            latents = randn_tensor(
                (batch_size, channels, *sides(sample_size)), generator=generator, device=device, dtype=dtype
            )

        takes = inspect.signature(scheduler.step).parameters
        step_kwargs = {"generator": generator} if "generator" in takes else {}
        if eta is not None:
            step_kwargs["eta"] = eta

        # the timesteps stay on the CPU: reading them never waits for the device
        network = self._network(scheduler.timesteps)
        if planes is not None:
            network = Conditioned(network, planes)

        cut = not hasattr(scheduler, "chain") and not _uses_learned_variance(scheduler)  # this package's takes all

        def output_at(t, sample):
            model_input = scheduler.scale_model_input(sample, t)
            model_output = predict(network, model_input, t)
            if cut and model_output.shape[1] == 2 * channels:
                model_output = model_output[:, :channels]
            if gradient is not None and "gradient" in takes:
                step_kwargs["gradient"] = gradient(model_input, t)
            elif gradient is not None:
                model_output = shifted_output(model_output, gradient(model_input, t), scheduler, t)
            return model_output

        corrections = scheduler.config.get("correct_steps", 0) if hasattr(scheduler, "step_correct") else 0
        done = 0

        def step(t, sample):
            nonlocal done
            done += 1
            for _ in range(corrections):
                sample = scheduler.step_correct(output_at(t, sample), t, sample, **step_kwargs)
            model_output = output_at(t, sample)
            if "order" in takes:  # LMS counts the steps from the chain's start, where interpolation may not have been
                step_kwargs["order"] = min(4, done)
            output = scheduler.step(model_output, t, sample, **step_kwargs)
            return model_output, output.prev_sample, getattr(output, "pred_original_sample", None)

        return latents.to(device, dtype) * scheduler.init_noise_sigma, scheduler, step

    def _prepared_scheduler(self, num_inference_steps, timesteps, sigmas):
        """A scheduler for one call, its timesteps set; the pipeline's own stays as it is, such as with a likelihood's chain."""
        # deep: multistep solvers keep lists of the outputs of their last steps
        scheduler = copy.deepcopy(self.scheduler)
        given = {"num_inference_steps": num_inference_steps, "timesteps": timesteps, "sigmas": sigmas}
        given = {name: value for name, value in given.items() if value is not None}
        name, cls = next(iter(given), "num_inference_steps"), type(scheduler).__name__
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} were given; give one of them")
        if name not in inspect.signature(scheduler.set_timesteps).parameters:
            raise ValueError(f"{name}: {cls} takes none; give num_inference_steps, or use another scheduler")
        if name != "num_inference_steps":
            # those of this package's scheduler it checks itself
            bounded = name == "timesteps" and not hasattr(scheduler, "chain")
            most = scheduler.config.num_train_timesteps - 1 if bounded else math.inf
            scheduler.set_timesteps(**{name: _descending(name, given[name], most)})
        else:
            if num_inference_steps is None:
                T = scheduler.config.num_train_timesteps
                n = min(SOLVER_STEPS, max(1, T // 2)) if _is_solver(scheduler) else T
                n = min(n, scheduler.config.get("original_inference_steps") or n)  # of distilled networks: LCM, TCD
            else:
                n = positive_integer(name, num_inference_steps)
            scheduler.set_timesteps(n)
            # where there are sigmas the steps are between those: timesteps are rounded, and may be equal
            places = scheduler.sigmas[:-1] if hasattr(scheduler, "sigmas") else scheduler.timesteps
            if len(places.unique()) < n:
                raise ValueError(
                    f"{cls} visits timesteps twice in {n} steps, and divides by their distance; give fewer"
                )
        if hasattr(scheduler, "set_begin_index"):  # else it would begin at the second of two equal timesteps
            scheduler.set_begin_index(0)
        return scheduler

    def _predictor(self, class_labels, batch_size, guidance_scale, channels):
        """The function (network, x_t, t) -> the network's output, with classifier-free guidance where it is asked for."""
        table = self.takes_labels
        null = getattr(self.unet, "null_class", None)
        scale = None if guidance_scale is None else scales("guidance_scale", guidance_scale, batch_size)
        if scale is not None and (null is None or class_labels is None):
            what = (
                "class_labels: give them" if null is not None else "a network trained with label dropout (null_class)"
            )
            raise ValueError(f"guidance_scale={guidance_scale} needs {what}, or leave it out")
        if class_labels is None and null is not None:
            class_labels = torch.full((batch_size,), null, device=self._execution_device)
        if class_labels is None and table:
            raise ValueError("class_labels are missing: this network is class-conditional; give one for each image")
        labels = class_labels if table else None  # else they are the classifier's
        if scale is None or (scale == 1).all():
            return lambda network, x, t: network(x, t, class_labels=labels, return_dict=False)[0]
        scale, both = scale.to(self._execution_device), torch.cat((labels, torch.full_like(labels, null)))

        def predict(network, x, t):
            output = network(torch.cat((x, x)), t, class_labels=both, return_dict=False)[0]
            return classifier_free(*output.chunk(2), scale, channels)

        return predict

    def _guide(self, class_labels, batch_size, classifier_scale):
        """The function (x_t, t) -> gradient of classifier_scale * log p(y | x_t); None where nothing is to be guided."""
        scale = None if classifier_scale is None else scales("classifier_scale", classifier_scale, batch_size)
        if scale is None:
            return None
        if self.classifier is None or class_labels is None:
            what = (
                "class_labels" if self.classifier is not None else "a classifier: DDPMImagePipeline(..., classifier=)"
            )
            raise ValueError(f"classifier_scale={classifier_scale} needs {what}")
        classes = getattr(self.unet, "num_classes", None)
        names = getattr(self.unet, "class_names", None)
        check_classifier(self.classifier, self.scheduler, classes, self.channels, self.unet.config.sample_size, names)
        if (scale == 0).all():
            return None
        classifier, scale = self.classifier, scale.to(self._execution_device)
        if classifier.dtype != torch.float32 or classifier.training:
            classifier = copy.deepcopy(classifier).float().eval()
        return lambda x, t: classifier.gradient(x, t, class_labels, scale)

    def _check_output(self, output_type, tensor_inputs):
        channels = self.channels
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type!r} is not known; choose one of {', '.join(OUTPUT_TYPES)}")
        if output_type == "pil" and channels not in (1, 3, 4):
            raise ValueError(
                f"output_type='pil' shows 1, 3 or 4 channels, this network has {channels}; use 'np' or 'pt'"
            )
        try:
            unknown = [name for name in tensor_inputs if name not in self._callback_tensor_inputs]
        except TypeError:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs={shown(tensor_inputs)} must be a list of names"
            ) from None
        if unknown:
            known = ", ".join(self._callback_tensor_inputs)
            raise ValueError(f"callback_on_step_end_tensor_inputs names {unknown[0]!r}; known are {known}")

    def _check_generator(self, generator):
        generators = generator if isinstance(generator, (list, tuple)) else [] if generator is None else [generator]
        wrong = [each for each in generators if not isinstance(each, torch.Generator)]
        if wrong:
            seed = wrong[0] if isinstance(wrong[0], Integral) else 0
            raise ValueError(
                f"generator={generator!r} must be a torch.Generator or a list of them; use "
                f"torch.Generator().manual_seed({seed})"
            )
        device, devices = self._execution_device.type, {each.device.type for each in generators}
        if len(devices) > 1 or devices - {"cpu", device}:
            raise ValueError(
                f"generator is on {', '.join(sorted(devices))}, the pipeline on {device}; give generators of one device, "
                f"{device}{' or cpu' if device != 'cpu' else ''}"
            )

    def _check_arguments(self, batch_size, generator, eta, latents, channels):
        self._check_generator(generator)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"generator is a list of {len(generator)} for batch_size={batch_size}; give one for each image"
            )
        if latents is not None and (latents.dim() != 4 or latents.shape[:2] != (batch_size, channels)):
            raise ValueError(
                f"latents has shape {tuple(latents.shape)}; for batch_size={batch_size} give ({batch_size}, {channels}, H, W)"
            )
        if eta is not None and not (isinstance(eta, Real) and 0 <= eta <= 1):
            raise ValueError(f"eta={eta!r} must be in [0, 1]: 0 is deterministic DDIM, 1 has the posterior's variance")
        if eta is not None and "eta" not in inspect.signature(self.scheduler.step).parameters:
            raise ValueError(
                f"eta={eta}: {type(self.scheduler).__name__} has none; leave it out or use another scheduler"
            )

    def _numbers(self, labels):
        """Class labels, the names among them as numbers."""
        if isinstance(labels, str):
            return label_ids([labels], self.class_names, "class_labels")[0]
        if isinstance(labels, (list, tuple)) and any(isinstance(label, str) for label in labels):
            return [self._numbers(label) for label in labels]
        return labels

    def _check_labels(self, labels, batch_size):
        labels = self._numbers(labels)
        try:
            labels = torch.as_tensor(labels)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"class_labels={shown(labels)} must be numbers or names, one for each image") from None
        labels = labels.expand(batch_size) if labels.dim() == 0 else labels
        classes = getattr(self.unet, "num_classes", None)
        if not self.takes_labels:
            if self.classifier is None:
                raise ValueError("class_labels were given, but this network has no classes; leave them out")
            classes = self.classifier.config.num_classes
        if classes is not None:
            other = labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool
            if other or labels.dim() != 1 or len(labels) == 0 or labels.min() < 0 or labels.max() >= classes:
                raise ValueError(
                    f"class_labels={shown(labels.tolist())}: give integers from 0 to {classes - 1}, one for each image"
                )
            labels = labels.long()
        if labels.shape[0] != batch_size:
            raise ValueError(f"class_labels has {labels.shape[0]} entries for batch_size={batch_size}")
        return labels

    @property
    def _centered(self):
        """Whether samples are in [-1, 1], and not in [0, 1] as NCSN's."""
        return self.scheduler.config.get("centered", True)

    def _to_output(self, sample, output_type):
        if output_type == "latent":
            return sample
        images = (sample.float() / 2 + 0.5 if self._centered else sample.float()).clamp(0, 1)
        if output_type == "pt":
            return images
        images = images.permute(0, 2, 3, 1).cpu().numpy()
        return self.numpy_to_pil(images) if output_type == "pil" else images

    def to_json_string(self) -> str:
        """The pipeline's index as it is saved: in diffusers' own class names."""
        index = json.loads(super().to_json_string())
        index.pop("_name_or_path", None)  # where it was loaded from concerns nobody else
        for name, entry in index.items():
            if isinstance(entry, list) and entry[-1] in STOCK_CLASSES:
                index[name] = ["diffusers", STOCK_CLASSES[entry[-1]]]
            elif isinstance(entry, list) and entry[-1] in OWN_PARTS:
                index[name] = [OWN_PARTS[entry[-1]], entry[-1]]
        if self.classifier is None:
            index.pop("classifier", None)  # stock classes have none
        # stock classes would draw from a process of continuous time, and wrongly
        own = type(self.scheduler).__name__ in OWN_PARTS
        name = ["pipeline", "DDPMImagePipeline"] if own else "DDPMPipeline"
        return json.dumps({**index, "_class_name": name}, indent=2, sort_keys=True) + "\n"

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """Writes `model_index.json`, and `pipeline.py` with this class and its parts in one self-contained file; the
        same for a part that no stock class stands for, beside it.
        """
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        write_source(self._source_module, save_directory)
        for name, part in self.components.items():
            if type(part).__name__ in OWN_PARTS:
                source = OWN_PARTS[type(part).__name__]
                write_source(type(part).__module__, os.path.join(save_directory, name), source)


def local_folder(path: str | os.PathLike, all_files: bool, **kwargs) -> Path:
    """The folder itself, or that to which a repository of this name was downloaded.

    all_files: all weights of a repository, whatever diffusers would choose by its index.
    kwargs: of `from_pretrained`.
    """
    if os.path.isdir(path):
        return Path(path)
    where = {name: kwargs[name] for name in WHERE if name in kwargs}
    if not all_files:
        kinds = {name: kwargs[name] for name in ("variant", "use_safetensors") if name in kwargs}
        where["revision"] = Path(DDPMImagePipeline.download(str(path), **kinds, **where)).name  # its commit
    where.pop("proxies", None)
    return Path(snapshot_download(str(path), allow_patterns=[*(FILES if all_files else ()), *BESIDE], **where))


def open_scheduler(folder: Path, class_name: str, pipeline_folder: Path):
    """The scheduler that a pipeline has in `folder`: one of this package, or of diffusers. Raises ValueError."""
    path = folder / "scheduler_config.json"
    cls = OUR_SCHEDULERS.get(class_name) or getattr(diffusers, class_name, None)
    if not (isinstance(cls, type) and issubclass(cls, SchedulerMixin)):
        raise ValueError(
            f"{path} is for the class {class_name}, which is no scheduler of diffusers {diffusers.__version__}"
        )
    sizes = {name: value for name, value in read_config(path, pipeline_folder).items() if isinstance(value, int)}
    absurd = next((name for name, value in sizes.items() if abs(value) > 10**6), None)
    if absurd:
        raise ValueError(f"{path}: {absurd}={sizes[absurd]} is beyond 1,000,000; no scheduler is that large")
    with naming(path):
        return cls.from_pretrained(folder)


def our_scheduler(scheduler):
    """Of diffusers' schedulers that this package has a class for, one of that; others as they are."""
    name = type(scheduler).__name__
    ours = OUR_SCHEDULERS.get(name)
    return scheduler if ours is None or name == ours.__name__ else ours.from_config(scheduler.config)


def positive_integer(name, value):
    """An argument as an int, 1 or more; of NumPy and 0-d tensors too."""
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{name}={value!r} must be an integer, 1 or more")
    return number


def _descending(name, values, most):
    """A chain that was given, from `most` at most down to 0 at least, as a list of numbers."""
    try:
        numbers = torch.as_tensor(values)
        valid = numbers.dim() == 1 and len(numbers) > 0 and bool((numbers.diff() < 0).all() & numbers.isfinite().all())
    except (TypeError, ValueError, RuntimeError):
        valid = False
    if not valid:
        raise ValueError(f"{name}={values!r} must be strictly descending numbers, one at least")
    if numbers[-1] < 0 or numbers[0] > most:
        allowed = "0 or more" if most == math.inf else f"{most} to 0"
        raise ValueError(f"{name}={shown(values)} must be strictly descending numbers, {allowed}")
    return numbers.tolist()


def _changed_sample(changed, sample):
    """The sample that a callback returned, or the same if it returned none."""
    if not isinstance(changed, torch.Tensor) and not changed:
        return sample
    values = [changed.get(name, sample) for name in ("sample", "latents")] if hasattr(changed, "get") else [None]
    sample = next((each for each in values if each is not sample), sample)
    if not isinstance(sample, torch.Tensor):
        raise ValueError(
            f"callback_on_step_end returned {shown(changed)}; return a dict, its sample or latents a tensor"
        )
    return sample


def _is_solver(scheduler):
    """Whether it is one of diffusers' solvers of the process's ODE or SDE, and has not the process's own steps."""
    own = isinstance(scheduler, (VPSDEScheduler, SubVPSDEScheduler, VESDEScheduler))
    return not own and not hasattr(scheduler, "_get_variance")


def _uses_learned_variance(scheduler):
    """Whether its steps take the doubled channels of a network that learned its variance."""
    variance = inspect.signature(getattr(scheduler, "_get_variance", list)).parameters
    return scheduler.config.get("variance_type") in LEARNED_VARIANCES and "predicted_variance" in variance


def _check_start(scheduler):
    """Warns where noise alone goes in at a timestep whose x_t still holds much of the image.

    Much: more than a tenth of x_0, and twice what is left at the process's last timestep.
    """
    start, alphas_cumprod = float(scheduler.timesteps[0]), getattr(scheduler, "alphas_cumprod", None)
    if alphas_cumprod is None:
        return
    signal, least = (math.sqrt(alphas_cumprod[t]) for t in (min(round(start), len(alphas_cumprod) - 1), -1))
    if signal > max(0.1, 2 * least):
        _warn_once(
            f"the chain starts at timestep {start:g} from noise alone, but x_t there still holds {signal:.2f} of the image: "
            "samples lack contrast and variety; choose timestep_spacing='trailing', other timesteps, or a number of steps that "
            "divides num_train_timesteps"
        )


@functools.lru_cache(maxsize=64)
def _warn_once(message):
    logger.warning(message)


def _check_samples(sample, scheduler):
    """Refuses samples that are not finite, and warns of those far outside of their range. It waits for the device once."""
    bad = len(sample) - sample.isfinite().flatten(1).all(1).sum()
    bad, size = torch.stack((bad.float(), sample.float().square().mean().sqrt())).tolist()
    chain, timesteps = type(scheduler).__name__, scheduler.timesteps
    chain = f"{chain}, {len(timesteps)} timesteps from {float(timesteps[0]):g}"
    if bad:
        raise ValueError(
            f"{bad:.0f} of {len(sample)} samples are not finite ({chain}): the network's weights, half precision or the solver "
            "overflowed; try another number of steps or scheduler, or float32"
        )
    if size > 2:
        logger.warning(
            f"samples lie far outside of [-1, 1], their root mean square is {size:.3g} ({chain}): a solver that does not clip "
            "multiplies errors of the network at pure noise; start below it (timestep_spacing='leading'), clip "
            "(thresholding=True where the scheduler has it), or use a DDPM or DDIM scheduler"
        )


def _for_each_image(values, count):
    """Values for each pair, `count` times each; one value, or what is none, as it is: it is checked later."""
    try:
        values = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        return values
    return values.repeat_interleave(count, dim=0) if values.dim() > 0 else values
