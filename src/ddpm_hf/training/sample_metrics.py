"""The Fréchet distance of a run's samples to its training images (`eval_metrics`)."""

import contextlib
import math
import time
from collections.abc import Iterator

import torch

from ddpm_hf.data.sources import public_name
from ddpm_hf.evaluation.features.extractors import open_extractor
from ddpm_hf.evaluation.features.reference import Reference, reference_of
from ddpm_hf.evaluation.generation import Generator
from ddpm_hf.evaluation.image_sets import DataImages
from ddpm_hf.evaluation.metrics.features import float64_device
from ddpm_hf.evaluation.metrics.frechet import Moments, frechet_distance, frechet_error
from ddpm_hf.evaluation.processes import Processes
from ddpm_hf.pipelines.chain import default_steps
from ddpm_hf.training.averages import evaluating
from ddpm_hf.training.config import TrainConfig
from ddpm_hf.training.errors import as_config_error
from ddpm_hf.training.inputs import TrainingImages, levels_of
from ddpm_hf.training.low_resolution import make_pipeline
from ddpm_hf.training.messages import print_above_progress_bar

FIRST_SEED = 2**32  # samples of an evaluation have smaller seeds: a checkpoint is not chosen by those
MOST_REAL_IMAGES = 50_000
ERROR_GROUPS = 16  # the error is known to 18 %
TIMED_STEPS = 5


class SampleMetrics:
    """Draws samples from the same noise at each measurement, and compares their features with those of training images.

    Random states are as before after each method.

    Raises:
        ConfigError: the extractor cannot be opened.
    """

    def __init__(self, config: TrainConfig, network, scheduler, accelerator):
        self.config, self.network, self.scheduler, self.accelerator = config, network, scheduler, accelerator
        self.processes = Processes(accelerator.process_index, accelerator.num_processes)
        pipeline = make_pipeline(config, network, self._copy_of_scheduler())
        pipeline.set_progress_bar_config(leave=False, disable=None if self.processes.is_main else True)
        self.steps = config.sample_steps or default_steps(scheduler)
        self.generator = Generator(pipeline, num_inference_steps=self.steps)
        first = FIRST_SEED + config.seed * config.eval_samples
        self.seeds = range(first, first + config.eval_samples)[self.processes.share(config.eval_samples)]
        with self._guarded(), accelerator.local_main_process_first():  # which may download it
            self.extractor = open_extractor(config.eval_extractor, accelerator.device)

    def _copy_of_scheduler(self):
        """The process with its present betas; sampling does not change the training's chain."""
        return type(self.scheduler).from_config(self.scheduler.config)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Restore random states at the end; errors are of the extractor."""
        with (
            random_states_kept(self.accelerator.device),
            as_config_error(f"eval_extractor={self.config.eval_extractor!r}", (Exception,)),
        ):
            yield

    def open_reference(self, data: TrainingImages) -> None:
        """Compute or find the features of the training images, and print what is measured.

        Raises:
            ConfigError: images or features that cannot be read or computed.
        """
        config = self.config
        keys = ("channels", "image_column", "max_broken", "max_image_pixels")
        with self._guarded():
            images = DataImages(
                data.images,
                self.network,
                levels_of(config),
                MOST_REAL_IMAGES,
                data=public_name(config.data),
                split=config.split,
                **{key: getattr(config, key) for key in keys},
            )
            if self.processes.is_main:  # now, because features of many images take minutes
                print_above_progress_bar(
                    f"fd: {self.extractor.distance} of {config.eval_samples:,} samples ({self.steps} steps) to "
                    f"{len(images):,} training images, whose features are computed once and stored"
                )
            self.reference: Reference = reference_of(images, self.extractor, processes=self.processes)
            real = self.reference.moments
            assert real is not None
        of_samples = Moments(config.eval_samples, real.mean, real.covariance)
        if (advice := of_samples.advice or real.advice) and self.processes.is_main:
            print_above_progress_bar(f"fd: {advice}")

    def measure(self, interrupts) -> dict[str, float]:
        """The Fréchet distance of the network's samples and its standard error, the same in all processes.

        NaN where they cannot be computed.

        Raises:
            Interrupted: in all processes, if a signal came meanwhile.
        """

        def compare():
            return self._compare(self.reference.moments, torch.cat(shares)) if self.processes.is_main else None

        with random_states_kept(self.accelerator.device):
            shares = interrupts.run(self.network, self._features)
            results = shares and interrupts.run(self.network, compare)
        value, error = results[0] if results else (math.nan, math.nan)
        return {"fd": value, "fd_standard_error": error}

    def _features(self):
        """The features (N, D) of this process's samples."""
        size = self.config.batch_size
        self.generator.pipeline.scheduler = self._copy_of_scheduler()
        batches = (self.seeds[start : start + size] for start in range(0, len(self.seeds), size))
        return torch.cat([torch.empty(0, self.reference.moments.dimensions), *map(self._features_of_batch, batches)])

    def _features_of_batch(self, seeds, **kwargs):
        pixels = self.generator.draw_pixels(seeds, **kwargs)
        try:
            features = self.extractor(pixels)["features"].cpu()
        except Exception as error:  # of a function of the user's
            raise ValueError(f"{self.extractor.name}: {error}") from error
        if not features.isfinite().all():
            raise ValueError(f"features by {self.extractor.name} are not finite")
        return features

    def _compare(self, real, features):
        device = float64_device(self.accelerator.device)
        real, features = real.to(device), features.to(device)
        generator = torch.Generator().manual_seed(0)
        error = frechet_error(real, features, groups=ERROR_GROUPS, generator=generator)
        return frechet_distance(real, features), error

    def time(self) -> tuple[float, float]:
        """Seconds that each sample of a measurement takes, its features included, and those of the comparison."""
        seeds, steps = self.seeds[: self.config.batch_size], min(self.steps, TIMED_STEPS)

        def stop(pipeline, index, *_):
            pipeline._interrupt = index == steps - 1
            return {}

        def draw():
            self.generator.draw(seeds, output_type="pt", callback_on_step_end=stop).sum().item()

        def extract():
            return self.extractor(pixels)["features"].cpu()

        with evaluating(self.network), self._guarded():
            shape = (len(seeds), self.config.channels, *self.generator.pipeline.unet.config.sample_size)
            pixels = torch.randint(256, shape, dtype=torch.uint8, device=self.accelerator.device)
            dimensions = extract().shape[1]
            draw()  # first calls load kernels
            seconds = [_seconds(draw) * self.steps / steps, _seconds(extract)]
            features = torch.randn(self.config.eval_samples, dimensions)
            comparison = _seconds(lambda: self._compare(Moments.of(features), features))
        return sum(seconds) / len(seeds) / self.processes.world_size, comparison


def _seconds(function):
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


@contextlib.contextmanager
def random_states_kept(device: torch.device) -> Iterator[None]:
    """Restore the states of torch's own generators at the end."""
    modules = [torch, *([] if device.type == "cpu" else [torch.get_device_module(device)])]
    states = [module.get_rng_state() for module in modules]
    try:
        yield
    finally:
        for module, state in zip(modules, states):
            module.set_rng_state(state)
