"""Measure how time and memory grow with resolution, batch size, steps of a likelihood, processes, and data set size.

    python benchmarks/growth.py [--only resolution batch steps processes images]

Each point is measured in a new process. Memory is the peak of the resident set minus the resident set after the
imports; time is the median of five calls. Writes benchmarks/results/growth.json, .md, and growth.png, with a power law
fitted to the points.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import textwrap

import accelerate
import datasets
import numpy as np
import torch
import torch.nn.functional as F
from measure import RESULTS, in_turns, machine, peak_mb, record
from networks import make_network, network_config
from PIL import Image

from ddpm_hf import DDPMUNet, VariationalDDPMScheduler, bits_per_dim
from ddpm_hf.data.dataset import collate, training_set
from ddpm_hf.data.pixels import image_to_pixels

SWEEPS = {
    "resolution": (16, 32, 64, 128),
    "batch": (1, 2, 4, 8, 16, 32, 64),
    "steps": (10, 30, 100, 300),
    "processes": (1, 2),
    "images": (250, 1000, 4000, 16000),
}
COMMENTS = {
    "resolution": "a training step of 4 images, quarter network; pixels are the side squared: convolutions alone have the "
    "exponent 2, attention at half the side adds towards 4",
    "batch": "a training step at 32x32, quarter network; below 1 where a call's fixed cost is shared",
    "steps": "bits/dim of 64 digits; a network call for each step, and the memory of one call",
    "processes": "a training step of 32 images in all on two cores, quarter network; -1 in seconds would be twice as fast, and "
    "one process has both cores already",
    "images": "from a data set of 32x32 PNGs to the first batch: all are decoded into memory, once",
}


def make_training_step(unet, x_start):
    scheduler = VariationalDDPMScheduler()
    t, noise = torch.full((len(x_start),), 500), torch.randn_like(x_start)

    def step():
        unet.zero_grad()
        F.mse_loss(unet(scheduler.q_sample(x_start, t, noise), t, return_dict=False)[0], noise).backward()

    return step


def make_resolution_call(side):
    unet = DDPMUNet(**network_config("quarter") | {"sample_size": side}).train()
    return make_training_step(unet, torch.randn(4, 3, side, side))


def make_batch_call(size):
    return make_training_step(make_network("quarter", DDPMUNet).train(), torch.randn(size, 3, 32, 32))


def make_steps_call(T):
    unet, scheduler = make_network("digits", DDPMUNet).eval(), VariationalDDPMScheduler()
    scheduler.set_timesteps(T)
    x_start = torch.randint(0, 256, (64, 1, 8, 8)) / 127.5 - 1
    return lambda: bits_per_dim(unet, scheduler, x_start, batch_size=64).mean


def make_processes_call(count):
    torch.set_num_threads(2 // count)
    unet = accelerate.Accelerator(cpu=True).prepare(make_network("quarter", DDPMUNet).train())
    return make_training_step(unet, torch.randn(32 // count, 3, 32, 32))


def make_images_call(count):
    random = np.random.default_rng(0)
    pictures = [Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(count)]
    images = datasets.Dataset.from_dict({"image": pictures}, datasets.Features(image=datasets.Image()))

    def load_first_batch():
        dataset = training_set(images, image_to_pixels((32, 32)), "image", memory=2**30)
        return next(iter(torch.utils.data.DataLoader(dataset, 64, collate_fn=collate)))

    return load_first_batch


def measure_point(sweep, value):
    """Measure seconds and memory of a point in this process."""
    initial_mb = peak_mb()
    call = globals()[f"make_{sweep}_call"](value)
    seconds = statistics.median(in_turns({"": call}, rounds=5, warmup=1)[""])
    return {"seconds": seconds, "MB": max(1.0, peak_mb() - initial_mb)}


def measure_in_new_process(sweep, value):
    """Measure a point in a new process, or in `value` processes for the sweep over processes."""
    command = [sys.executable, __file__, "--point", sweep, str(value)]
    if sweep == "processes":
        command[1:1] = ["-m", "torch.distributed.run", "--nproc_per_node", str(value)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    points = [json.loads(line) for line in lines if line.startswith("{")]
    # a step takes as long as its slowest process, and the memory of all processes
    return {"seconds": max(p["seconds"] for p in points), "MB": sum(p["MB"] for p in points)}


def fit_exponent(rows, quantity):
    """Return the slope of a line fitted to the logarithms."""
    return np.polyfit(np.log([row["value"] for row in rows]), np.log([row[quantity] for row in rows]), 1)[0].item()


def recorded_points():
    """Return the points of every sweep that was measured on this machine, now or earlier."""
    sections = json.loads((RESULTS / "growth.json").read_text())
    rows = next(section["rows"] for section in sections if section["machine"] == machine())
    points = {row["cost against"]: row["points"] for row in rows}
    return {sweep: points[sweep] for sweep in SWEEPS if sweep in points}


def plot(measured, path):
    """Plot points and fitted power laws; each axis spans at least a decade, so that slopes can be compared by eye."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(measured), figsize=(4 * len(measured), 7.5), squeeze=False)
    for column, (sweep, rows) in zip(axes.T, measured.items()):
        values = [row["value"] for row in rows]
        for axis, quantity in zip(column, ("seconds", "MB")):
            measurements, slope = [row[quantity] for row in rows], fit_exponent(rows, quantity)
            mean_value = math.prod(values) ** (1 / len(values))
            mean_measurement = math.prod(measurements) ** (1 / len(measurements))
            axis.loglog(values, measurements, "o")
            axis.loglog(values, [mean_measurement * (value / mean_value) ** slope for value in values], "--", alpha=0.6)
            half_range = max(10**0.5, (max(measurements) / min(measurements)) ** 0.5 * 1.3)
            center = (max(measurements) * min(measurements)) ** 0.5
            axis.set_ylim(center / half_range, center * half_range)
            axis.set(xlabel=sweep, ylabel=quantity, title=f"{quantity} ~ {sweep}^{slope:.2f}")
            axis.set_xticks(values, [str(value) for value in values])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        column[-1].set_xlabel(sweep + "\n\n" + "\n".join(textwrap.wrap(COMMENTS[sweep], 46)), fontsize=9)
    figure.tight_layout()
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=90, format="png")
    temporary.replace(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=list(SWEEPS), choices=list(SWEEPS))
    parser.add_argument("--point", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.point:
        sweep, value = arguments.point
        print(json.dumps(measure_point(sweep, int(value))), flush=True)
        return
    for sweep in arguments.only:
        points = []
        for value in SWEEPS[sweep]:
            points.append({"value": value, **measure_in_new_process(sweep, value)})
            print(sweep, points[-1], flush=True)
        row = {
            "cost against": sweep,
            "exponent of seconds": fit_exponent(points, "seconds"),
            "exponent of MB": fit_exponent(points, "MB"),
            "": COMMENTS[sweep],
            "points": points,
        }
        record("growth", "How cost grows", row, keys=("cost against",), hidden=("points",))
    plot(recorded_points(), RESULTS / "growth.png")
    print(f"look at {RESULTS / 'growth.png'}")


if __name__ == "__main__":
    main()
