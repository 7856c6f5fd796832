"""Compare chains of a trained network: bits/dim and Fréchet distance by variance, list of timesteps and number of steps.

    python benchmarks/chains.py digits|mnist [--device cuda] [--samples 1000]

The network is that of benchmarks/sample_quality.py. Variances and optimal lists follow from 256 images of the training split
(100 network calls each); bits/dim are the bound of images of the test split with these chains. Distances are of the judge's
features (see benchmarks/sample_quality.py), of samples with seeds from 0 on, against the training split. DDIM, and DPM-Solver++
and UniPC of diffusers, have no bound. Errors are standard errors. Writes benchmarks/results/chains_<data>.json, .md and .png.
"""

import argparse
import time

import torch
from guidance import ROOT, open_or_train
from measure import RESULTS, record
from sample_quality import RUNS, SAMPLERS, Features

from ddpm_hf import VariationalDDPMScheduler, bits_per_dim
from ddpm_hf.data.sources import LEVELS
from ddpm_hf.evaluation.chain_report import compare_chains, plot_chains, spaced_timesteps
from ddpm_hf.evaluation.generation import Generator
from ddpm_hf.evaluation.images import load_tensor
from ddpm_hf.evaluation.metrics import Moments, frechet_distance, frechet_error
from ddpm_hf.evaluation.scheduler_by_name import use_scheduler
from ddpm_hf.likelihood.chains import measure_denoising_errors

STEPS = (5, 10, 25, 50, 100, 1000)
SPACINGS = ("uniform", "quadratic", "optimal")


def bound(pipeline, scheduler, x_start):
    generator = torch.Generator(x_start.device).manual_seed(0)
    result = bits_per_dim(pipeline.unet, scheduler, x_start, generator=generator, batch_size=256)
    return {"bits/dim": result.mean, "+-": result.standard_error}


def distance(features, generator, count):
    drawn, _ = features.of_samples(generator, range(count))
    moments = Moments.of(features.real["judge"])
    return {
        "FD-judge": frechet_distance(moments, drawn["judge"]),
        "FD +-": frechet_error(moments, drawn["judge"], groups=16),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", choices=list(RUNS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--images", type=int, default=128, help="images of the test split")
    parser.add_argument("--longest", type=int, default=1000, help="steps of the longest chains that are sampled")
    parser.add_argument("--pipeline", help="folder of the network, in place of runs/quality/<data>")
    arguments = parser.parse_args()
    data, device = arguments.data, arguments.device
    if arguments.pipeline:
        from ddpm_hf import DDPMImagePipeline

        pipeline = DDPMImagePipeline.from_pretrained(arguments.pipeline).to(device)
    else:
        pipeline = open_or_train(RUNS[data], ROOT / "runs/quality" / data).to(device)
    pipeline.set_progress_bar_config(disable=True)
    own, T = pipeline.scheduler, pipeline.scheduler.config.num_train_timesteps
    train, _ = load_tensor(data, "train", pipeline.unet, LEVELS[data], 256)
    test, _ = load_tensor(data, "test", pipeline.unet, LEVELS[data], arguments.images)
    test = test.to(device)

    start = time.perf_counter()
    generator = torch.Generator(device).manual_seed(0)
    errors = measure_denoising_errors(pipeline.unet, own, train.to(device), generator=generator, batch_size=128)
    measured = time.perf_counter() - start
    report = compare_chains(errors, list(STEPS))
    found = time.perf_counter() - start - measured
    cost = {"network calls": errors.evaluations, "measuring s": measured, "searching s": found}
    record(f"chains_{data}_cost", f"Cost of optimal chains, {data}", {"data": data, **cost}, keys=("data",))
    plot_chains(report, RESULTS / f"chains_{data}.png")

    title, keys = f"Chains, {data}", ("variance", "list", "steps")
    features = Features(data, pipeline, ["judge"], device, 500)
    mse = errors.x_start_mse().value
    for variance_type, choices in report.optimal.items():
        for steps, choice in zip(STEPS, choices):
            for spacing in SPACINGS:
                chain = choice.timesteps if spacing == "optimal" else spaced_timesteps(T, steps, spacing)[::-1]
                if len(chain) < steps or (steps == T and spacing != "uniform"):  # all timesteps are one list
                    continue
                options = {"x_start_mse": mse} if variance_type == "analytic" else {}
                lists = {"benchmark": {str(steps): chain[::-1]}}
                scheduler = VariationalDDPMScheduler.from_config(
                    own.config, variance_type=variance_type, timestep_lists=lists, **options
                )
                scheduler.set_timesteps(timesteps=chain)
                row = {"variance": variance_type, "list": spacing, "steps": steps, **bound(pipeline, scheduler, test)}
                if steps <= arguments.longest and (steps <= 100 or variance_type == "fixed_small"):
                    pipeline.scheduler = scheduler
                    draw = Generator(pipeline, num_inference_steps=steps, timesteps="benchmark")
                    row |= distance(features, draw, arguments.samples)
                record(f"chains_{data}", title, row, keys=keys)
    for sampler, (name, settings, options) in SAMPLERS.items():
        if sampler == "ancestral":
            continue
        for steps in (steps for steps in STEPS[:-1] if steps <= arguments.longest):
            pipeline.scheduler = own
            if name is not None:
                use_scheduler(pipeline, name, settings)
            draw = Generator(pipeline, num_inference_steps=steps, **options)
            row = {
                "variance": sampler,
                "list": "its own",
                "steps": steps,
                **distance(features, draw, arguments.samples),
            }
            record(f"chains_{data}", title, row, keys=keys)


if __name__ == "__main__":
    main()
