"""The log of a run: progress, metrics.jsonl, and the points of its curves."""

import contextlib
import itertools
import json
import math
import os
import time
from pathlib import Path

import torch
from PIL import Image
from tqdm.auto import tqdm

from ddpm_hf.evaluation.sheets import CHANNELS, channel_statistics
from ddpm_hf.files.atomic import write_bytes
from ddpm_hf.training.environment import memory_gb
from ddpm_hf.training.messages import print_above_progress_bar, warn_on_write_error
from ddpm_hf.training.plots import plot_curves
from ddpm_hf.training.trackers import log_picture


class Curves:
    """Rows of metrics.jsonl, averaged for a plot to fewer than 2 * `POINTS` points of each kind (rows with the same keys).

    A point is the mean of `every` rows, at the step of the last one. Pairs of points are merged when there are too many.
    """

    POINTS = 500

    def __init__(self):
        self.kinds = []  # {"every": ..., "points": [row, ...], "rest": [row, ...]}

    def add(self, row: dict) -> None:
        kind = next((kind for kind in self.kinds if (kind["rest"] or kind["points"])[0].keys() == row.keys()), None)
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
        """All points in the order of their steps."""
        points = [[*kind["points"], *([_mean_row(kind["rest"])] if kind["rest"] else [])] for kind in self.kinds]
        return sorted(itertools.chain(*points), key=lambda row: row["step"])


def _mean_row(rows):
    """The means of the values that are not None, at the last step."""
    if len(rows) == 1:
        return rows[0]
    values = {key: [row[key] for row in rows if row[key] is not None] for key in rows[0]}
    means = {key: sum(of_key) / len(of_key) if of_key else None for key, of_key in values.items()}
    return {**means, "step": rows[-1]["step"]}


