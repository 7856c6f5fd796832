"""Compare training objectives: held-out bits/dim and samples of one network, trained on the same data for equal steps.

    python benchmarks/objectives.py digits
    python benchmarks/objectives.py mnist --only simple-fixed_large-cosine hybrid-cosine

Trains ten networks for each data set (eleven for mnist) with the preset reduced to the size for one CPU core (SMALL below), and
saves them in runs/objectives/<data>/<name>. Writes benchmarks/results/objectives_<data>.json and .md after each training. Skips
a training if the results contain it with the same settings. Other codes for comparison with bits/dim: a per-pixel histogram of
the training split, and PNG and lossless WebP of the test images.
"""

import argparse
import io
import json
import time
from pathlib import Path

import numpy as np
import torch
from digits import pixels
from PIL import Image
from sklearn.svm import SVC

from ddpm_hf import DDPMImagePipeline, bits_per_dim, estimate_bits_per_dim
from ddpm_hf.data.pixels import pixels_to_tensor, tensor_to_pixels
from ddpm_hf.data.sources import LEVELS
from ddpm_hf.evaluation.likelihood_report import histogram_bits_per_dim
from ddpm_hf.files.atomic import write_text
from ddpm_hf.training import train
from ddpm_hf.training.command_line import load_config
from ddpm_hf.training.config import as_yaml

ROOT = Path(__file__).parents[1]

SMALL = {
    "digits": ["--steps", "1500"],
    "mnist": [
        "--steps", "1200", "--batch_size", "32", "--unet.block_out_channels", "[16, 32, 64, 64]",
        "--unet.layers_per_block", "1", "--unet.norm_num_groups", "8",
        "--learning_rate", "1e-3", "--lr_schedule", "cosine", "--lr_warmup_steps", "50", "--ema_decay", "0.995",
    ],
}  # fmt: skip
SCHEDULES = {
    "linear": ["--scheduler.beta_schedule", "linear"],
    "cosine": ["--scheduler.beta_schedule", "cosine"],
    # the first step is finer than one of 256 grey levels
    "linear-from-1e-5": ["--scheduler.beta_schedule", "linear", "--scheduler.beta_start", "1e-5"],
}
OBJECTIVES = {
    "simple-fixed_large": ["--loss", "simple", "--scheduler.variance_type", "fixed_large"],
    "simple-fixed_small": ["--loss", "simple", "--scheduler.variance_type", "fixed_small"],
    "hybrid": ["--loss", "hybrid", "--scheduler.variance_type", "learned_range"],
    "vlb": ["--loss", "vlb", "--scheduler.variance_type", "learned_range"],
    "vlb-importance": [
        "--loss", "vlb", "--scheduler.variance_type", "learned_range", "--timesteps", "loss_second_moment",
    ],
}  # fmt: skip


def file_bits_per_dim(images, levels, **options):
    """Return the bits per pixel of the images, each saved to a file, minus the size of a file with one pixel."""

    def file_size(array):
        file = io.BytesIO()
        Image.fromarray(array).save(file, **options)
        return file.getbuffer().nbytes

    overhead = file_size(np.zeros((1, 1), dtype=np.uint8))
    scale = 255 // (levels - 1)
    return 8 * sum(file_size((image * scale).astype(np.uint8)) - overhead for image in images) / images.size


def begin_chain_at(scheduler, first):
    """Set the chain of all timesteps from `first` on."""
    scheduler.set_timesteps(timesteps=list(range(scheduler.config.num_train_timesteps - 1, first - 1, -1)))


def best_first_timestep(unet, scheduler, x_start, levels):
    """Return the first timestep with the smallest bound on these training images; it matters for few grey levels."""
    bounds = {}
    for first in (0, 4, 8, 12, 16, 24, 32):
        begin_chain_at(scheduler, first)
        estimate = estimate_bits_per_dim(
            unet,
            scheduler,
            x_start,
            num_evaluations=30,
            generator=torch.Generator().manual_seed(0),
            batch_size=256,
            levels=levels,
        )
        bounds[first] = estimate.mean
    return min(bounds, key=bounds.get)


