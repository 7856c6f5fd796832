"""Measure the quality of samples: by their number, by sampler and steps, by extractor; and what drawing and measuring cost.

    python benchmarks/sample_quality.py mnist [--device cuda] [--count 50000] [--samples 5000]
    python benchmarks/sample_quality.py digits --extractors judge pixels

Trains the network of RUNS in runs/quality/<data> if it does not exist. The Fréchet distances compare samples with the training
split. Extractors: efficientnet-lite0; judge, the last features of the classifier of benchmarks/guidance.py, trained on the same
split; pixels, the pixels themselves. Errors are 95 % intervals, 1.96 standard errors (jackknife). Writes to benchmarks/results:
sample_quality_<data>_count, _steps, _batch and _cost, .json and .md each, and the curves sample_quality_<data>.png.
"""

import argparse
import json
import time

import torch
from guidance import ROOT, open_or_train, train_judge
from measure import RESULTS, record
from tqdm.auto import tqdm

from ddpm_hf.data.pixels import pixels_to_tensor
from ddpm_hf.data.sources import LEVELS, load_images, public_name
from ddpm_hf.evaluation.features.extraction import extract
from ddpm_hf.evaluation.features.extractors import Extractor, open_extractor
from ddpm_hf.evaluation.generation import Generator, find_batch_size
from ddpm_hf.evaluation.image_sets import DataImages
from ddpm_hf.evaluation.metrics import Moments, compare_manifolds, frechet_at_infinity, frechet_distance, frechet_error
from ddpm_hf.evaluation.scheduler_by_name import use_scheduler
from ddpm_hf.evaluation.sheets import save_figure

RUNS = {
    "digits": ["--config", "digits"],
    "mnist": [
        "--config", "mnist", "--steps", "6000", "--batch_size", "128", "--learning_rate", "1e-3", "--lr_schedule", "cosine",
        "--lr_warmup_steps", "50", "--ema_decay", "0.995", "--sample_every", "0", "--scheduler.variance_type", "fixed_small",
    ],
}  # fmt: skip
SAMPLERS = {
    "ancestral": (None, {}, {}),
    "DDIM": (None, {}, {"eta": 0.0}),
    "DPM-Solver++": ("DPMSolverMultistepScheduler", {"timestep_spacing": "leading"}, {}),
    "UniPC": ("UniPCMultistepScheduler", {"timestep_spacing": "leading"}, {}),
}
STEPS = (5, 10, 25, 50, 100)
COUNT_STEPS = 50  # DDIM, for the curve by number
COUNTS = (200, 500, 1000, 2000, 5000, 10000, 20000, 50000)
BATCHES = (16, 64, 256)
INTERVAL = 1.96


class Features:
    """The features of all extractors, of samples and of the training split."""

    def __init__(self, data, pipeline, names, device, batch_size):
        self.device, self.batch_size = device, batch_size
        dataset = load_images(data, "train")
        self.images = DataImages(dataset, pipeline.unet, LEVELS[data], data=public_name(data), split="train")
        self.extractors = {name: self._open(name, dataset) for name in names}
        self.real = {
            name: extract(self.images, extractor, 256, progress=False)["features"].to(device)
            for name, extractor in self.extractors.items()
        }

    def _open(self, name, dataset):
        if name == "judge":
            pixels = self.images.read(range(len(self.images)))
            judge = train_judge(pixels_to_tensor(pixels), torch.tensor(dataset["label"])).to(self.device)
            return self._extractor(name, lambda images: judge.features(images[:, :1].float() / 127.5 - 1))
        if name == "pixels":
            return self._extractor(name, lambda images: images.flatten(1).float() / 255)
        return open_extractor(name, self.device)

    def _extractor(self, name, function):
        facts = dict(size=None, resizing="none", digest="", device=torch.device(self.device), takes_any_channels=True)
        return Extractor(name, f"FD-{name}", compute=lambda images: {"features": function(images)}, **facts)

    def of_samples(self, generator, seeds):
        """Draw the images of the seeds; return their features by extractor, the seconds of drawing and of each extractor."""
        features, seconds = {name: [] for name in self.extractors}, dict.fromkeys(["drawing", *self.extractors], 0.0)
        for start in tqdm(range(0, len(seeds), self.batch_size), leave=False):
            began = time.perf_counter()
            pixels = generator.draw_pixels(seeds[start : start + self.batch_size])
            seconds["drawing"] += self._since(began)
            for name, extractor in self.extractors.items():
                began = time.perf_counter()
                features[name].append(torch.cat([extractor(part)["features"] for part in pixels.split(256)]))
                seconds[name] += self._since(began)
        return {name: torch.cat(parts) for name, parts in features.items()}, seconds

    def _since(self, began):
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - began


def measure_counts(data, pipeline, features, count):
    """The distance by the number of samples, and its limit; also the cost of drawing and extracting."""
    generator = Generator(pipeline, num_inference_steps=COUNT_STEPS, eta=0.0)
    drawn, seconds = features.of_samples(generator, range(count))
    for name, value in seconds.items():
        row = {"work": name, "images": count, "images/s": count / value}
        record(
            f"sample_quality_{data}_cost", f"Drawing {data} in {COUNT_STEPS} steps, and extracting", row, keys=("work",)
        )
    for name, generated in drawn.items():
        moments = Moments.of(features.real[name])
        for number in (*(n for n in COUNTS if n < count), count):
            part = generated[:number]
            error = frechet_error(moments, part)
            limit = frechet_at_infinity(moments, part, standard_error=error)
            row = {
                "extractor": name,
                "features": part.shape[1],
                "samples": number,
                "distance": frechet_distance(moments, part),
                "95 %": INTERVAL * error,
                "of infinitely many": limit.value,
                "its 95 %": INTERVAL * limit.standard_error,
            }
            record(
                f"sample_quality_{data}_count", f"Fréchet distance by samples, {data}", row, ("extractor", "samples")
            )


