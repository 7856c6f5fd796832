"""Compare noise schedules: bits/dim of one network with linear, cosine and learned betas, trained on the same data for equal
steps by the variational bound of a chain (vlb, with importance sampling of timesteps) or in continuous time.

    python benchmarks/noise_schedules.py digits|mnist [--seeds 0 1] [--only learned]
    python benchmarks/noise_schedules.py digits|mnist --cost    # seconds of a training step, with fixed and learned betas

Networks and steps are those of benchmarks/objectives.py, in runs/noise_schedules/<data>/<name>-<seed>. Bits/dim are of images
of the test split: with all 1,000 timesteps, and in continuous time for networks that were trained so; then with the analytic
variance of `optimize-chain`, measured on 128 training images: all timesteps, and the best 100 and 25. Errors are standard
errors over images. Writes noise_schedules_<data>.json and .md, and the schedules as noise_schedules_<data>.png.
"""

import argparse

import torch
from digits import pixels
from measure import RESULTS, in_turns, medians, ratio, record
from objectives import ROOT, SMALL, train_if_needed

from ddpm_hf import (
    ContinuousBoundObjective,
    DDPMImagePipeline,
    DiffusionObjective,
    LearnedNoiseSchedule,
    VariationalDDPMScheduler,
    bits_per_dim,
    estimate_bits_per_dim,
)
from ddpm_hf.data.pixels import pixels_to_tensor
from ddpm_hf.data.sources import LEVELS
from ddpm_hf.evaluation.likelihood_report import histogram_bits_per_dim
from ddpm_hf.evaluation.sheets import save_figure
from ddpm_hf.likelihood.chains import measure_denoising_errors, optimal_chains
from ddpm_hf.training.command_line import load_config
from ddpm_hf.training.diffusion import DiffusionTask
from ddpm_hf.training.saving import last_measurement

BOUND = ["--loss", "vlb", "--scheduler.variance_type", "learned_range", "--timesteps", "loss_second_moment"]
LEARNED = ["--scheduler.beta_schedule", "learned"]
CONTINUOUS = ["--loss", "vlb_continuous", "--timesteps", "low_discrepancy", "--scheduler.variance_type", "fixed_small"]
FOURIER = {"digits": ["--unet.fourier_features", "3,4"], "mnist": ["--unet.fourier_features", "7,8"]}
TRAININGS = {
    "linear": [*BOUND, "--scheduler.beta_schedule", "linear"],
    "cosine": [*BOUND, "--scheduler.beta_schedule", "cosine"],
    "learned": [*BOUND, *LEARNED],
    "learned, continuous": [*CONTINUOUS, *LEARNED],
    "linear, Fourier": [*BOUND, "--scheduler.beta_schedule", "linear"],
    "learned, Fourier": [*BOUND, *LEARNED],
    "learned, continuous, Fourier": [*CONTINUOUS, *LEARNED],
}
STEPS = (25, 100)


def measure(folder, train, test):
    """Bits/dim by chain; the columns of a row."""
    pipeline = DDPMImagePipeline.from_pretrained(folder / "pipeline")
    unet, scheduler = pipeline.unet, pipeline.scheduler

    def options():
        return dict(generator=torch.Generator().manual_seed(0), batch_size=256)

    full = estimate_bits_per_dim(unet, scheduler, test, num_evaluations=100, **options())
    row = {"1,000 steps": full.mean, "+-": full.standard_error, "L_0 in this": full.decoder.mean().item()}
    errors = measure_denoising_errors(unet, scheduler, train[:128], **options())
    mse = errors.x_start_mse().value
    analytic = VariationalDDPMScheduler.from_config(scheduler.config, variance_type="analytic", x_start_mse=mse)
    row["analytic, 1,000"] = estimate_bits_per_dim(unet, analytic, test, num_evaluations=100, **options()).mean
    for steps, choice in zip(STEPS, optimal_chains(errors, list(STEPS), variance_type="analytic")):
        analytic.set_timesteps(timesteps=choice.timesteps)
        row[f"analytic, best {steps}"] = bits_per_dim(unet, analytic, test, **options()).mean
    log_snr = torch.logit(scheduler.alphas_cumprod)
    return row | {"log SNR, first": log_snr[0].item(), "log SNR, last": log_snr[-1].item()}, log_snr


