"""Images by the thousand: one for each seed, on any number of processes.

    from ddpm_hf.evaluation.generation import generate
    from ddpm_hf.evaluation.samples import open_pipeline

    generate(open_pipeline("runs/digits/pipeline"), range(50_000), "samples/", num_inference_steps=100)

The same call again draws only what is missing.
"""

import hashlib
import itertools
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from tqdm import tqdm

from ddpm_hf.evaluation.processes import Processes
from ddpm_hf.evaluation.sample_files import PACKED, SampleFolder
from ddpm_hf.evaluation.samples import number_of_classes
from ddpm_hf.evaluation.seeds import labels_of_seeds
from ddpm_hf.pipelines import CascadePipeline
from ddpm_hf.pipelines.chain import default_steps

COMPILED_BATCH = 64  # every other size would be compiled again
WORTHWHILE = 1.05  # a batch twice as large must be faster by this factor


class Generator:
    """Draws the image of a seed, which depends on nothing but the seed.

    On a CPU the images are the same to the last bit whatever the batch size and the number of processes. Kernels of
    accelerators round differently in batches of another size: there a few pixels change by a few of the 255 levels.

    Args:
        pipeline: a `DDPMImagePipeline`, `DDPMSuperResolutionPipeline` or `CascadePipeline`.
        class_labels: the rule of `labels_of_seeds`; for pipelines without classes it does nothing.
        low_resolution: for upsamplers, images (N, C, h, w) in [-1, 1]; seed s enlarges image s modulo N.
        low_resolution_labels: their labels (N,), which "balanced" stands for then; None if they are unknown.
        sampling: num_inference_steps, eta, guidance_scale, classifier_scale, noise_level, as in the pipeline's call.

    Raises:
        ValueError: a scheduler whose noise does not come from generators.
    """

    def __init__(
        self,
        pipeline,
        class_labels: str | int = "balanced",
        low_resolution: torch.Tensor | None = None,
        low_resolution_labels: torch.Tensor | None = None,
        **sampling,
    ):
        self.pipeline, self.class_labels = pipeline, class_labels
        self.low_resolution, self.low_resolution_labels = low_resolution, low_resolution_labels
        self.sampling = {name: value for name, value in sampling.items() if value is not None}
        self.num_classes = number_of_classes(pipeline, self.sampling)
        for stage in stages_of(pipeline):
            if hasattr(stage.scheduler, "noise_sampler"):
                name = type(stage.scheduler).__name__
                raise ValueError(f"{name} draws its own noise, which no seed determines; use another scheduler")

    def record(self, name: str) -> dict:
        """What determines the images beside their seeds, for `SampleFolder`; `name` is the pipeline's."""
        stages = stages_of(self.pipeline)
        return {
            "pipeline": name,
            "weights": weights_fingerprint(stages),
            "dtype": str(stages[0].unet.dtype).removeprefix("torch."),
            "optimized": any(stage.is_optimized for stage in stages),
            "schedulers": [scheduler_settings(stage.scheduler) for stage in stages],
            "steps": self.sampling.get("num_inference_steps") or default_steps(stages[0].scheduler),
            **{name: value for name, value in self.sampling.items() if name != "num_inference_steps"},
            **({"class_labels": self.class_labels} if self.num_classes else {}),
            **({"low_resolution": _digest_of(self.low_resolution)} if self.low_resolution is not None else {}),
        }

    def labels(self, seeds: Sequence[int]) -> list[int] | None:
        """The class label of each seed; None without classes."""
        if not self.num_classes:
            return None
        if self.low_resolution_labels is not None and self.class_labels == "balanced":
            return [int(self.low_resolution_labels[seed % len(self.low_resolution_labels)]) for seed in seeds]
        return labels_of_seeds(self.class_labels, seeds, self.num_classes)

    def draw(self, seeds: Sequence[int], **kwargs) -> list:
        """The images of the seeds, in one batch: PIL images of 8 bits. `kwargs` are further arguments of the pipeline."""
        arguments = {**self.sampling, **kwargs, "generator": [torch.Generator().manual_seed(seed) for seed in seeds]}
        if self.num_classes:
            arguments["class_labels"] = self.labels(seeds)
        if isinstance(self.pipeline, CascadePipeline):
            shared = ("eta", "callback_on_step_end")
            arguments["upsampler_kwargs"] = {name: arguments[name] for name in shared if name in arguments}
            arguments["upsampler_steps"] = arguments.get("num_inference_steps")
        if self.low_resolution is not None:
            rows = [seed % len(self.low_resolution) for seed in seeds]
            return self.pipeline(self.low_resolution[rows], **arguments).images
        return self.pipeline(len(seeds), **arguments).images

    def draw_pixels(self, seeds: Sequence[int], **kwargs) -> torch.Tensor:
        """The images of `draw` as uint8 (B, C, H, W), on the pipeline's device."""
        images: Any = self.draw(seeds, output_type="pt", **kwargs)
        return (images * 255).round().to(torch.uint8)

    def try_batch(self, size: int) -> None:
        """Take the first step of a batch, and no more."""

        def interrupt(pipeline, *_):
            pipeline._interrupt = True
            return {}

        self.draw(range(size), callback_on_step_end=interrupt)