def measure_steps(data, pipeline, features, count):
    """Distance, precision and recall by sampler and steps."""
    own = pipeline.scheduler
    for sampler, (scheduler, settings, options) in SAMPLERS.items():
        for steps in STEPS:
            pipeline.scheduler = own
            if scheduler is not None:
                use_scheduler(pipeline, scheduler, settings)
            drawn, _ = features.of_samples(Generator(pipeline, num_inference_steps=steps, **options), range(count))
            for name, generated in drawn.items():
                moments = Moments.of(features.real[name])
                overlap = compare_manifolds(features.real[name], generated)
                row = {
                    "extractor": name,
                    "sampler": sampler,
                    "steps": steps,
                    "samples": count,
                    "distance": frechet_distance(moments, generated),
                    "95 %": INTERVAL * frechet_error(moments, generated, groups=16),
                    "precision": overlap.precision.value,
                    "recall": overlap.recall.value,
                }
                title = f"Samplers on {data}"
                record(f"sample_quality_{data}_steps", title, row, keys=("extractor", "sampler", "steps"))
    pipeline.scheduler = own


def measure_batches(data, pipeline):
    """How many pixels differ between batch sizes, and which size `--batch_size auto` takes."""
    generator = Generator(pipeline, num_inference_steps=100)
    seeds, drawn = range(256), {}
    for size in BATCHES:
        batches = [seeds[start : start + size] for start in range(0, len(seeds), size)]
        drawn[size] = torch.cat([generator.draw_pixels(batch).cpu().int() for batch in batches])
    best, reason = find_batch_size(generator.try_batch, 4096)
    for size in BATCHES[1:]:
        difference = (drawn[size] - drawn[BATCHES[0]]).abs()
        row = {
            "device": pipeline.device.type,
            "batches": f"{BATCHES[0]} and {size}",
            "share of pixels that differ": (difference > 0).double().mean().item(),
            "largest difference of 255": int(difference.max()),
            "auto": f"{best} ({reason})",
        }
        record(
            f"sample_quality_{data}_batch", f"Batch sizes, {data}, 100 ancestral steps", row, keys=("device", "batches")
        )


def recorded(data, kind):
    """The rows of a results file, for each extractor those of the machine with the most of them."""
    sections = json.loads((RESULTS / f"sample_quality_{data}_{kind}.json").read_text())
    names = dict.fromkeys(row["extractor"] for section in sections for row in section["rows"])
    rows = [[[row for row in section["rows"] if row["extractor"] == name] for section in sections] for name in names]
    return [row for of_extractor in rows for row in max(of_extractor, key=len)]


def plot(data):
    """Plot what is recorded."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator

    by_count, by_steps = recorded(data, "count"), recorded(data, "steps")
    names = list(dict.fromkeys(row["extractor"] for row in by_count))
    figure, axes = plt.subplots(2, len(names), figsize=(5 * len(names), 7.5), layout="constrained", squeeze=False)
    for (above, below), name in zip(axes.T, names):
        rows = [row for row in by_count if row["extractor"] == name]
        x = [row["samples"] for row in rows]
        for value, error, label in (
            ("distance", "95 %", "of the samples"),
            ("of infinitely many", "its 95 %", "extrapolated"),
        ):
            errors = [row[error] for row in rows]
            above.errorbar(x, [row[value] for row in rows], errors, label=label, capsize=3, marker=".")
        above.set_ylim(bottom=0.4 * min(row["distance"] for row in rows))
        above.set(xscale="log", yscale="log", xlabel="samples", title=f"{name}, {rows[0]['features']:,} features")
        for sampler in SAMPLERS:
            rows = [row for row in by_steps if (row["extractor"], row["sampler"]) == (name, sampler)]
            errors = [row["95 %"] for row in rows]
            distances = [row["distance"] for row in rows]
            below.errorbar([row["steps"] for row in rows], distances, errors, label=sampler, capsize=3, marker=".")
        below.set(xscale="log", yscale="log", xlabel="steps", xticks=STEPS, xticklabels=STEPS)
        below.minorticks_off()
    for axis in axes.flat:
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axis.yaxis.set_minor_formatter("{x:g}")
    axes[0, 0].set_ylabel("Fréchet distance, 95 % interval")
    axes[1, 0].set_ylabel("Fréchet distance, 95 % interval")
    axes[0, -1].legend()
    axes[1, -1].legend()
    save_figure(figure, RESULTS / f"sample_quality_{data}.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", choices=list(RUNS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--count", type=int, default=50000, help="samples of the curve by their number")
    parser.add_argument("--samples", type=int, default=5000, help="samples for each sampler and number of steps")
    parser.add_argument("--extractors", nargs="+", default=["efficientnet-lite0", "judge", "pixels"])
    parser.add_argument("--batch_size", type=int, default=1000)
    parser.add_argument("--plot", action="store_true", help="only plot what is recorded")
    arguments = parser.parse_args()
    data, device = arguments.data, arguments.device
    if arguments.plot:
        return plot(data)
    pipeline = open_or_train(RUNS[data], ROOT / "runs/quality" / data).to(device)
    measure_batches(data, pipeline)
    features = Features(data, pipeline, arguments.extractors, device, arguments.batch_size)
    measure_counts(data, pipeline, features, arguments.count)
    measure_steps(data, pipeline, features, arguments.samples)
    plot(data)


if __name__ == "__main__":
    main()
