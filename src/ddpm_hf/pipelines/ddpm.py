"""Image generation with a DDPM, as a diffusers pipeline that saves to one folder every diffusers user can open."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from ddpm_hf.arguments import sides
from ddpm_hf.models.conditioning import Conditioned
from ddpm_hf.models.evaluation_mode import evaluation_mode
from ddpm_hf.models.unet import DDPMUNet
from ddpm_hf.pipelines.chain import (
    check_samples,
    check_within_process,
    first_step,
    prepared_scheduler,
    takes_learned_variance,
    warn_of_late_start,
)
from ddpm_hf.pipelines.guidance import (
    GuidedNetwork,
    classifier_free_arguments,
    classifier_gradient,
)
from ddpm_hf.pipelines.index import SavedPipeline
from ddpm_hf.pipelines.labels import NamedClasses, label_numbers, label_tensor
from ddpm_hf.pipelines.options import (
    SamplingOptions,
    check_batch,
    check_callback_inputs,
    check_eta,
    check_generator,
    check_mixture,
    check_output,
    positive_integer,
    repeated,
    sample_from_callback,
)
from ddpm_hf.pipelines.packaged import PackagedImagePipeline
from ddpm_hf.schedulers import SCHEDULERS
from ddpm_hf.schedulers.conditioning_times import conditioning_times


@dataclass
class Sampling:
    """The state of one sampling call; calls share nothing.

    Attributes:
        noise: x_T, (B, C, H, W).
        scheduler: a copy of the pipeline's scheduler with its timesteps set.
        network: called as network(x_t, c_noise); applies classifier-free guidance if there is any.
        gradient: `ClassifierGradient`; None without classifier guidance.
        step_kwargs: arguments of `scheduler.step` beside output, timestep and sample.
        step_arguments: the names of all arguments of `scheduler.step`.
    """

    noise: torch.Tensor
    scheduler: object
    network: GuidedNetwork
    gradient: Callable | None = None
    step_kwargs: dict = field(default_factory=dict)
    step_arguments: frozenset[str] = frozenset()


@dataclass
class DenoisingStep:
    """One denoising step from x_t at `timestep` to `sample`, which may be replaced before the next step.

    `index` counts steps from 0; images are (B, C, H, W); `pred_original_sample` is None if the scheduler predicts no x_0.
    """

    index: int
    timestep: torch.Tensor
    x_t: torch.Tensor
    model_output: torch.Tensor
    sample: torch.Tensor
    pred_original_sample: torch.Tensor | None


class DDPMImagePipeline(NamedClasses, SavedPipeline, PackagedImagePipeline, DiffusionPipeline):
    """Draws images by running a diffusion process backwards (Ho, Jain, Abbeel 2020, Algorithm 2; DDIM with `eta`).

    A saved folder opens without this package: plain `DiffusionPipeline.from_pretrained(folder)` gives diffusers'
    `DDPMPipeline`; with `custom_pipeline=folder, trust_remote_code=True` it gives this class, from a self-contained
    `pipeline.py` beside the weights.

    Args:
        unet: `DDPMUNet`, or diffusers' `UNet2DModel`, which is converted to a `DDPMUNet` with the same tensors.
        scheduler: a scheduler of this package, or any diffusers scheduler of discrete timesteps. diffusers' `DDPMScheduler`,
            ScoreSdeVeScheduler and ScoreSdeVpScheduler are converted to this package's classes.
        classifier: `NoisyClassifier` for classifier guidance of a conditional or an unconditional network; None for none.
    """

    stock_class = "DDPMPipeline"

    model_cpu_offload_seq = "unet"
    _optional_components = ["classifier"]
    _exclude_from_cpu_offload = ["classifier"]  # gradients go through it
    _callback_tensor_inputs = ["sample", "latents", "model_output"]

    # ModelMixin: trusted code may bring a DDPMUNet of its own file
    def __init__(
        self, unet: DDPMUNet | UNet2DModel | ModelMixin, scheduler: SchedulerMixin, classifier: ModelMixin | None = None
    ):
        super().__init__()
        self.register_modules(unet=our_unet(unet), scheduler=our_scheduler(scheduler), classifier=classifier)

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return self.unet.config.in_channels

    @property
    def execution_device(self) -> torch.device:
        """The device that the network runs on; that of its weights, or the accelerator if they are offloaded."""
        return self._execution_device

    @property
    def takes_labels(self) -> bool:
        """Whether the network is class-conditional."""
        return getattr(self.unet, "class_embedding", None) is not None

    @property
    def class_names(self) -> list[str] | None:
        """Class names of labels 0, 1, ...: the network's, or the classifier's if that has none; None if unknown."""
        return getattr(
            self.unet if self.takes_labels or self.classifier is None else self.classifier, "class_names", None
        )

    @property
    def interrupt(self) -> bool:
        """True once a callback has set `pipe._interrupt = True`: the loop then stops early."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """Length of the latest call's chain: more than its steps for second-order schedulers."""
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
        timesteps: list[int] | str | None = None,
        sigmas: list[float] | None = None,
        callback_on_step_end: Callable[..., dict] | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] = ("sample", "latents"),
    ) -> ImagePipelineOutput | tuple:
        """Draws images, with the network and the classifier in evaluation mode.

        Args:
            batch_size: number of images.
            generator: one for the batch, or a list with one per image, so that an image does not depend on its batch.
            num_inference_steps: steps of the scheduler. None for every timestep the process was trained with, or 50 for
                diffusers' solvers (DPM-Solver, UniPC, DEIS, SA-Solver, Euler, Heun, ...). Timesteps that were set on
                `pipe.scheduler` are neither used nor changed.
            output_type: "pil" (mode L for one channel), "np" or "numpy" (B, H, W, C) in [0, 1], "pt" (B, C, H, W) in [0, 1],
                or "latent" (B, C, H, W), the samples unclipped, about [-1, 1].
            return_dict: False for a tuple (images,).
            eta: None for the scheduler's own steps; a number in [0, 1] for DDIM; 0 is deterministic.
            class_labels: for a class-conditional network or a classifier: (B,) labels, a list, or one label for all; numbers,
                or names of `labels`. After training with label dropout, None draws unconditional images.
            guidance_scale: classifier-free guidance, for a network trained with label dropout; doubles the batch of each
                network call. 0 ignores the class, None and 1 are the conditional network, higher values follow the class
                more closely. A number, or (B,) with one per image.
            classifier_scale: classifier guidance (ADM): the factor of the gradient of the classifier's log p(y | x_t), a
                number or (B,); None and 0 for none. Ancestral steps of this package's scheduler follow Algorithm 1, DDIM and
                every other scheduler Algorithm 2. Each step adds a float32 forward and backward pass of the classifier.
            latents: x_T, (B, C, H, W), standard normal; drawn if None. Images have their size.
            timesteps: descending timesteps in place of num_inference_steps, if the scheduler's `set_timesteps` takes them
                (this package's, DDPM, DPM-Solver, Euler, Heun and others). Or, beside it, the name of a list in
                `timestep_lists` of this package's scheduler.
            sigmas: descending noise levels, if the scheduler's `set_timesteps` takes them.
            callback_on_step_end: called as `callback(pipe, step_index, timestep, tensors)` after each step. `tensors` is a
                dict; "sample" or "latents" in the dict it returns replaces the sample. `pipe._interrupt = True` stops.
            callback_on_step_end_tensor_inputs: names in `tensors`: "sample", "latents" (the same) and "model_output".

        Returns:
            `ImagePipelineOutput` with `.images`.

        Raises:
            ValueError: an argument is invalid, which is checked before sampling; or samples are not finite.
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
        sampling = self._prepare(batch_size, options)
        return self._sample(
            sampling, output_type, return_dict, callback_on_step_end, callback_on_step_end_tensor_inputs
        )

    def _sample(self, sampling, output_type, return_dict, callback, tensor_inputs):
        """x_T -> x_0 -> images, with the callback after each step."""
        self._interrupt = False
        with evaluation_mode(self.unet, self.classifier):
            for step in self._denoise(sampling, sampling.noise):
                if callback is not None:
                    tensors = {"sample": step.sample, "latents": step.sample, "model_output": step.model_output}
                    answer = callback(self, step.index, step.timestep, {name: tensors[name] for name in tensor_inputs})
                    step.sample = sample_from_callback(answer, step.sample)
                if self.interrupt:
                    break
        self.maybe_free_model_hooks()
        if not self.interrupt:
            check_samples(step.sample, sampling.scheduler)
        images = self._decode(step.sample, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def _denoise(self, sampling: Sampling, sample: torch.Tensor, first: int = 0) -> Iterator[DenoisingStep]:
        """Denoises `sample` along the chain, from step `first` on; all sampling methods use this loop."""
        scheduler, network, kwargs = sampling.scheduler, sampling.network, sampling.step_kwargs
        corrections = scheduler.config.get("correct_steps", 0) if hasattr(scheduler, "step_correct") else 0

        for i, t in enumerate(self.progress_bar(scheduler.timesteps[first:])):
            c_noise = conditioning_times(scheduler, t)
            for _ in range(corrections):  # in continuous time: Score-SDE, Algorithms 2 and 3
                sample = scheduler.step_correct(network(sample, c_noise), t, sample, **kwargs)

            x_t = sample
            model_input = scheduler.scale_model_input(x_t, t)
            model_output = network(model_input, c_noise)
            if sampling.gradient is not None and "gradient" in sampling.step_arguments:  # ADM, Algorithm 1
                kwargs["gradient"] = sampling.gradient(model_input, c_noise)
            elif sampling.gradient is not None:  # ADM, Algorithm 2
                model_output = sampling.gradient.shifted(model_output, model_input, scheduler, t)
            if "order" in sampling.step_arguments:  # LMS counts from the chain's start, even if sampling began later
                kwargs["order"] = min(4, i + 1)
            output = scheduler.step(model_output, t, x_t, **kwargs)

            step = DenoisingStep(
                i, t, x_t, model_output, output.prev_sample, getattr(output, "pred_original_sample", None)
            )
            yield step
            sample = step.sample

    def _decode(self, sample, output_type):
        """Converts x_0 to images of an `output_type`."""
        if output_type == "latent":
            return sample
        images = (sample.float() / 2 + 0.5 if self._is_centered else sample.float()).clamp(0, 1)
        if output_type == "pt":
            return images
        images = images.permute(0, 2, 3, 1).cpu().numpy()
        return self.numpy_to_pil(images) if output_type == "pil" else images

    @property
    def _is_centered(self):
        """Whether samples are in [-1, 1]; NCSN's are in [0, 1]."""
        return self.scheduler.config.get("centered", True)

    def progressive(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        *,
        every: int = 1,
        with_samples: bool = False,
        **options,
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yields the predicted x_0 while sampling: progressive generation (Ho, Jain, Abbeel 2020, section 4.3, figure 6).

        Args:
            every: yield at every n-th step, and at the last.
            with_samples: end with (-1, samples, samples), and allow schedulers that predict no x_0.
            batch_size, generator, num_inference_steps: as in `__call__`, which gives the same images.
            options: eta, class_labels, guidance_scale, classifier_scale, latents, timesteps and sigmas, as in `__call__`.

        Yields:
            (t, x_t, predicted x_0): t is the 0-based timestep, in continuous time the network's time, a float; x_t (B, C, H, W)
            before the step; x_0 (B, C, H, W), in [-1, 1] if the scheduler clips. Without classifier guidance the last
            prediction is the image.

        Raises:
            ValueError: as `__call__`; `every` is below 1; the scheduler predicts no x_0.
        """
        every = positive_integer("every", every)  # now, not at the first step
        options = SamplingOptions(generator, num_inference_steps, **options)
        return self._progress(self._prepare(batch_size, options), every, with_samples)

    def _progress(self, sampling, every, with_samples=False):
        steps, last = self._denoise(sampling, sampling.noise), len(sampling.scheduler.timesteps) - 1
        for _ in range(last + 1):
            with evaluation_mode(self.unet, self.classifier):  # not between steps
                step = next(steps)
            if step.pred_original_sample is None and not with_samples:
                raise ValueError(f"the steps of {type(self.scheduler).__name__} predict no x_0; use DDPM or DDIM")
            if step.index == last:
                check_samples(step.sample, sampling.scheduler)
            if step.index % every == 0 or step.index == last:
                yield step.timestep.item(), step.x_t, step.pred_original_sample
        next(steps, None)  # ends its bar
        self.maybe_free_model_hooks()
        if with_samples:
            yield -1, step.sample, step.sample

    @torch.no_grad()
    def interpolate(
        self,
        images_a: torch.Tensor,
        images_b: torch.Tensor,
        weights: list[float],
        timestep: int,
        *,
        generator: torch.Generator | None = None,
        class_labels: torch.Tensor | list[int | str] | int | str | None = None,
        guidance_scale: float | torch.Tensor | None = None,
        classifier_scale: float | torch.Tensor | None = None,
        output_type: str = "pil",
        **options,
    ) -> ImagePipelineOutput:
        """Interpolates images: mixes them at x_t and denoises (Ho, Jain, Abbeel 2020, section 4.4, figures 8 and 9).

        Both images of a pair get the same noise, so that their mixture (1 - weight) x_t(a) + weight x_t(b) has the noise
        level of x_t. The mixture is then denoised.

        Args:
            images_a, images_b: (B, C, H, W) in [-1, 1].
            weights: K numbers in [0, 1]: 0 reconstructs a, 1 reconstructs b.
            timestep: 0-based t of the mixing; higher means more variety. The chain starts at its first step at or below t.
            generator: for all noise.
            class_labels, guidance_scale, classifier_scale: as in `__call__`, one for all or one per pair.
            output_type: as in `__call__`.
            options: num_inference_steps, timesteps, sigmas and eta, as in `__call__`.

        Returns:
            `ImagePipelineOutput` with B * K `.images`, ordered by pair, then weight.

        Raises:
            ValueError: as `__call__`; images of different shapes, weights outside [0, 1], a timestep outside the process or
                below the chain; a scheduler that needs its first steps to start (PNDM).
        """
        check_mixture(images_a, images_b, weights)
        check_within_process(timestep, self.scheduler)
        self._check_output(output_type)
        check_generator(generator, self.execution_device)
        pairs, count = len(images_a), len(weights)
        noise = randn_tensor(images_a.shape, generator=generator, device=self.execution_device, dtype=self.unet.dtype)
        noise = noise.repeat_interleave(count, dim=0)
        options = SamplingOptions(
            generator=generator,
            latents=noise,
            class_labels=repeated(label_numbers(class_labels, self.class_names), count),
            guidance_scale=repeated(guidance_scale, count),
            classifier_scale=repeated(classifier_scale, count),
            **options,
        )
        sampling = self._prepare(pairs * count, options)
        scheduler = sampling.scheduler
        first = first_step(scheduler, timestep)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        weight = torch.tensor(weights, dtype=noise.dtype, device=noise.device).repeat(pairs).view(-1, 1, 1, 1)
        a, b = (images.to(noise).repeat_interleave(count, dim=0) for images in (images_a, images_b))
        if not self._is_centered:
            a, b = a / 2 + 0.5, b / 2 + 0.5
        t = scheduler.timesteps[first].expand(pairs * count)
        # add_noise is linear: this equals the mixture of both x_t
        sample = scheduler.add_noise((1 - weight) * a + weight * b, noise, t)
        with evaluation_mode(self.unet, self.classifier):
            for step in self._denoise(sampling, sample, first):
                sample = step.sample
        self.maybe_free_model_hooks()
        check_samples(sample, scheduler)
        return ImagePipelineOutput(images=self._decode(sample, output_type))

    def _prepare(self, batch_size, options: SamplingOptions, planes: torch.Tensor | None = None) -> Sampling:
        """Checks the options and prepares the loop; `planes` are concatenated to x_t as input of the network."""
        channels, device, dtype = self.channels, self.execution_device, self.unet.dtype
        check_generator(options.generator, device)
        batch_size = check_batch(options, batch_size, channels)
        check_eta(options.eta, self.scheduler)
        scheduler = prepared_scheduler(self.scheduler, options)
        self._num_timesteps = len(scheduler.timesteps)
        if options.latents is None and not isinstance(
            options.timesteps, str
        ):  # named lists count the cost of their start
            warn_of_late_start(scheduler)
        labels = self._label_tensor(options.class_labels, batch_size)
        guidance = classifier_free_arguments(self, labels, options.guidance_scale, batch_size)
        gradient = classifier_gradient(self, labels, options.classifier_scale, batch_size)
        generator = list(options.generator) if isinstance(options.generator, tuple) else options.generator
        noise = self._noise(batch_size, options.latents, generator, planes)

        step_arguments = frozenset(inspect.signature(scheduler.step).parameters)
        step_kwargs = {"generator": generator} if "generator" in step_arguments else {}
        if options.eta is not None:
            step_kwargs["eta"] = options.eta
        # the timesteps stay on the CPU: reading them never waits for the device
        network = self._network(conditioning_times(scheduler, scheduler.timesteps))
        network = network if planes is None else Conditioned(network, planes)
        network = GuidedNetwork(network, channels, with_variance=takes_learned_variance(scheduler), **guidance)
        noise = noise.to(device, dtype) * scheduler.init_noise_sigma
        return Sampling(noise, scheduler, network, gradient, step_kwargs, step_arguments)

    def _noise(self, batch_size, latents, generator, planes):
        """The caller's latents, or standard normal noise."""
        sample_size = self.unet.config.sample_size
        if latents is not None:
            if planes is not None and latents.shape[2:] != planes.shape[2:]:
                raise ValueError(
                    f"latents has shape {tuple(latents.shape)}; this network makes {planes.shape[2]}x{planes.shape[3]} images"
                )
            return latents
        if sample_size is None:
            raise ValueError("the network's config has no sample_size; give latents of shape (B, C, H, W)")
        shape = (batch_size, self.channels, *sides(sample_size))
        return randn_tensor(shape, generator=generator, device=self.execution_device, dtype=self.unet.dtype)

    def _label_tensor(self, labels, batch_size):
        """Converts `class_labels` to a tensor on the pipeline's device; checks them."""
        if labels is None:
            return None
        num_classes = getattr(self.unet, "num_classes", None)
        labels = label_numbers(labels, self.class_names)
        if not self.takes_labels:
            if self.classifier is None:
                raise ValueError("class_labels were given, but this network has no classes; leave them out")
            num_classes = self.classifier.config.num_classes
        return label_tensor(labels, batch_size, num_classes).to(self.execution_device)

    def _check_output(self, output_type, tensor_inputs=()):
        check_output(output_type, self.channels)
        check_callback_inputs(tensor_inputs, self._callback_tensor_inputs)


def our_unet(unet: torch.nn.Module) -> torch.nn.Module:
    """Converts diffusers' `UNet2DModel` to a `DDPMUNet` with the same tensors; returns other networks unchanged.

    Raises:
        ValueError: some tensors have no values.
    """
    if not DDPMUNet.replaces(unet):
        return unet
    lost = [name for name, weight in unet.state_dict().items() if weight.is_meta]
    if lost:
        raise ValueError(
            f"the network has no values for {len(lost)} of its tensors, {lost[0]} first: its weights lack them"
        )
    with torch.device("meta"):
        ours = DDPMUNet.from_config(unet.config)
    ours.load_state_dict(unet.state_dict(), assign=True)
    return ours.train(unet.training)


def our_scheduler(scheduler: SchedulerMixin) -> SchedulerMixin:
    """Converts a diffusers scheduler to the class of this package that stands for it; returns others unchanged."""
    ours = next((cls for cls in SCHEDULERS if cls.replaces(scheduler)), None)
    return scheduler if ours is None else ours.from_config(scheduler.config)