def generate(
    pipeline,
    seeds: Sequence[int],
    out: str | Path,
    *,
    batch_size: int | None = None,
    name: str = "",
    processes: Processes | None = None,
    **kwargs,
) -> Path:
    """Draw an image for each seed and write all of them; images that are already there are not drawn again.

    Args:
        pipeline, kwargs: as `Generator`.
        seeds: integers, 0 or more, each once.
        out: a folder of PNG files, or an .npz or .parquet file, see `SampleFolder`. While a file is made, its images are in
            a folder beside it, which a killed run leaves for the next one.
        batch_size: images drawn at once by each process; None for the size with the most images per second, see
            `find_batch_size`. It is halved where the memory is too small.
        name: what the record calls the pipeline.
        processes: among which the seeds are shared out; None for those of the launcher.

    Returns:
        `out`.

    Raises:
        ValueError: an invalid argument, or a folder with samples that were drawn with other settings.
        OSError: the disk is full or not writable; complete images stay.
    """
    out, processes = Path(out), processes or Processes.launched()
    generator = Generator(pipeline, **kwargs)
    folder = SampleFolder(check_out(out), generator.record(name))
    folder.check()
    processes.wait()
    if processes.is_main:
        folder.begin()
    processes.wait()
    missing = folder.missing(seeds)
    processes.wait()  # every process has the same list
    try:
        _draw_missing(generator, folder, missing, len(seeds), batch_size, processes)
        processes.wait()
        if processes.is_main:
            _finish(generator, folder, seeds, out)
    except OSError as error:
        raise OSError(f"{out}: {error}; complete images stay, and the same command goes on from them") from None
    processes.wait()
    return out


def check_out(out: Path) -> Path:
    """The folder of images for an output: itself, or that of a file's parts.

    Raises:
        ValueError: the file exists.
    """
    if out.suffix not in PACKED:
        return out
    if out.exists():
        raise ValueError(f"{out} exists; move it away, or give another name")
    return out.with_name(f"{out.name}.parts")


def _draw_missing(generator, folder, missing, total, batch_size, processes):
    """Draw this process's share of the missing seeds."""
    if not missing:
        return
    mine = missing[processes.rank :: processes.world_size]
    _set_bars(generator, disable=True)
    if batch_size is None:
        batch_size = _choose_batch_size(generator, max(len(mine), 1), processes)
    # where kernels round by the batch's size, or are compiled for it, the last batch has the size of the others
    is_filled = generator.pipeline.device.type != "cpu" or _is_optimized(generator)
    _set_bars(generator, disable=None if processes.is_main else True, leave=False, position=1)
    bar = tqdm(total=total, initial=total - len(missing), unit="image", disable=None if processes.is_main else True)
    with bar, ThreadPoolExecutor() as writers:
        while mine:
            try:
                batch = mine[:batch_size]
                fill = range(batch_size - len(batch)) if is_filled else ()
                images = generator.draw([*batch, *fill])
            except RuntimeError as error:
                if batch_size == 1 or not should_reduce_batch_size(error):
                    raise
                batch_size //= 2
                clear_device_cache(garbage_collection=True)
                print(f"the memory is too small; batch_size={batch_size} from here on", file=sys.stderr)
                continue
            list(writers.map(folder.write, batch, images))
            mine = mine[batch_size:]
            bar.update(min(len(batch) * processes.world_size, total - bar.n))  # the others are about as fast


