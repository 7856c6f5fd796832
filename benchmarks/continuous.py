"""Use a DDPM checkpoint in continuous time: samplers by network calls, the ODE's bits/dim against the bound, encodings.

    python benchmarks/continuous.py digits
    python benchmarks/continuous.py mnist
    python benchmarks/continuous.py digits --only processes      # networks trained in continuous time, VP and sub-VP

The network is the unconditional one of benchmarks/guidance.py; it is trained if it does not exist. The judge is that of
benchmarks/guidance.py too: a sample is recognized if the judge gives one class a probability of at least 0.9, and the
Fréchet distance compares the judge's last features. To compare latents, a second network is trained on the same data
with another seed. Writes to benchmarks/results: continuous_<data>.json and .md (samplers), continuous_likelihood.json
and .md, continuous_encodings.json and .md, continuous_processes.json and .md, the curves continuous_<data>.png, the
pictures continuous_<data>_encodings.png, continuous_<data>_trajectories.png, continuous_<data>_ways.png.
"""

import argparse
import math
import time

import torch
from digits import pixels
from guidance import LEVELS, ROOT, RUNS, open_or_train, train_judge
from measure import RESULTS, record
from tqdm.auto import tqdm

from ddpm_hf import (
    DDPMImagePipeline,
    InferenceUNet,
    OdeStopped,
    VariationalDDPMScheduler,
    VPSDEScheduler,
    bits_per_dim,
    decode,
    encode,
    interpolate_latents,
    ode_bits_per_dim,
)
from ddpm_hf.arguments import sides
from ddpm_hf.data.pixels import pixels_to_tensor
from ddpm_hf.evaluation.metrics import frechet_distance
from ddpm_hf.evaluation.sheets import as_images, as_sheet, save_figure, save_picture

# sampler -> the settings of its VPSDEScheduler; None for the chain's own scheduler
SAMPLERS = {
    "chain, ancestral": None,
    "chain, DDIM": None,
    "SDE, reverse diffusion": {"predictor": "reverse_diffusion"},
    "SDE, Euler-Maruyama": {"predictor": "euler_maruyama"},
    "SDE, predictor and corrector": {"predictor": "reverse_diffusion", "correct_steps": 1},
    "ODE, Euler": {"predictor": "probability_flow"},
    "ODE, DDIM": {"predictor": "ddim"},
}
# (process, loss weighting) -> training options, on the preset digits-vp
LIKELIHOOD = ["--weighting", "likelihood", "--timesteps", "importance"]
PROCESSES = {
    ("vp", "variance"): [],
    ("vp", "likelihood"): LIKELIHOOD,
    ("subvp", "variance"): ["--process", "subvp"],
    ("subvp", "likelihood"): ["--process", "subvp", *LIKELIHOOD],
}
CLIPPED = {"digits": (True, False), "mnist": (True,)}  # whether the ODE's x_0 is clipped; the bound always clips it
CALLS = (10, 20, 50, 100, 200)
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-5)
BATCH_SIZE = 250


def open_pipelines(data):
    """Open the unconditional pipeline of guidance.py, and one trained with another seed."""
    return [
        open_or_train([*RUNS[data]["unconditional"], "--seed", seed], ROOT / "runs/guidance" / data / name)
        for name, seed in (("unconditional", 0), ("unconditional-1", 1))
    ]


def sample_shape(pipe):
    return pipe.channels, *sides(pipe.unet.config.sample_size)


def sample_quality(judge, real, x_start):
    """Return the Fréchet distance of samples from the real features, and the share that the judge recognizes."""
    with torch.no_grad():
        features = judge.features(x_start.clamp(-1, 1).float())
        confidence = judge.logits(features).softmax(1).max(1).values
    return {
        "Fréchet distance": frechet_distance(real, features) if features.isfinite().all() else math.nan,
        "recognised": (confidence >= 0.9).double().mean().item(),
        "samples": len(x_start),
    }


