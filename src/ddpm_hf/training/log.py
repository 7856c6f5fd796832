"""A run's log and curves, and its measurements of held-out images: bits/dim and loss."""

import contextlib
import itertools
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ddpm_hf.evaluation.sheets import CHANNELS, channel_statistics, save_figure
from ddpm_hf.files.atomic import write_bytes
from ddpm_hf.training.environment import memory_gb
from ddpm_hf.training.interrupts import going_on, tell


class Curves:
    """Rows of metrics.jsonl for a plot, of each kind (with the same keys) fewer than 2 * `POINTS`, however long the run.

    A point is the mean of `every` rows, at the step of the last. When there are too many, two become one.
    """

    POINTS = 500

    def __init__(self):
        self.kinds = []  # {"every": ..., "points": [row, ...], "rest": [row, ...]}

    def add(self, row: dict) -> None:
        kind = next((each for each in self.kinds if (each["rest"] or each["points"])[0].keys() == row.keys()), None)
        if kind is None:
            kind = {"every": 1, "points": [], "rest": []}
            self.kinds.append(kind)
        kind["rest"].append(row)
        if len(kind["rest"]) == kind["every"]:
            kind["points"].append(_mean_row(kind["rest"]))
            kind["rest"] = []
        if len(kind["points"]) == 2 * self.POINTS:
            kind["points"] = [_mean_row(pair) for pair in zip(kind["points"][::2], kind["points"][1::2])]
            kind["every"] *= 2

    def rows(self) -> list[dict]:
        """All points, by step."""
        points = [[*kind["points"], *([_mean_row(kind["rest"])] if kind["rest"] else [])] for kind in self.kinds]
        return sorted(itertools.chain(*points), key=lambda row: row["step"])


def _mean_row(rows):
    """The means of what is not None; the last step."""
    if len(rows) == 1:
        return rows[0]
    values = {key: [row[key] for row in rows if row[key] is not None] for key in rows[0]}
    means = {key: sum(of_key) / len(of_key) if of_key else None for key, of_key in values.items()}
    return {**means, "step": rows[-1]["step"]}