def measure_cost(data):
    """Time the loss and its gradients for one batch."""
    config, _ = load_config(["--config", data, *SMALL[data]])
    shape = (config.batch_size, config.channels, config.image_size, config.image_size)
    x_start = pixels_to_tensor(torch.randint(LEVELS[data], shape, dtype=torch.uint8), LEVELS[data])
    network = DiffusionTask(config).network
    schedule = LearnedNoiseSchedule()
    scheduler = VariationalDDPMScheduler(beta_schedule="learned", trained_betas=schedule.betas()[0].tolist())
    objectives = {
        "fixed": DiffusionObjective(scheduler, "vlb"),
        "learned": DiffusionObjective(scheduler, "vlb", noise_schedule=schedule),
        "learned, continuous": ContinuousBoundObjective(scheduler, schedule),
    }
    calls = {
        name: lambda objective=objective: objective(network, x_start).mean().backward()
        for name, objective in objectives.items()
    }
    seconds = in_turns(calls)
    row = {"data": data, **medians(seconds, "ms")}
    for name in ("learned", "learned, continuous"):
        row[f"{name}: time / time with fixed betas"] = ratio(seconds, name, "fixed")
    record("noise_schedules_cost", "The loss of a batch and its gradients, with learned betas", row, keys=("data",))


def plot(curves, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, log_snr in curves.items():
        axes.plot(log_snr, label=name)
    axes.set(xlabel="timestep", ylabel="log SNR")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save_figure(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", choices=list(SMALL))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", nargs="*", choices=list(TRAININGS), default=list(TRAININGS))
    parser.add_argument("--images", type=int, default=128, help="images of the test split")
    parser.add_argument("--cost", action="store_true", help="time a training step, and stop")
    arguments = parser.parse_args()
    if arguments.cost:
        return measure_cost(arguments.data)
    data, levels = arguments.data, LEVELS[arguments.data]
    train, test = (torch.from_numpy(pixels(split, data)[0])[:, None] for split in ("train", "test"))
    test = test[: arguments.images]
    histogram = histogram_bits_per_dim(train, test, levels).mean().item()
    x_train, x_test = (pixels_to_tensor(images, levels) for images in (train, test))
    record(
        f"noise_schedules_{data}_histogram",
        f"Per-pixel histogram, {data}",
        {"data": data, "bits/dim": histogram},
        keys=("data",),
    )
    curves = {}
    for seed in arguments.seeds:
        for name in arguments.only:
            settings = ["--config", data, "--sample_every", "0", *SMALL[data], *TRAININGS[name], "--seed", str(seed)]
            settings += FOURIER[data] if "Fourier" in name else []
            settings += ["--eval_every", "100000", "--eval_images", str(arguments.images), "--eval_evaluations", "100"]
            folder = ROOT / "runs/noise_schedules" / data / f"{name.replace(', ', '-')}-{seed}"
            seconds = train_if_needed(settings, folder)["training_seconds"]
            row, log_snr = measure(folder, x_train, x_test)
            row["continuous"] = None
            if "continuous" in name:
                row["continuous"] = (last_measurement(folder) or {}).get("bits_per_dim")
            row = {"schedule": name, "seed": seed, **row, "training s": seconds}
            record(f"noise_schedules_{data}", f"Noise schedules, {data}", row, keys=("schedule", "seed"))
            if seed == arguments.seeds[0] and "Fourier" not in name:
                curves[name] = log_snr
                plot(curves, RESULTS / f"noise_schedules_{data}.png")


if __name__ == "__main__":
    main()
