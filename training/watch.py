"""What a run tells of itself: numbers, curves, sheets of samples, bits/dim of held-out images."""

import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import accelerate
import datasets
import diffusers
import numpy as np
import torch
from accelerate.tracking import get_available_trackers
from accelerate.utils import gather_object
from diffusers.utils import make_image_grid
from PIL import Image, ImageOps
from stops import going_on
from tqdm.auto import tqdm

import ddpm_hf
from config import ConfigError, nearest
from ddpm_hf import DDPMImagePipeline, VariationalDDPMScheduler, bits_per_dim, estimate_bits_per_dim
from ddpm_hf.hub import write_whole
from ddpm_hf.likelihood import standard_error

MODULES = (ddpm_hf, torch, diffusers, accelerate, datasets)


def check_trackers(names: list[str]) -> None:
    """Raises ConfigError for a tracker that accelerate does not know, or that is not installed."""
    known = [str(kind) for kind in accelerate.tracking.LOGGER_TYPE_TO_CLASS]
    there = [str(kind) for kind in get_available_trackers()]
    for name in names:
        if name not in known:
            raise ConfigError(f"trackers={names}: {name!r} is not known{nearest(name, known)}")
        if name not in there:
            raise ConfigError(f"trackers={names}: {name!r} is not installed; pip install {name}")