def _is_optimized(generator):
    return any(stage.is_optimized for stage in stages_of(generator.pipeline))


def _set_bars(generator, **config):
    for stage in stages_of(generator.pipeline):
        stage.set_progress_bar_config(**config)


def _finish(generator, folder, seeds, out):
    of_folder = folder.finished() if out == folder.folder else seeds
    labels = generator.labels(of_folder)
    labels = None if labels is None else dict(zip(of_folder, labels))
    names = generator.pipeline.class_names
    if out == folder.folder:
        folder.finish(labels, names)
    else:
        folder.pack(out, list(seeds), labels, names)
        shutil.rmtree(folder.folder, ignore_errors=True)


def _choose_batch_size(generator, most, processes):
    if _is_optimized(generator):
        return min(COMPILED_BATCH, most)
    size, reason = find_batch_size(generator.try_batch, most)
    size = int(processes.gather(torch.tensor([size])).min())
    if processes.is_main:
        print(f"batch_size={size}: {reason}")
    return size


def find_batch_size(attempt: Callable[[int], None], most: int) -> tuple[int, str]:
    """Double the batch, from 1, while it fits into memory and is faster per image.

    Args:
        attempt: draws a part of a batch of the given size, and waits for it.
        most: no batch is larger.

    Returns:
        The smallest size that is about as fast per image as any, and in words why it is not larger.

    Raises:
        RuntimeError: one image does not fit.
    """
    attempt(1)  # the first call also loads kernels
    rates: dict[int, float] = {}
    reason = "the fastest"
    for size in [*itertools.takewhile(lambda size: size < most, (2**power for power in itertools.count())), most]:
        try:
            rates[size] = size / _seconds(attempt, size)
        except RuntimeError as error:
            if not rates or not should_reduce_batch_size(error):
                raise
            clear_device_cache(garbage_collection=True)
            reason = f"{size} do not fit into memory"
            break
        if max(rates.values()) > WORTHWHILE * max([*rates.values()][-2:]):  # twice in a row slower than before
            break
    return next(size for size, rate in rates.items() if rate * WORTHWHILE >= max(rates.values())), reason


def _seconds(attempt, size):
    """The shortest of three attempts, or of one that takes long: other work on the machine slows some of them."""
    times: list[float] = []
    while len(times) < 3 and sum(times) < 0.2:
        began = time.perf_counter()
        attempt(size)
        times.append(time.perf_counter() - began)
    return min(times)


def stages_of(pipeline) -> list:
    """The pipelines of one network each that a pipeline consists of."""
    return [pipeline.base, pipeline.upsampler] if isinstance(pipeline, CascadePipeline) else [pipeline]


def scheduler_settings(scheduler) -> dict:
    """Class and config of a scheduler, as its file in a saved pipeline has them, without the version of diffusers."""
    config = json.loads(scheduler.to_json_string())
    return {key: value for key, value in config.items() if key != "_diffusers_version"}


def weights_fingerprint(stages) -> str:
    """SHA-256 of the tensors of all networks, shortened to 16 digits."""
    digest = hashlib.sha256()
    for stage in stages:
        for network in (stage.unet, getattr(stage, "classifier", None)):
            for name, tensor in sorted(network.state_dict().items()) if network is not None else ():
                digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                digest.update(_bytes_of(tensor))
    return digest.hexdigest()[:16]


def _digest_of(tensor):
    return hashlib.sha256(_bytes_of(tensor)).hexdigest()[:16]


def _bytes_of(tensor: torch.Tensor) -> Any:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
