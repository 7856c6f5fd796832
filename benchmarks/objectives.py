"""What each objective buys: the same network, data and steps under each, its held-out bits/dim and its samples.

    python benchmarks/objectives.py digits            # ten trainings of the digits preset
    python benchmarks/objectives.py mnist --steps 1500 --width 16 --only simple-fixed_large-cosine hybrid-cosine

Writes benchmarks/results/objectives_<data>.json and .md after every training, and leaves out what stands there already for the
same settings. Beside bits/dim stand a per-pixel histogram of the training split, and PNG and lossless WebP of the test images.
"""

import argparse
import io
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "training"))

from digits import pixels  # noqa: E402
from sklearn.svm import SVC  # noqa: E402

from config import load_config  # noqa: E402
from ddpm_hf import DDPMImagePipeline, bits_per_dim, estimate_bits_per_dim  # noqa: E402
from ddpm_hf.data import pixels_to_tensor, tensor_to_pixels  # noqa: E402
from evaluate import histogram_bits_per_dim  # noqa: E402
from train import train  # noqa: E402

SCHEDULES = ("linear", "cosine")
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
    """Bits per pixel of the images as files, one each, without what an empty file of the format needs."""

    def size(array):
        file = io.BytesIO()
        Image.fromarray(array).save(file, **options)
        return file.getbuffer().nbytes

    empty = size(np.zeros((1, 1), dtype=np.uint8))
    scale = 255 // (levels - 1)
    return 8 * sum(size((image * scale).astype(np.uint8)) - empty for image in images) / images.size


def begin_chain_at(scheduler, first):
    scheduler.set_timesteps(timesteps=list(range(scheduler.config.num_train_timesteps - 1, first - 1, -1)))


def best_first_timestep(unet, scheduler, x_start, levels):
    """Where a chain should begin on data of few grey levels, by its bound on the given (training) images."""
    found = {}
    for first in (0, 4, 8, 12, 16, 24, 32):
        begin_chain_at(scheduler, first)
        how = dict(num_evaluations=30, generator=torch.Generator().manual_seed(0), batch_size=256, levels=levels)
        found[first] = estimate_bits_per_dim(unet, scheduler, x_start, **how).mean
    return min(found, key=found.get)