def measure_samplers(data, pipe, judge, real, count, max_calls):
    """Record the quality of `count` samples for each sampler, by its number of network calls."""
    network, chain = InferenceUNet(pipe.unet), pipe.scheduler
    noise = torch.randn(count, *sample_shape(pipe), generator=torch.Generator().manual_seed(0))
    pipe = DDPMImagePipeline(pipe.unet, chain)  # a copy, because its scheduler is replaced below
    pipe.set_progress_bar_config(disable=True)
    pipe.optimize()

    def record_sampler(name, calls, x_start, **extra_columns):
        row = {"sampler": name, "network calls": calls, **sample_quality(judge, real, x_start), **extra_columns}
        record(f"continuous_{data}", f"Samplers on {data}", row, keys=("sampler", "network calls", "tolerance"))
        return row

    rows = []
    for name, settings in SAMPLERS.items():
        for calls in (calls for calls in CALLS if calls <= max_calls):
            steps = calls // 2 if settings and settings.get("correct_steps") else calls
            pipe.scheduler = chain if settings is None else VPSDEScheduler.from_config(chain.config, **settings)
            try:
                pipe.scheduler.set_timesteps(steps)
            except ValueError as error:  # too few steps for these betas
                print(f"{name}: {error}")
                continue
            step_kwargs = {"eta": 0.0} if name == "chain, DDIM" else {}
            generator, samples = torch.Generator().manual_seed(1), []
            for latents in noise.split(BATCH_SIZE):
                samples.append(pipe(len(latents), generator, steps, "latent", latents=latents, **step_kwargs).images)
            rows.append(record_sampler(name, calls, torch.cat(samples)))
    for tolerance in TOLERANCES:
        try:
            decoded = decode(network, chain, noise, rtol=tolerance, atol=tolerance, batch_size=BATCH_SIZE)
        except OdeStopped as error:
            print(f"ODE, adaptive, {tolerance:g}: {error}")
            continue
        calls = round(decoded.evaluations.double().mean().item())
        rows.append(record_sampler("ODE, adaptive", calls, decoded.sample, tolerance=tolerance))
    return rows


def measure_likelihood(data, pipe, x_start):
    """Record the ODE's bits/dim and the bound of the same images, with their errors and times."""
    chain = VariationalDDPMScheduler.from_config(pipe.scheduler.config)
    generator = torch.Generator().manual_seed(0)
    for first in (0, 20):  # the chain's first timestep, see `bits_per_dim`
        chain.set_timesteps(timesteps=range(len(chain.alphas_cumprod) - 1, first - 1, -1))
        start = time.perf_counter()
        bound = bits_per_dim(InferenceUNet(pipe.unet), chain, x_start, generator=generator, batch_size=256)
        bound_s = time.perf_counter() - start
        for clip in CLIPPED[data]:
            start = time.perf_counter()
            ode = ode_bits_per_dim(pipe.unet, chain, x_start, clip_sample=clip, generator=generator, probes=2)
            ode_s, difference = time.perf_counter() - start, (bound.total - ode.total).double()
            row = {
                "data": data,
                "images": len(x_start),
                "chain from t": first,
                "ODE's x_0": "clipped" if clip else "as it is",
                "bound": bound.mean,
                "its error": bound.standard_error,
                "ODE": ode.mean,
                "error of that": ode.standard_error,
                "of the probes": (ode.probe_error.square().sum().sqrt() / len(x_start)).item(),
                "bound less ODE": difference.mean().item(),
                "error of the difference": (difference.std() / len(x_start) ** 0.5).item(),
                "network calls": int(ode.evaluations[0]),
                "bound s": bound_s,
                "ODE s": ode_s,
            }
            keys = ("data", "images", "chain from t", "ODE's x_0")
            record("continuous_likelihood", "bits/dim of one checkpoint", row, keys=keys)