class Log:
    """Progress, metrics.jsonl, curves.png, and the trackers; the device is waited for every `log_every` steps only.

    Progress is a bar in a terminal, lines elsewhere. A checkpoint holds the curves' points, but of metrics.jsonl only how many
    rows it had; what could not be written to it is kept until it can be. `output` is the run's `OutputFolder`.
    """

    SUMS = ("sums", "counts", "colours")

    def __init__(self, config, output, accelerator, end: int, also: tuple[str, ...] = ()):
        self.config, self.output, self.accelerator = config, output, accelerator
        self.path = output.path / "metrics.jsonl"
        self.main, self.end = accelerator.is_main_process, end  # T, or 1 of continuous time
        self.images = config.batch_size * accelerator.num_processes
        self.bar = tqdm(total=config.steps, desc="train", disable=None if self.main else True, dynamic_ncols=True)
        self.curves, self.logged, self.said = Curves(), 0, set()
        self.length, self.unwritten = 0, []  # bytes of metrics.jsonl that are whole, lines that are not in it yet
        # sums of the loss, and of what else is told of each image, in all and by quarter of t, and of how many; of the images,
        # their channels and the squares of these
        self.names = ("loss", *also)
        self.sums = torch.zeros(len(self.names), 5, device=accelerator.device)
        self.counts = torch.zeros(5, device=accelerator.device)
        self.colours = torch.zeros(3, config.channels, device=accelerator.device)
        self.seen = 0
        self.start = self.began = time.perf_counter()
        self.first = 0  # step of this process

    def state_dict(self):
        if self.main:
            self._write()
            with contextlib.suppress(OSError), open(self.path, "rb") as file:
                os.fsync(file.fileno())
        sums = {key: getattr(self, key).cpu() for key in self.SUMS}
        return {**sums, "curves": self.curves.kinds, "logged": self.logged, "unwritten": self.unwritten}

    def load_state_dict(self, state):
        for key in self.SUMS:
            getattr(self, key).copy_(state[key])
        self.curves.kinds, self.logged, self.unwritten = state["curves"], state["logged"], state["unwritten"]

    def begin(self, step: int, resumed: Path | None = None) -> None:
        """To be called before the first step: metrics.jsonl then holds what was logged up to `step`, and no more.

        resumed: the checkpoint from which the run resumes, if any.
        """
        if not self.main:
            return
        self.bar.update(step)
        self.first, self.began = step, time.perf_counter()
        before = resumed.absolute().parents[1] / self.path.name if resumed else self.path
        lines = _rows_until(step, before) if resumed else []
        lines += [line for line in self.unwritten if line not in lines]
        if len(lines) < self.logged:
            tell(
                f"{before} holds {len(lines)} of the {self.logged} rows that were logged up to step {step}; it is written anew "
                f"from the checkpoint, which has means of rows where there were {2 * Curves.POINTS:,} or more of a kind"
            )
            lines = [_line(row) for row in self.curves.rows()]
        self.logged = len(lines)
        self._replace(lines)
        if resumed:
            tell(f"resumed from step {step:,} ({resumed})")

    def _replace(self, lines):
        """metrics.jsonl as these lines."""
        content = "".join(lines).encode()
        self.unwritten, self.length = list(lines), 0
        with going_on("metrics.jsonl could not be written"):
            write_bytes(self.path, content)
            self.unwritten, self.length = [], len(content)

    def _write(self):
        """Appends to metrics.jsonl what is not in it yet, after what is whole: a full disk may have torn a line."""
        if not self.unwritten:
            return
        with going_on("metrics.jsonl could not be written", self.said):
            with open(self.path, "ab") as file:
                self.length = min(self.length, file.tell())
                file.truncate(self.length)
                file.write("".join(self.unwritten).encode())
            self.length += sum(map(len, self.unwritten))  # JSON is ASCII
            self.unwritten = []

    def keep_folder(self) -> None:
        """To be called before files are written to the run's folder: makes it anew where somebody has removed it."""
        if not self.main:
            return
        with going_on(f"{self.output.path} was removed or moved, and cannot be made anew", self.said):
            if not self.output.keep():
                self._replace([_line(row) for row in self.curves.rows()])

    def say(self, message: str) -> None:
        """Prints a line where there is no bar."""
        if self.main and self.bar.disable:
            tell(message)

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
            shown = {name: f"{row[name]:.4f}" for name in self.names}
            if skipped := int(values["steps_skipped"]):
                shown["skipped"] = skipped
            self._show(step, shown, f"{row['images_per_second']:.0f}")
        for key in self.SUMS:
            getattr(self, key).zero_()
        self.seen, self.start = 0, time.perf_counter()
        return True

    def _show(self, step, shown, images_per_second):
        """In the bar, or as a line with the time that is left at the mean speed so far."""
        self.bar.set_postfix(shown | {"images_per_s": images_per_second})
        left = (time.perf_counter() - self.began) / (step - self.first) * (self.config.steps - step)
        values = ", ".join(f"{name} {value}" for name, value in shown.items())
        left = tqdm.format_interval(left)
        self.say(f"step {step:,}/{self.config.steps:,}: {values}, {images_per_second} images/s, {left} left")

    def note(self, step: int, **values: float | torch.Tensor) -> None:
        """A row of metrics.jsonl and of the trackers; what is not finite is null."""
        if not self.main:
            return
        values = {key: float(value) for key, value in values.items()}
        row = {"step": step, **{key: value if math.isfinite(value) else None for key, value in values.items()}}
        self.keep_folder()
        self.curves.add(row)
        self.logged += 1
        self.unwritten.append(_line(row))
        self._write()
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
        if not self.main or not self.curves.kinds:
            return
        all_rows = self.curves.rows()
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
        names = [first, quarters, *(name for name, key in wanted.items() if any(key in row for row in all_rows))]
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
            rows = [row for row in all_rows if key in row]

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
                panel.legend(fontsize="small", loc="upper right")  # to look for the best place takes seconds
        with going_on("curves.png could not be written"):
            save_figure(figure, self.output.path / "curves.png")
        plt.close(figure)


def _line(row):
    """Of metrics.jsonl."""
    return json.dumps(row) + "\n"


def _rows_until(step, path):
    """The lines of a metrics.jsonl up to this step; up to one that is no row, torn for example."""
    lines = []
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError), open(path, encoding="ascii") as file:
        for line in file:
            if not line.endswith("\n") or json.loads(line)["step"] > step:
                break
            lines.append(line)
    return lines
