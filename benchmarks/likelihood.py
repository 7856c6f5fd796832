"""Compare ways to compute bits/dim: estimate, all terms, uniform timesteps; timesteps in batches, or one per call.

    python benchmarks/likelihood.py runs/demo/pipeline --data digits
    python benchmarks/likelihood.py runs/mnist/pipeline --data mnist --images 200
    python benchmarks/likelihood.py runs/mnist/pipeline --data mnist --time

Writes benchmarks/results/likelihood_<data>.json, or likelihood_time_<data>.json.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from measure import RESULTS, in_turns, machine
from tqdm.auto import tqdm

from ddpm_hf import DDPMImagePipeline, bits_per_dim, estimate_bits_per_dim
from ddpm_hf.evaluation.images import load_tensor
from ddpm_hf.files.atomic import write_text

ROOT = Path(__file__).parents[1]


@torch.no_grad()
def uniform_estimate(unet, scheduler, x_start, count, generator):
    """Return L_T plus T times the mean of `count` terms at uniformly drawn timesteps: unbiased, no variance reduction."""
    total = scheduler.prior_bits_per_dim(x_start)
    for _ in range(count):
        t = torch.randint(len(scheduler.chain), (len(x_start),), generator=generator)
        noise = torch.randn(x_start.shape, generator=generator)
        x_t = scheduler.q_sample(x_start, t, noise)
        output = unet(x_t, t, return_dict=False)[0]
        total = total + len(scheduler.chain) / count * scheduler.vlb_term(output, x_start, x_t, t, clip_sample=True)
    return total.double().mean().item()


@torch.no_grad()
def one_timestep_per_call(unet, scheduler, x_start):
    """Return the bound of each image, computed in a plain loop with one timestep per network call."""
    total = scheduler.prior_bits_per_dim(x_start)
    for t in scheduler.chain:
        x_t = scheduler.q_sample(x_start, t, torch.randn_like(x_start))
        total = total + scheduler.vlb_term(unet(x_t, t, return_dict=False)[0], x_start, x_t, t, clip_sample=True)
    return total


def wall_times(unet, scheduler, x_start, batch_size, rounds=3, steps=100):
    """Time the plain loop and `bits_per_dim` in turns, on a chain of `steps`, which the scheduler keeps."""
    scheduler.set_timesteps(steps)
    calls = {
        "plain": lambda: one_timestep_per_call(unet, scheduler, x_start),
        "ours": lambda: bits_per_dim(unet, scheduler, x_start, batch_size=batch_size),
    }
    seconds = in_turns(calls, rounds, warmup=1)
    ratios = sorted(plain / ours for plain, ours in zip(seconds["plain"], seconds["ours"]))
    return {
        "milliseconds_a_row": 1000 * statistics.median(seconds["ours"]) / len(x_start) / steps,
        "one_step_a_call_over_ours": statistics.median(ratios),
        "rounds": [ratios[0], ratios[-1]],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pipeline")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--images", type=int, help="number of test images (default: all)")
    parser.add_argument("--evaluations", type=int, default=50, help="network evaluations per image")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--time", action="store_true", help="measure only wall times, for 64 images and for one")
    arguments = parser.parse_args()
    pipeline = DDPMImagePipeline.from_pretrained(arguments.pipeline)
    unet, scheduler, evaluations = pipeline.unet, pipeline.scheduler, arguments.evaluations
    x_start, _ = load_tensor(arguments.data, "test", unet, scheduler.levels, with_labels=False)
    x_start = x_start[: arguments.images]  # the built-in data sets are in random order

    def make_generator(seed):
        return torch.Generator().manual_seed(seed)

    if arguments.time:
        report = {"data": arguments.data}
        for count, size in (64, 64), (64, 256), (1, 256):
            times = wall_times(unet, scheduler, x_start[:count], size)
            report[f"images: {count}, batch_size: {size}"] = times
        write(report, f"likelihood_time_{Path(arguments.data).name}.json")
        return
    full = bits_per_dim(
        unet, scheduler, x_start, generator=make_generator(0), batch_size=arguments.batch_size, progress_bar=True
    )
    estimates, uniform_estimates = [], []
    for seed in tqdm(range(1, arguments.repeats + 1), desc="estimates"):
        estimates.append(
            estimate_bits_per_dim(
                unet,
                scheduler,
                x_start,
                num_evaluations=evaluations,
                generator=make_generator(seed),
                batch_size=arguments.batch_size,
            )
        )
        uniform_estimates.append(uniform_estimate(unet, scheduler, x_start, evaluations, make_generator(seed)))
    means = [estimate.mean for estimate in estimates]

    report = {
        "data": arguments.data,
        "images": len(x_start),
        "terms": len(scheduler.chain),
        "full_chain": full.mean,
        "standard_error_over_images": full.standard_error,
        "evaluations_per_image": evaluations,
        "repeats": arguments.repeats,
        "estimate_root_mean_square_error": statistics.fmean((m - full.mean) ** 2 for m in means) ** 0.5,
        "estimate_mean": statistics.fmean(means),
        "estimate_standard_deviation": statistics.stdev(means),
        "estimate_reported_error": statistics.fmean(e.sampling_error**2 for e in estimates) ** 0.5,
        "uniform_root_mean_square_error": statistics.fmean((m - full.mean) ** 2 for m in uniform_estimates) ** 0.5,
    }
    write(report, f"likelihood_{Path(arguments.data).name}.json")


def write(report, name):
    report["machine"] = machine()
    print(json.dumps(report, indent=2))
    write_text(RESULTS / name, json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