def measure_processes(data, judge, real, x_start, count):
    """Train networks in continuous time; record the ODE's bits/dim of dequantized images, and the quality of samples."""
    for (process, weighting), arguments in PROCESSES.items():
        folder = ROOT / "runs/continuous" / f"{process}-{weighting}"
        pipe = open_or_train(["--config", "digits-vp", *arguments], folder)
        generator = torch.Generator().manual_seed(0)
        ode = ode_bits_per_dim(pipe.unet, pipe.scheduler, x_start, generator=generator, probes=2)
        samples = [
            pipe(min(BATCH_SIZE, count - i), generator, 200, "latent").images for i in range(0, count, BATCH_SIZE)
        ]
        row = {
            "data": data,
            "process": process,
            "weighting": weighting,
            "images": len(x_start),
            "ODE": ode.mean,
            "error": ode.standard_error,
            "of the probes": (ode.probe_error.square().sum().sqrt() / len(x_start)).item(),
            "network calls": round(ode.evaluations.double().mean().item()),
            **sample_quality(judge, real, torch.cat(samples)),
        }
        record("continuous_processes", "Trained in continuous time", row, keys=("data", "process", "weighting"))


def measure_encodings(data, pipe, second_pipe, x_start):
    """Record the errors of encoding and decoding, and the similarity of two networks' latents; save a sheet of images."""
    chain, network, second = pipe.scheduler, InferenceUNet(pipe.unet), InferenceUNet(second_pipe.unet)
    latents = {}
    for name, ode_kwargs in (
        ("adaptive, 1e-5", {}),
        ("adaptive, 1e-3", {"rtol": 1e-3, "atol": 1e-3}),
        ("DDIM, 50", {"num_inference_steps": 50}),
        ("DDIM, 250", {"num_inference_steps": 250}),
    ):
        encoded = encode(network, chain, x_start, **ode_kwargs)
        decoded = decode(network, chain, encoded.sample, **ode_kwargs)
        latents[name] = encoded.sample
        row = {
            "data": data,
            "way": name,
            "network calls there": int(encoded.evaluations[0]),
            "and back": int(decoded.evaluations[0]),
            "root mean square error": (decoded.sample - x_start).square().mean().sqrt().item(),
            "largest": (decoded.sample - x_start).abs().max().item(),
            "std of latents": encoded.sample.std().item(),
        }
        record("continuous_encodings", "Encoded and decoded", row, keys=("data", "way"))
    first_latents, second_latents = latents["adaptive, 1e-5"], encode(second, chain, x_start).sample
    same_image_cosine = torch.nn.functional.cosine_similarity(first_latents.flatten(1), second_latents.flatten(1))
    other_image_cosine = torch.nn.functional.cosine_similarity(
        first_latents.flatten(1), second_latents.roll(1, 0).flatten(1)
    )
    row = {"data": data, "way": "two networks", "cosine of their latents": same_image_cosine.mean().item()}
    row["of two images"] = other_image_cosine.mean().item()
    record("continuous_encodings", "Encoded and decoded", row, keys=("data", "way"))

    weights = [i / 8 for i in range(9)]
    mixed_latents = interpolate_latents(first_latents[:6], first_latents[6:12], weights)
    interpolations = decode(network, chain, mixed_latents).sample.unflatten(0, (6, 9))
    by_first = decode(network, chain, first_latents[:6]).sample
    by_second = decode(second, chain, first_latents[:6]).sample
    columns = torch.cat(
        (x_start[:6, None], first_latents[:6, None] / 3, by_first[:, None], by_second[:, None], interpolations), dim=1
    )
    sheet = as_sheet(as_images(columns.flatten(0, 1).clamp(-1, 1)), 13)
    save_picture(sheet, RESULTS / f"continuous_{data}_encodings.png")