def measure(folder, train_images, test, levels, images, samples, judge):
    pipeline = DDPMImagePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    unet, scheduler = pipeline.unet, pipeline.scheduler
    x_start = pixels_to_tensor(torch.from_numpy(test[:images])[:, None], levels)
    report = {}
    some = pixels_to_tensor(torch.from_numpy(train_images[:128])[:, None], levels)
    first = best_first_timestep(unet, scheduler, some, levels)
    begin_chain_at(scheduler, first)
    how = dict(generator=torch.Generator().manual_seed(0), batch_size=256)
    best = estimate_bits_per_dim(unet, scheduler, x_start, num_evaluations=100, **how)
    report |= {"first_timestep": first, "bits_per_dim_from_first": best.mean}
    for steps in (1000, 100, 50, 25):
        scheduler.set_timesteps(steps)
        how = dict(generator=torch.Generator().manual_seed(0), batch_size=256)
        if steps == 1000:
            result = estimate_bits_per_dim(unet, scheduler, x_start, num_evaluations=100, **how)
            report |= {"kl": result.kl.mean().item(), "decoder": result.decoder.mean().item()}
            report |= {"standard_error": result.standard_error, "sampling_error": result.sampling_error}
        else:
            result = bits_per_dim(unet, scheduler, x_start, **how)
        report[f"bits_per_dim_{steps}"] = result.mean
    for steps in (250, 50):
        drawn = pipeline(samples, torch.Generator().manual_seed(0), steps, output_type="pt").images
        report[f"samples_{steps}"] = judge(tensor_to_pixels(drawn * 2 - 1, levels).numpy())
    return report


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", choices=["digits", "mnist"])
    parser.add_argument("--steps", type=int, help="of training; the preset's if left out")
    parser.add_argument("--width", type=int, help="channels of the first level, in proportion for the others")
    parser.add_argument("--images", type=int, default=360, help="test images of bits/dim")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--only", nargs="*", help="names, for example simple-fixed_large-cosine")
    parser.add_argument("--set", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"), help="any other key")
    arguments = parser.parse_args()

    base, _ = load_config(["--config", arguments.data])
    common = ["--config", arguments.data, "--sample_every", "0"]
    if arguments.steps:
        common += ["--steps", str(arguments.steps)]
    if arguments.width:
        channels = base.unet["block_out_channels"]
        common += ["--unet.block_out_channels", str([c * arguments.width // channels[0] for c in channels])]
    for key, value in arguments.set:
        common += [f"--{key}", value]
    levels = base.scheduler.get("levels", 256)
    (train_images, labels), (test, _) = pixels("train", arguments.data), pixels("test", arguments.data)
    flat = 16 / (levels - 1)  # the support vector machine of benchmarks/digits.py was chosen for 17 levels
    svm = SVC(gamma=0.001 * 64 / train_images[0].size, probability=True, random_state=0)
    svm.fit(train_images.reshape(len(train_images), -1) * flat, labels)
    threshold = np.quantile(svm.predict_proba(test.reshape(len(test), -1) * flat).max(1), 0.05)

    def judge(drawn):
        return float((svm.predict_proba(drawn.reshape(len(drawn), -1) * flat).max(1) > threshold).mean())

    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    path = results / f"objectives_{arguments.data}.json"
    report = json.loads(path.read_text()) if path.is_file() else {"runs": {}}
    parts = (torch.from_numpy(part)[:, None] for part in (train_images, test[: arguments.images]))
    report["per_pixel_histogram"] = histogram_bits_per_dim(*parts, levels)
    report["png"] = file_bits_per_dim(test[: arguments.images], levels, format="PNG", optimize=True)
    report["webp"] = file_bits_per_dim(
        test[: arguments.images], levels, format="WEBP", lossless=True, quality=100, method=6
    )
    for schedule in SCHEDULES:
        for objective, flags in OBJECTIVES.items():
            name = f"{objective}-{schedule}"
            settings = [*common, *flags, "--scheduler.beta_schedule", schedule]
            known = report["runs"].get(name, {}).get("settings") == settings
            if known or (arguments.only and name not in arguments.only):
                continue
            folder = Path(tempfile.mkdtemp())
            start = time.perf_counter()
            saved = train(load_config([*settings, "--output_dir", str(folder / "run")])[0])
            seconds = time.perf_counter() - start
            found = measure(saved, train_images, test, levels, arguments.images, arguments.samples, judge)
            report["runs"][name] = {"settings": settings, "training_seconds": round(seconds), **found}
            path.write_text(json.dumps(report, indent=2) + "\n")
            path.with_suffix(".md").write_text(table(report))
            shutil.rmtree(folder)
            print(name, json.dumps(found), flush=True)
    print(table(report))


def table(report):
    columns = [
        "bits_per_dim_from_first",
        "first_timestep",
        "bits_per_dim_1000",
        "sampling_error",
        "decoder",
        "bits_per_dim_100",
        "bits_per_dim_50",
        "bits_per_dim_25",
    ]
    columns += ["samples_250", "samples_50", "training_seconds"]
    lines = ["| objective | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]
    for name, run in report["runs"].items():
        lines.append(f"| {name} | " + " | ".join(f"{run.get(column, float('nan')):.4g}" for column in columns) + " |")
    beside = (f"{name} {report[name]:.3f}" for name in ("per_pixel_histogram", "png", "webp"))
    return "\n".join([*lines, "", "Bits/dim of others on the same test images: " + ", ".join(beside) + ".", ""])


if __name__ == "__main__":
    main()
