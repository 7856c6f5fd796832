"""What a run tells of itself: numbers, curves, bits/dim and loss of held-out images."""

import json
import math
import platform
import subprocess
import sys
import time
from pathlib import Path

import accelerate
import datasets
import diffusers
import numpy as np
import psutil
import torch
from accelerate.tracking import get_available_trackers
from accelerate.utils import gather_object
from PIL import Image
from sheets import CHANNELS, channel_statistics, save_figure
from stops import going_on, tell
from tqdm.auto import tqdm

import ddpm_hf
from config import ConfigError, nearest
from ddpm_hf import OdeStopped, bits_per_dim, estimate_bits_per_dim, ode_bits_per_dim
from ddpm_hf.atomic import write_text
from ddpm_hf.likelihood import standard_error

try:
    import resource
except ImportError:
    resource = None

MODULES = (ddpm_hf, torch, diffusers, accelerate, datasets)
ROUNDS = 8  # timesteps for each image of `held_out_loss`


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


ODE_TOLERANCE = 1e-3  # of held-out bits/dim in continuous time


class Log:
    """The progress bar, metrics.jsonl, curves.png, and the trackers; the device is waited for every `log_every` steps only."""

    SUMS = ("sums", "counts", "colours")

    def __init__(self, config, output: Path, accelerator, end: int, also: tuple[str, ...] = ()):
        self.config, self.output, self.accelerator = config, output, accelerator
        self.main, self.end = accelerator.is_main_process, end  # T, or 1 of continuous time
        self.images = config.batch_size * accelerator.num_processes
        self.bar = tqdm(total=config.steps, desc="train", disable=None if self.main else True, dynamic_ncols=True)
        self.rows = []
        # sums of the loss, and of what else is told of each image, in all and by quarter of t, and of how many; of the images,
        # their channels and the squares of these
        self.names = ("loss", *also)
        self.sums = torch.zeros(len(self.names), 5, device=accelerator.device)
        self.counts = torch.zeros(5, device=accelerator.device)
        self.colours = torch.zeros(3, config.channels, device=accelerator.device)
        self.seen, self.start = 0, time.perf_counter()

    def state_dict(self):
        return {**{key: getattr(self, key).cpu() for key in self.SUMS}, "rows": self.rows}

    def load_state_dict(self, state):
        for key in state.keys() & set(self.SUMS):  # a run of before has no colours
            getattr(self, key).copy_(state[key])
        self.rows = state["rows"]

    def begin(self, step: int) -> None:
        """What was logged after `step` by a run that was stopped is forgotten."""
        if self.main:
            self.bar.update(step)
            write_text(self.output / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows))

    @torch.no_grad()
    def add(
        self, x_start: torch.Tensor, t: torch.Tensor, losses: torch.Tensor, weights: torch.Tensor, *also: torch.Tensor
    ) -> None:
        """A batch: images (B, C, H, W); timesteps, losses, weights of these, and what else is told, (B,).

        Losses that are not finite are left out.
        """
        good = losses.isfinite()
        quarter = torch.where(good, 1 + (t * 4 // self.end).long().clamp(max=3), 0)
        finite = torch.where(good, torch.stack([value.float() for value in (losses, *also)]), 0)
        self.sums.index_add_(1, quarter, finite)
        self.sums[:, 0] += (finite * weights).sum(1)
        self.counts.index_add_(0, quarter, good.float())
        self.counts[0] += good.sum()
        self.colours += torch.stack(
            (torch.ones_like(x_start[0, :, 0, 0]), x_start.mean((0, 2, 3)), (x_start**2).mean((0, 2, 3)))
        )
        self.seen += self.images

    def step(self, step: int, norm: torch.Tensor, **values: float | torch.Tensor) -> bool:
        """After each optimizer step; whether it was one of those that are logged."""
        self.bar.update()
        if step % self.config.log_every and step != self.config.steps:
            return False
        every = torch.cat([getattr(self, key).flatten() for key in self.SUMS])
        parts = [self.sums.numel(), 5, self.colours.numel()]
        sums, counts, colours = self.accelerator.reduce(every).split(parts)  # of all processes
        batches, mean, square = colours.view(3, -1)
        if self.main:
            row = {}
            for name, (value, *quarters) in zip(self.names, (sums.view(-1, 5) / counts).tolist()):
                row |= {name: value, **{f"{name}_t_quarter_{i + 1}": quarter for i, quarter in enumerate(quarters)}}
            row |= {"gradient_norm": norm, **values, **channel_statistics("data", mean / batches, square / batches)}
            row["images_per_second"] = self.seen / (time.perf_counter() - self.start)
            row["memory_gb"] = memory_gb(self.accelerator.device)
            self.note(step, **row)
            shown = {
                **{name: f"{row[name]:.4f}" for name in self.names},
                "images_per_s": f"{row['images_per_second']:.0f}",
            }
            if skipped := int(values["steps_skipped"]):
                shown["skipped"] = skipped
            self.bar.set_postfix(shown)
        for key in self.SUMS:
            getattr(self, key).zero_()
        self.seen, self.start = 0, time.perf_counter()
        return True

    def note(self, step: int, **values: float | torch.Tensor) -> None:
        """A row of metrics.jsonl and of the trackers; what is not finite is null."""
        if not self.main:
            return
        values = {key: float(value) for key, value in values.items()}
        row = {"step": step, **{key: value if math.isfinite(value) else None for key, value in values.items()}}
        self.rows.append(row)
        with going_on("metrics.jsonl could not be written"), open(self.output / "metrics.jsonl", "a") as file:
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
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def plot(self) -> None:
        """curves.png: loss, loss by quarter of t, and what was measured of bits/dim, held-out images, and samples."""
        if not self.main or not self.rows:
            return
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        first, quarters = "training loss", "loss by quarter of t, not weighted"
        accuracy, accuracies = "accuracy", "accuracy by quarter of t"
        bits, held_out = "bits/dim of held-out images", "loss of averaged weights"
        nearest, colours = "distance to the nearest image", "mean (line) and spread (dotted) of channels"
        channels = CHANNELS[self.config.channels]
        wanted = {
            accuracy: "accuracy",
            accuracies: "accuracy_t_quarter_1",
            bits: "bits_per_dim",
            held_out: "loss_held_out",
            nearest: "nearest_rms_samples",
        }
        wanted[colours] = f"samples_mean_{channels[0]}"
        names = [first, quarters, *(name for name, key in wanted.items() if any(key in row for row in self.rows))]
        columns = 2 if len(names) == 4 else min(3, len(names))
        lines = math.ceil(len(names) / columns)
        figure, axes = plt.subplots(lines, columns, figsize=(5.5 * columns, 4 * lines), squeeze=False)
        figure.subplots_adjust(
            left=0.21 / columns, bottom=0.12 / lines, right=0.99, top=0.98, wspace=0.25
        )  # constrained layout takes twice as long
        panels = dict(zip(names, axes.flat))
        for unused in axes.flat[len(names) :]:
            unused.remove()

        def curve(name, key, error=None, **how):
            rows = [row for row in self.rows if key in row]

            def column(key):
                return [math.nan if row.get(key) is None else row[key] for row in rows]

            panels[name].errorbar(column("step"), column(key), column(error) if error else None, **how)

        curve(first, "loss")
        for i in range(1, 5):
            curve(quarters, f"loss_t_quarter_{i}", label=f"t in quarter {i}")
            if accuracies in panels:
                curve(accuracies, f"accuracy_t_quarter_{i}", label=f"t in quarter {i}")
        if accuracy in panels:
            curve(accuracy, "accuracy", label="training images, cut at random")
            curve(accuracy, "accuracy_held_out", label="held-out images", marker="o")
        if bits in panels:
            curve(bits, "bits_per_dim", "bits_per_dim_sampling_error", capsize=2)
        if held_out in panels:
            curve(held_out, "loss_train", label="training images", marker="o")
            curve(held_out, "loss_held_out", "loss_gap_standard_error", label="held-out images", marker="o", capsize=2)
        if nearest in panels:
            curve(nearest, "nearest_rms_samples", label="of samples", marker="o")
            curve(nearest, "nearest_rms_data", label="of images, to others", marker="o")
        if colours in panels:
            for channel in channels:
                drawn = "black" if channel in ("grey", "alpha") else channel
                for what, style in (("mean", "-"), ("std", ":")):
                    curve(colours, f"samples_{what}_{channel}", color=drawn, linestyle=style, marker="o")
                    curve(colours, f"data_{what}_{channel}", color=drawn, linestyle=style, alpha=0.3)
            panels[colours].plot([], [], color="black", marker="o", label="samples")
            panels[colours].plot([], [], color="black", alpha=0.3, label="data")
        for name, panel in panels.items():
            panel.set(xlabel="optimizer step", ylabel=name, yscale="log" if name in (first, quarters) else "linear")
            panel.grid(alpha=0.3)
            if panel.get_legend_handles_labels()[0]:
                panel.legend(fontsize="small")
        with going_on("curves.png could not be written"):
            save_figure(figure, self.output / "curves.png")
        plt.close(figure)


def memory_gb(device: torch.device) -> float:
    """The most that was held so far, of the device, or of this process for the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if resource is None:  # Windows
        return psutil.Process().memory_info().peak_wset / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def held_out_bits_per_dim(config, accelerator, unet, scheduler, x_start, labels) -> dict[str, float]:
    """bits/dim of held-out images (the mean over them), with its errors: of the estimate, and over images.

    From `eval_evaluations` network calls an image, each process's share of the images computed there; all terms of a chain
    that is no longer. In continuous time by the ODE; not a number where it does not come to an end.
    """
    process, rank = type(scheduler).from_config(scheduler.config), accelerator.process_index
    mine = slice(rank, None, accelerator.num_processes)
    part = x_start[mine].to(accelerator.device)
    if len(part):
        how = dict(
            class_labels=None if labels is None else labels[mine].to(accelerator.device),
            generator=torch.Generator(accelerator.device).manual_seed(config.seed + rank),
            batch_size=config.batch_size,
        )
        if hasattr(process, "sde"):
            result, error = _by_ode(unet, process, part, how), math.nan  # of one probe nobody knows
        elif config.eval_evaluations < len(process.chain):
            estimate = estimate_bits_per_dim(unet, process, part, num_evaluations=config.eval_evaluations, **how)
            result, error = estimate.total, estimate.sampling_error
        else:
            result, error = bits_per_dim(unet, process, part, **how).total, 0.0
        found = [(result.double().cpu(), error * len(part))]
    else:
        found = []
    found = gather_object(found)
    total = torch.cat([values for values, _ in found])
    return {
        "bits_per_dim": total.mean().item(),
        "bits_per_dim_sampling_error": math.hypot(*(error for _, error in found)) / len(total),
        "bits_per_dim_standard_error": standard_error(total),
    }


def _by_ode(unet, process, x_start, how):
    """(B,) bits/dim."""
    try:
        return ode_bits_per_dim(unet, process, x_start, rtol=ODE_TOLERANCE, atol=ODE_TOLERANCE, **how).total
    except OdeStopped as error:
        tell(f"train.py: held-out bits/dim is left out: {error}")
        return torch.full((len(x_start),), math.nan)


def held_out_loss(config, accelerator, unet, objective, held_out, seen) -> dict[str, float]:
    """The training's loss of held-out images and of as many that were trained on, each with the same timesteps and noise.

    Where the first stays and the second falls, the network learns its images by heart. `held_out`, `seen`: x_start (N, C, H, W)
    and labels (N,) or None. Each image stands at `ROUNDS` timesteps; those of all are spread evenly over the chain.
    """
    count, chain, device = min(len(held_out[0]), len(seen[0])), objective.times, accelerator.device
    mine = torch.arange(accelerator.process_index, count, accelerator.num_processes)
    losses = torch.zeros(2, len(mine), device=device)
    for i, part in enumerate(mine.split(config.batch_size) if len(mine) else ()):
        rows = slice(i * config.batch_size, i * config.batch_size + len(part))
        for each in range(ROUNDS):
            places = each * count + part  # of count * ROUNDS; noise of its own for each, whichever process has it
            seeds = (config.seed * count * ROUNDS + place for place in places.tolist())
            noise = [
                torch.randn(held_out[0].shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds
            ]
            t = chain[places * len(chain) // (count * ROUNDS)]
            given = dict(t=t.to(device), noise=torch.stack(noise).to(device))
            for row, (x_start, labels) in enumerate((held_out, seen)):
                labels = None if labels is None else labels[part].to(device)
                with torch.no_grad():
                    losses[row, rows] += objective(unet, x_start[part].to(device), labels, **given)
    found = torch.cat(gather_object([losses.cpu().double() / ROUNDS]), dim=1)
    held_out, seen = found
    return {
        "loss_held_out": held_out.mean().item(),
        "loss_train": seen.mean().item(),
        "loss_gap_standard_error": standard_error(held_out - seen),
    }