def plot_trajectories(data, pipe):
    """Plot the middle pixel against t from the same noise, by SDE and ODE, and save a sheet of the images at some times."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    chain, figure, axes = pipe.scheduler, *plt.subplots(1, 2, figsize=(13, 4), layout="constrained", sharey=True)
    noise = torch.randn(1, *sample_shape(pipe), generator=torch.Generator().manual_seed(3))
    strips, steps = [], 400
    middle = noise.shape[-1] // 2
    for axis, (name, predictor) in zip(axes, (("SDE", "reverse_diffusion"), ("ODE", "ddim"))):
        pipe.scheduler = VPSDEScheduler.from_config(chain.config, predictor=predictor)
        for seed in range(3):
            trajectory = list(pipe.progressive(1, torch.Generator().manual_seed(seed), steps, latents=noise))
            times = [t / (len(chain.alphas_cumprod) - 1) for t, *_ in trajectory]
            middle_pixels = [x_t[0, 0, middle, middle].item() for _, x_t, _ in trajectory]
            axis.plot(times, middle_pixels, linewidth=0.8, label=f"seed {seed}" if name == "SDE" else None)
            strips.append(torch.cat([x_t for _, x_t, _ in trajectory[:: steps // 10]] + [trajectory[-1][2]]))
        axis.set(xlabel="t", ylabel="the middle pixel of x_t", title=f"{name}, from one x_T, three seeds")
        axis.invert_xaxis()
        axis.grid(alpha=0.3)
    pipe.scheduler = chain
    save_figure(figure, RESULTS / f"continuous_{data}_trajectories.png")
    sheet = as_sheet(as_images(torch.cat(strips[:4]).clamp(-1, 1)), len(strips[0]))
    save_picture(sheet, RESULTS / f"continuous_{data}_ways.png")


def plot(rows, path):
    """Plot Fréchet distance and the share of recognized samples against network calls."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(13, 4.5), layout="constrained")
    for axis, metric in zip(axes, ("Fréchet distance", "recognised")):
        for name in dict.fromkeys(row["sampler"] for row in rows):
            points = sorted((row["network calls"], row[metric]) for row in rows if row["sampler"] == name)
            axis.plot(*zip(*points), marker="o", markersize=4, label=name)
        axis.set(xlabel="network calls", ylabel=metric, xscale="log")
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[0].legend(fontsize="small")
    save_figure(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", choices=list(RUNS))
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--calls", type=int, default=max(CALLS), help="largest number of network calls of a sampler")
    parser.add_argument("--images", type=int, default=64, help="test images for the likelihood")
    parser.add_argument("--only", choices=["samplers", "likelihood", "encodings", "processes"])
    arguments = parser.parse_args()
    data = arguments.data
    if arguments.only == "processes" and data != "digits":
        parser.error("--only processes needs the data set digits")

    def load_split(split):
        images, labels = pixels(split, data)
        return pixels_to_tensor(torch.from_numpy(images)[:, None], LEVELS[data]), torch.from_numpy(labels)

    (x_train, y_train), (x_test, _) = load_split("train"), load_split("test")
    tasks = [arguments.only] if arguments.only else ["encodings", "likelihood", "samplers"]
    pipe, second_pipe = open_pipelines(data) if tasks != ["processes"] else (None, None)
    for task in tqdm(tasks):
        if task in ("samplers", "processes"):
            judge = train_judge(x_train, y_train)
            with torch.no_grad():
                order = torch.randperm(len(x_train), generator=torch.Generator().manual_seed(0))
                real = judge.features(x_train[order[: arguments.samples]])
        if task == "processes":
            measure_processes(data, judge, real, x_test[: arguments.images], arguments.samples)
        elif task == "samplers":
            rows = measure_samplers(data, pipe, judge, real, arguments.samples, arguments.calls)
            plot(rows, RESULTS / f"continuous_{data}.png")
        elif task == "likelihood":
            measure_likelihood(data, pipe, x_test[: arguments.images])
        else:
            measure_encodings(data, pipe, second_pipe, x_test[:64])
            plot_trajectories(data, pipe)


if __name__ == "__main__":
    main()