class Log:
    """Progress, metrics.jsonl, curves.png and the trackers; it waits for the device only every `log_every` steps.

    Progress is a bar in a terminal, lines elsewhere. A checkpoint holds the points of the curves, but of metrics.jsonl only the
    number of its rows; rows that could not be written are kept until they can be.

    Args:
        output: the run's folder.
        t_end: upper bound of t; losses are also logged for each quarter of [0, t_end].
        columns: names of the values that are logged per image beside the loss.
    """

    SUMS = {"sums": "sums", "counts": "counts", "colors": "colours"}  # attribute -> its key in a checkpoint

    def __init__(self, config, output, accelerator, t_end: float, columns: tuple[str, ...] = ()):
        self.config, self.output, self.accelerator = config, output, accelerator
        self.path = output.path / "metrics.jsonl"
        self.main, self.t_end = accelerator.is_main_process, t_end
        self.images = config.batch_size * accelerator.num_processes
        self.bar = tqdm(total=config.steps, desc="train", disable=None if self.main else True, dynamic_ncols=True)
        self.curves, self.logged = Curves(), 0
        self.reported: set[str] = set()
        self.unwritten: list[str] = []
        self.length = 0  # bytes of whole lines in metrics.jsonl, lines not written yet
        # sums of each column over all images and by quarter of t, and the numbers of these images; the number of batches, and
        # sums over them of each channel's mean and mean square
        self.names = ("loss", *columns)
        self.sums = torch.zeros(len(self.names), 5, device=accelerator.device)
        self.counts = torch.zeros(5, device=accelerator.device)
        self.colors = torch.zeros(3, config.channels, device=accelerator.device)
        self.images_since_row = 0
        self.start = self.began = time.perf_counter()
        self.first = 0  # step of this process

    def state_dict(self):
        if self.main:
            self._write()
            with contextlib.suppress(OSError), open(self.path, "rb") as file:
                os.fsync(file.fileno())
        sums = {key: getattr(self, name).cpu() for name, key in self.SUMS.items()}
        return {**sums, "curves": self.curves.kinds, "logged": self.logged, "unwritten": self.unwritten}

    def load_state_dict(self, state):
        for name, key in self.SUMS.items():
            getattr(self, name).copy_(state[key])
        self.curves.kinds, self.logged, self.unwritten = state["curves"], state["logged"], state["unwritten"]

    def begin(self, step: int, resumed: Path | None = None, complete: bool = False) -> None:
        """Call before the first step: keep only the rows of metrics.jsonl up to `step`.

        Args:
            resumed: the checkpoint from which the run resumes, if any.
            complete: nothing is left to do after it.
        """
        if not self.main:
            return
        self.bar.update(step)
        self.first, self.began = step, time.perf_counter()
        before = resumed.absolute().parents[1] / self.path.name if resumed else self.path
        lines = _rows_until(step, before) if resumed else []
        lines += [line for line in self.unwritten if line not in lines]
        if len(lines) < self.logged:
            print_above_progress_bar(
                f"{before} holds {len(lines)} of the {self.logged} rows that were logged up to step {step}; it is written "
                f"again from the checkpoint, which has means of rows where there were {2 * Curves.POINTS:,} or more of a kind"
            )
            lines = [_line(row) for row in self.curves.rows()]
        self.logged = len(lines)
        self._replace(lines)
        if resumed and not complete:
            print_above_progress_bar(f"resumed from step {step:,} ({resumed})")

    def _replace(self, lines):
        """Write metrics.jsonl with these lines."""
        content = "".join(lines).encode()
        self.unwritten, self.length = list(lines), 0
        with warn_on_write_error("metrics.jsonl could not be written"):
            write_bytes(self.path, content)
            self.unwritten, self.length = [], len(content)

    def _write(self):
        """Append new lines to metrics.jsonl, after the last whole one: a full disk may have cut off a line."""
        if not self.unwritten:
            return
        with warn_on_write_error("metrics.jsonl could not be written", self.reported):
            with open(self.path, "ab") as file:
                self.length = min(self.length, file.tell())
                file.truncate(self.length)
                file.write("".join(self.unwritten).encode())
            self.length += sum(map(len, self.unwritten))  # JSON is ASCII
            self.unwritten = []

    def keep_folder(self) -> None:
        """Call before files are written to the run's folder: create it again if it was removed."""
        if not self.main:
            return
        with warn_on_write_error(
            f"{self.output.path} was removed or moved, and cannot be created again", self.reported
        ):
            if not self.output.keep():
                self._replace([_line(row) for row in self.curves.rows()])

    def begin_work(self, step: int, work: str) -> None:
        """Say what is done until the next call of `note`: before the progress bar, or without one in a line."""
        self.bar.set_description(work)
        if self.main and self.bar.disable:
            print_above_progress_bar(f"step {step:,}: {work}")

    @torch.no_grad()
    def add(
        self,
        x_start: torch.Tensor,
        t: torch.Tensor,
        losses: torch.Tensor,
        weights: torch.Tensor,
        *columns: torch.Tensor,
    ) -> None:
        """Add a batch: images (B, C, H, W); timesteps, losses, their weights and the other columns, each (B,).

        Images whose loss is not finite are left out.
        """
        is_finite = losses.isfinite()
        quarter = torch.where(is_finite, 1 + (t * 4 // self.t_end).long().clamp(max=3), 0)
        finite = torch.where(is_finite, torch.stack([value.float() for value in (losses, *columns)]), 0)
        self.sums.index_add_(1, quarter, finite)
        self.sums[:, 0] += (finite * weights).sum(1)
        self.counts.index_add_(0, quarter, is_finite.float())
        self.counts[0] += is_finite.sum()
        self.colors += torch.stack(
            (torch.ones_like(x_start[0, :, 0, 0]), x_start.mean((0, 2, 3)), (x_start**2).mean((0, 2, 3)))
        )
        self.images_since_row += self.images

    def step(self, step: int, norm: torch.Tensor, **values: float | torch.Tensor) -> bool:
        """Count an optimizer step; return whether a row was logged."""
        self.bar.update()
        if step % self.config.log_every and step != self.config.steps:
            return False
        sums_and_counts = torch.cat([getattr(self, name).flatten() for name in self.SUMS])
        sizes = [self.sums.numel(), 5, self.colors.numel()]
        sums, counts, colors = self.accelerator.reduce(sums_and_counts).split(sizes)  # over all processes
        batches, mean, square = colors.view(3, -1)
        if self.main:
            row: dict = {}
            for name, (value, *quarters) in zip(self.names, (sums.view(-1, 5) / counts).tolist()):
                row |= {name: value, **{f"{name}_t_quarter_{i + 1}": quarter for i, quarter in enumerate(quarters)}}
            row |= {"gradient_norm": norm, **values, **channel_statistics("data", mean / batches, square / batches)}
            row["images_per_second"] = self.images_since_row / (time.perf_counter() - self.start)
            row["memory_gb"] = memory_gb(self.accelerator.device)
            self.note(step, **row)
            shown = {name: f"{row[name]:.4f}" for name in self.names}
            if skipped := int(values["steps_skipped"]):
                shown["skipped"] = str(skipped)
            self._show(step, shown, f"{row['images_per_second']:.0f}")
        for name in self.SUMS:
            getattr(self, name).zero_()
        self.images_since_row, self.start = 0, time.perf_counter()
        return True

    def _show(self, step, shown, images_per_second):
        """Show values in the progress bar, or in a line with the estimated remaining time."""
        self.bar.set_postfix(shown | {"images_per_s": images_per_second})
        remaining = (time.perf_counter() - self.began) / (step - self.first) * (self.config.steps - step)
        values = ", ".join(f"{name} {value}" for name, value in shown.items())
        remaining = tqdm.format_interval(remaining)
        if self.bar.disable:
            print_above_progress_bar(
                f"step {step:,}/{self.config.steps:,}: {values}, {images_per_second} images/s, {remaining} left"
            )

    def note(self, step: int, **values: float | torch.Tensor) -> None:
        """Add a row to metrics.jsonl and the trackers; values that are not finite are null."""
        if not self.main:
            return
        self.bar.set_description("train", refresh=False)
        values = {key: float(value) for key, value in values.items()}
        row = {"step": step, **{key: value if math.isfinite(value) else None for key, value in values.items()}}
        self.keep_folder()
        self.curves.add(row)
        self.logged += 1
        self.unwritten.append(_line(row))
        self._write()
        if self.accelerator.trackers:
            self.accelerator.log({key: value for key, value in row.items() if value is not None}, step=step)

    def show(self, step: int, name: str, picture: Image.Image) -> None:
        """Log a picture to the trackers that take pictures."""
        log_picture(self.accelerator, step, name, picture)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.bar.close()
        self.plot()
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def plot(self) -> None:
        """Write curves.png; a file that cannot be written is only reported."""
        if self.main and self.curves.kinds:
            with warn_on_write_error("curves.png could not be written"):
                plot_curves(self.curves.rows(), CHANNELS[self.config.channels], self.output.path / "curves.png")


def _line(row):
    """A row as a line of metrics.jsonl."""
    return json.dumps(row) + "\n"


def _rows_until(step, path):
    """Return the lines of a metrics.jsonl up to this step, or up to the first invalid line."""
    lines = []
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError), open(path, encoding="ascii") as file:
        for line in file:
            if not line.endswith("\n") or json.loads(line)["step"] > step:
                break
            lines.append(line)
    return lines