def environment(accelerator) -> dict:
    """Where and with what a run is computed."""
    try:
        git = ["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # there is no git
        commit = None
    cuda = accelerator.device.type == "cuda"
    return {
        "versions": {module.__name__: module.__version__ for module in MODULES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if cuda else str(accelerator.device),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "mixed_precision": accelerator.mixed_precision,
        "commit": commit or None,
    }


class Log:
    """The progress bar, metrics.jsonl, curves.png, and the trackers; the device is waited for every `log_every` steps only."""

    def __init__(self, config, output: Path, accelerator, num_timesteps: int):
        self.config, self.output, self.accelerator = config, output, accelerator
        self.main, self.num_timesteps = accelerator.is_main_process, num_timesteps
        self.images = config.batch_size * accelerator.num_processes
        self.bar = tqdm(total=config.steps, desc="train", disable=None if self.main else True, dynamic_ncols=True)
        self.rows = []
        # loss and loss by quarter of t: sums, and of how many
        self.sums, self.counts = torch.zeros(2, 5, device=accelerator.device)
        self.seen, self.start = 0, time.perf_counter()

    def state_dict(self):
        return {"sums": self.sums.cpu(), "counts": self.counts.cpu(), "rows": self.rows}

    def load_state_dict(self, state):
        self.sums, self.counts = (state[key].to(self.sums.device) for key in ("sums", "counts"))
        self.rows = state["rows"]

    def begin(self, step: int) -> None:
        """What was logged after `step` by a run that was stopped is forgotten."""
        if self.main:
            self.bar.update(step)
            write_whole(self.output / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows))

    @torch.no_grad()
    def add(self, t: torch.Tensor, losses: torch.Tensor, weights: torch.Tensor) -> None:
        """A batch: timesteps, losses, weights of the losses, each (B,). What is not finite is left out."""
        good = losses.isfinite()
        quarter = torch.where(good, 1 + t * 4 // self.num_timesteps, 0)
        finite = torch.where(good, losses.float(), 0)
        self.sums.index_add_(0, quarter, finite)
        self.sums[0] += (finite * weights).sum()
        self.counts.index_add_(0, quarter, good.float())
        self.counts[0] += good.sum()
        self.seen += self.images

    def step(self, step: int, norm: torch.Tensor, **values: float | torch.Tensor) -> bool:
        """After each optimizer step; whether it was one of those that are logged."""
        self.bar.update()
        if step % self.config.log_every and step != self.config.steps:
            return False
        sums, counts = self.accelerator.reduce(torch.stack((self.sums, self.counts)))  # of all processes
        if self.main:
            loss, *quarters = (sums / counts).tolist()
            row = {"loss": loss, **{f"loss_t_quarter_{i + 1}": value for i, value in enumerate(quarters)}}
            row |= {"gradient_norm": norm, **values}
            row["images_per_second"] = self.seen / (time.perf_counter() - self.start)
            row["memory_gb"] = memory_gb(self.accelerator.device)
            self.note(step, **row)
            shown = {"loss": f"{loss:.4f}", "images_per_s": f"{row['images_per_second']:.0f}"}
            if skipped := int(values["steps_skipped"]):
                shown["skipped"] = skipped
            self.bar.set_postfix(shown)
        self.sums.zero_()
        self.counts.zero_()
        self.seen, self.start = 0, time.perf_counter()
        return True

    def note(self, step: int, **values: float | torch.Tensor) -> None:
        """A row of metrics.jsonl and of the trackers; what is not finite is null."""
        if not self.main:
            return
        values = {key: float(value) for key, value in values.items()}
        row = {"step": step, **{key: value if math.isfinite(value) else None for key, value in values.items()}}
        self.rows.append(row)
        with going_on("metrics.jsonl"), open(self.output / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        if self.accelerator.trackers:
            self.accelerator.log({key: value for key, value in row.items() if value is not None}, step=step)

    def show(self, step: int, name: str, sheet: Image.Image) -> None:
        """A picture for the trackers that take any."""
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                how = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({name: np.asarray(sheet.convert("RGB"))[None]}, step=step, **how)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.bar.close()
        self.plot()

    def plot(self) -> None:
        """curves.png: loss, loss by quarter of t, bits/dim of held-out images."""
        if not self.main or not self.rows:
            return
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        measured = [row for row in self.rows if "bits_per_dim" in row]
        trained = [row for row in self.rows if "loss" in row]
        steps = [row["step"] for row in trained]
        figure, axes = plt.subplots(1, 3 if measured else 2, figsize=(15 if measured else 10, 4), layout="constrained")

        def curve(panel, key, **how):
            panel.plot(steps, [math.nan if row[key] is None else row[key] for row in trained], **how)

        curve(axes[0], "loss")
        axes[0].set(ylabel="training loss", yscale="log")
        for i in range(1, 5):
            curve(axes[1], f"loss_t_quarter_{i}", label=f"t in quarter {i}")
        axes[1].set(ylabel="loss, not weighted", yscale="log")
        axes[1].legend()
        if measured:
            values, errors = ([row[key] for row in measured] for key in ("bits_per_dim", "bits_per_dim_sampling_error"))
            axes[2].errorbar([row["step"] for row in measured], values, errors, capsize=2)
            axes[2].set(ylabel="bits/dim of held-out images")
        for panel in axes:
            panel.set(xlabel="optimizer step")
            panel.grid(alpha=0.3)
        temporary = self.output / ".curves.png"
        with going_on("curves.png"):
            figure.savefig(temporary, dpi=120)
            os.replace(temporary, self.output / "curves.png")
        plt.close(figure)


def memory_gb(device: torch.device) -> float:
    """The most that was held so far, of the device, or of this process for the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def samples(config, accelerator, unet, scheduler) -> list[Image.Image] | None:
    """`sample_count` samples from the same noise every time, each process's share of them computed there; None but in main."""
    process = VariationalDDPMScheduler.from_config(scheduler.config)  # sampling shall not move the training's chain
    pipeline = DDPMImagePipeline(unet, process)
    pipeline.set_progress_bar_config(desc="samples", leave=False, disable=None if accelerator.is_main_process else True)
    mine = range(accelerator.process_index, config.sample_count, accelerator.num_processes)
    labels = cycled_labels(unet, config.sample_count)
    images = []
    if mine:
        images = pipeline(
            len(mine),
            # of its own for each, so that an image does not hang on how many processes there are
            generator=[torch.Generator(unet.device).manual_seed(config.seed * config.sample_count + i) for i in mine],
            num_inference_steps=config.sample_steps,
            class_labels=None if labels is None else labels[list(mine)],
        ).images
    found = dict(gather_object(list(zip(mine, images))))
    return [found[i] for i in range(config.sample_count)] if accelerator.is_main_process else None


def held_out_bits_per_dim(config, accelerator, unet, scheduler, x_start, labels) -> dict[str, float]:
    """bits/dim of held-out images (the mean over them), with its errors: of the estimate, and over images.

    From `eval_evaluations` network calls an image, each process's share of the images computed there; all terms of a chain
    that is no longer.
    """
    process, rank = VariationalDDPMScheduler.from_config(scheduler.config), accelerator.process_index
    mine = slice(rank, None, accelerator.num_processes)
    part = x_start[mine].to(accelerator.device)
    if len(part):
        how = dict(
            class_labels=None if labels is None else labels[mine].to(accelerator.device),
            generator=torch.Generator(accelerator.device).manual_seed(config.seed + rank),
            batch_size=config.batch_size,
        )
        if config.eval_evaluations < len(process.chain):
            result = estimate_bits_per_dim(unet, process, part, num_evaluations=config.eval_evaluations, **how)
            error = result.sampling_error
        else:
            result, error = bits_per_dim(unet, process, part, **how), 0.0
        found = [(result.total.double().cpu(), error * len(part))]
    else:
        found = []
    found = gather_object(found)
    total = torch.cat([values for values, _ in found])
    return {
        "bits_per_dim": total.mean().item(),
        "bits_per_dim_sampling_error": math.hypot(*(error for _, error in found)) / len(total),
        "bits_per_dim_standard_error": standard_error(total),
    }


def cycled_labels(unet, count):
    """Labels 0, 1, 2, ... in turn for a class-conditional network; None for another."""
    classes = unet.config.num_class_embeds
    return None if classes is None else torch.arange(count) % classes


def as_sheet(images: list[Image.Image], columns: int | None = None) -> Image.Image:
    """One picture of many with grey gaps, square if columns is None; small ones enlarged so that pixels can be seen."""
    scale = max(1, 64 // max(images[0].size))
    images = [ImageOps.expand(ImageOps.scale(image, scale, Image.Resampling.NEAREST), 2, "grey") for image in images]
    columns = columns or math.ceil(len(images) ** 0.5)
    rows = math.ceil(len(images) / columns)
    images += [Image.new(images[0].mode, images[0].size)] * (rows * columns - len(images))
    return make_image_grid(images, rows, columns)


def save_picture(image: Image.Image, path) -> None:
    """As PNG, by way of a temporary name."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}")
    image.save(temporary, format="PNG")
    os.replace(temporary, path)