def measure(folder, train_images, test_images, levels, samples, judge):
    """Return the bits/dim of a pipeline by number of steps, and the share of its samples that the judge accepts."""
    pipeline = DDPMImagePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    unet, scheduler = pipeline.unet, pipeline.scheduler
    x_start = pixels_to_tensor(torch.from_numpy(test_images)[:, None], levels)

    def bound_kwargs():
        return dict(generator=torch.Generator().manual_seed(0), batch_size=256)

    full = best = estimate_bits_per_dim(unet, scheduler, x_start, num_evaluations=100, **bound_kwargs())
    x_train = pixels_to_tensor(torch.from_numpy(train_images[:64])[:, None], levels)
    first = best_first_timestep(unet, scheduler, x_train, levels)
    if first > 0:
        begin_chain_at(scheduler, first)
        best = estimate_bits_per_dim(unet, scheduler, x_start, num_evaluations=100, **bound_kwargs())
    report = {
        "first_timestep": first,
        "bits_per_dim_from_first": best.mean,
        "kl": full.kl.mean().item(),
        "decoder": full.decoder.mean().item(),
        "standard_error": full.standard_error,
        "sampling_error": full.sampling_error,
        "bits_per_dim_1000": full.mean,
    }
    for steps in (100, 50, 25):
        scheduler.set_timesteps(steps)
        report[f"bits_per_dim_{steps}"] = bits_per_dim(unet, scheduler, x_start, **bound_kwargs()).mean
        images = pipeline(samples, torch.Generator().manual_seed(0), steps, output_type="pt").images
        report[f"samples_{steps}"] = judge(tensor_to_pixels(images * 2 - 1, levels).numpy())
    return report


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", choices=["digits", "mnist"])
    parser.add_argument("--images", type=int, default=128, help="number of test images for bits/dim")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--only", nargs="*", help="names of trainings, for example simple-fixed_large-cosine")
    parser.add_argument(
        "--set",
        nargs=2,
        action="append",
        default=[],
        metavar=("KEY", "VALUE"),
        help="set a training option for all trainings",
    )
    arguments = parser.parse_args()

    common = ["--config", arguments.data, "--sample_every", "0", *SMALL[arguments.data]]
    for key, value in arguments.set:
        common += [f"--{key}", value]
    levels = LEVELS[arguments.data]
    (train_images, labels), (test, _) = pixels("train", arguments.data), pixels("test", arguments.data)
    svm_scale = 16 / (levels - 1)  # the support vector machine of benchmarks/digits.py was chosen for 17 levels
    svm = SVC(gamma=0.001 * 64 / train_images[0].size, probability=True, random_state=0)
    svm.fit(train_images.reshape(len(train_images), -1) * svm_scale, labels)
    threshold = np.quantile(svm.predict_proba(test.reshape(len(test), -1) * svm_scale).max(1), 0.05)

    def judge(images):
        return float((svm.predict_proba(images.reshape(len(images), -1) * svm_scale).max(1) > threshold).mean())

    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    path = results / f"objectives_{arguments.data}.json"
    test_images = test[: arguments.images]
    splits = (torch.from_numpy(images)[:, None] for images in (train_images, test_images))
    other_codes = {
        "images": len(test_images),
        "per_pixel_histogram": histogram_bits_per_dim(*splits, levels).mean().item(),
        "png": file_bits_per_dim(test_images, levels, format="PNG", optimize=True),
        "webp": file_bits_per_dim(test_images, levels, format="WEBP", lossless=True, quality=100, method=6),
    }
    runs = [(objective, schedule) for schedule in ("linear", "cosine") for objective in OBJECTIVES]
    if levels == 256:
        runs.append(("vlb-importance", "linear-from-1e-5"))
    for objective, schedule in runs:
        name = f"{objective}-{schedule}"
        settings = [*common, *OBJECTIVES[objective], *SCHEDULES[schedule]]
        if arguments.only and name not in arguments.only:
            continue
        request = {"settings": settings, "images": len(test_images), "samples": arguments.samples}
        if request.items() <= read_report(path)["runs"].get(name, {}).items():
            continue
        folder = ROOT / "runs" / "objectives" / arguments.data / name
        results = request | train_if_needed(settings, folder)
        results |= measure(folder / "pipeline", train_images, test_images, levels, arguments.samples, judge)
        report = read_report(path) | other_codes  # read again: another process may add results of other trainings
        report["runs"][name] = results
        write_text(path, json.dumps(report, indent=2) + "\n")
        write_text(path.with_suffix(".md"), table(report))
        print(name, json.dumps(results), flush=True)
    print(table(read_report(path)))


def read_report(path):
    return json.loads(path.read_text()) if path.is_file() else {"runs": {}}


def train_if_needed(settings, folder):
    """Train into `folder`, unless it holds a training with the same config; return the seconds of the training."""
    config, _ = load_config([*settings, "--output_dir", str(folder)])
    seconds_file, config_file = folder / "training_seconds.json", folder / "config.yaml"
    if not (seconds_file.is_file() and config_file.read_text() == as_yaml(config)):
        seconds_file.unlink(missing_ok=True)
        start = time.perf_counter()
        train(config)
        write_text(seconds_file, json.dumps({"training_seconds": round(time.perf_counter() - start)}))
    return json.loads(seconds_file.read_text())


COLUMNS = {
    "bits/dim, 1,000 steps": lambda run: f"{run['bits_per_dim_1000']:.3f}",
    "of it L_0": lambda run: f"{run['decoder']:.3f}",
    "100 steps": lambda run: f"{run['bits_per_dim_100']:.3f}",
    "50 steps": lambda run: f"{run['bits_per_dim_50']:.3f}",
    "25 steps": lambda run: f"{run['bits_per_dim_25']:.3f}",
    "from t0": lambda run: f"{run['bits_per_dim_from_first']:.3f} ({run['first_timestep']})",
    "samples, 100": lambda run: f"{run['samples_100']:.1%}",
    "samples, 50": lambda run: f"{run['samples_50']:.1%}",
    "samples, 25": lambda run: f"{run['samples_25']:.1%}",
}


def table(report):
    lines = ["| objective and schedule | " + " | ".join(COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS)]
    for name, run in report["runs"].items():
        lines.append(f"| {name} | " + " | ".join(cell(run) for cell in COLUMNS.values()) + " |")
    other_codes = (f"{name.replace('_', ' ')} {report[name]:.3f}" for name in ("per_pixel_histogram", "png", "webp"))
    comparison = f"Bits/dim of others on the same {report['images']} test images: {', '.join(other_codes)}."
    return "\n".join([*lines, "", comparison, ""])


if __name__ == "__main__":
    main()
