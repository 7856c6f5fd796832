"""A DDPM checkpoint in continuous time: samplers by network calls, the ODE's bits/dim beside the bound, encodings.

    python benchmarks/continuous.py digits
    python benchmarks/continuous.py mnist
    python benchmarks/continuous.py digits --only processes      # networks trained in continuous time, VP beside sub-VP

The network is the unconditional one of benchmarks/guidance.py, which is trained if it does not exist. So is the judge: a sample
is recognized if the judge gives a class a probability of at least 0.9, and the Fréchet distance is taken in its last features.
To compare latents, a second network is trained on the same data with another seed. Writes to benchmarks/results:
continuous_<data>.json and .md (samplers), continuous_likelihood.json and .md, continuous_encodings.json and .md,
continuous_processes.json and .md, the curves continuous_<data>.png, the pictures continuous_<data>_encodings.png,
continuous_<data>_trajectories.png, continuous_<data>_ways.png.
"""

import argparse
import math
import time

import torch
from digits import pixels
from guidance import LEVELS, ROOT, RUNS, judge_of, run
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

# name -> its scheduler's settings, and network calls a step; None: the chain's own
SAMPLERS = {
    "chain, ancestral": None,
    "chain, DDIM": None,
    "SDE, reverse diffusion": {"predictor": "reverse_diffusion"},
    "SDE, Euler-Maruyama": {"predictor": "euler_maruyama"},
    "SDE, predictor and corrector": {"predictor": "reverse_diffusion", "correct_steps": 1},
    "ODE, Euler": {"predictor": "probability_flow"},
    "ODE, DDIM": {"predictor": "ddim"},
}
# in continuous time, by preset digits-vp: process, weighting of the loss, times
LIKELIHOOD = ["--weighting", "likelihood", "--timesteps", "importance"]
PROCESSES = {
    ("vp", "variance"): [],
    ("vp", "likelihood"): LIKELIHOOD,
    ("subvp", "variance"): ["--process", "subvp"],
    ("subvp", "likelihood"): ["--process", "subvp", *LIKELIHOOD],
}
CLIPPED = {"digits": (True, False), "mnist": (True,)}  # the x_0 of the likelihood's ODE; the bound's is
CALLS = (10, 20, 50, 100, 200)
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-5)
AT_ONCE = 250


def networks(data):
    """The unconditional pipeline of guidance.py, and one of another seed."""
    return [
        run([*RUNS[data]["unconditional"], "--seed", seed], ROOT / "runs/guidance" / data / name)
        for name, seed in (("unconditional", 0), ("unconditional-1", 1))
    ]


def shape_of(pipe):
    return pipe.channels, *sides(pipe.unet.config.sample_size)


def quality(judge, real, x_start):
    """Fréchet distance of samples from real features, and the share of them that the judge is sure of."""
    with torch.no_grad():
        features = judge.features(x_start.clamp(-1, 1).float())
        sure = judge.logits(features).softmax(1).max(1).values
    return {
        "Fréchet distance": frechet_distance(real, features) if features.isfinite().all() else math.nan,
        "recognised": (sure >= 0.9).double().mean().item(),
        "samples": len(x_start),
    }


def samplers(data, pipe, judge, real, count, most):
    network, chain = InferenceUNet(pipe.unet), pipe.scheduler
    noise = torch.randn(count, *shape_of(pipe), generator=torch.Generator().manual_seed(0))
    pipe = DDPMImagePipeline(pipe.unet, chain)  # the caller's keeps its scheduler
    pipe.set_progress_bar_config(disable=True)
    pipe.optimize()

    def tell(name, calls, x_start, **more):
        row = {"sampler": name, "network calls": calls, **quality(judge, real, x_start), **more}
        record(f"continuous_{data}", f"Samplers on {data}", row, keys=("sampler", "network calls", "tolerance"))
        return row

    rows = []
    for name, settings in SAMPLERS.items():
        for calls in (calls for calls in CALLS if calls <= most):
            steps = calls // 2 if settings and settings.get("correct_steps") else calls
            pipe.scheduler = chain if settings is None else VPSDEScheduler.from_config(chain.config, **settings)
            try:
                pipe.scheduler.set_timesteps(steps)
            except ValueError as error:  # too few for the betas
                print(f"{name}: {error}")
                continue
            how = {"eta": 0.0} if name == "chain, DDIM" else {}
            generator, found = torch.Generator().manual_seed(1), []
            for part in noise.split(AT_ONCE):
                found.append(pipe(len(part), generator, steps, "latent", latents=part, **how).images)
            rows.append(tell(name, calls, torch.cat(found)))
    for tolerance in TOLERANCES:
        try:
            found = decode(network, chain, noise, rtol=tolerance, atol=tolerance, batch_size=AT_ONCE)
        except OdeStopped as error:
            print(f"ODE, adaptive, {tolerance:g}: {error}")
            continue
        calls = round(found.evaluations.double().mean().item())
        rows.append(tell("ODE, adaptive", calls, found.sample, tolerance=tolerance))
    return rows


def likelihood(data, pipe, x_start):
    chain = VariationalDDPMScheduler.from_config(pipe.scheduler.config)
    generator = torch.Generator().manual_seed(0)
    for first in (0, 20):  # where the chain begins, see `bits_per_dim`
        chain.set_timesteps(timesteps=range(len(chain.alphas_cumprod) - 1, first - 1, -1))
        start = time.perf_counter()
        bound = bits_per_dim(InferenceUNet(pipe.unet), chain, x_start, generator=generator, batch_size=256)
        bound_s = time.perf_counter() - start
        for clip in CLIPPED[data]:
            start = time.perf_counter()
            ode = ode_bits_per_dim(pipe.unet, chain, x_start, clip_sample=clip, generator=generator, probes=2)
            ode_s, less = time.perf_counter() - start, (bound.total - ode.total).double()
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
                "bound less ODE": less.mean().item(),
                "error of the difference": (less.std() / len(x_start) ** 0.5).item(),
                "network calls": int(ode.evaluations[0]),
                "bound s": bound_s,
                "ODE s": ode_s,
            }
            keys = ("data", "images", "chain from t", "ODE's x_0")
            record("continuous_likelihood", "bits/dim of one checkpoint", row, keys=keys)


def processes(data, judge, real, x_start, count):
    """Networks trained in continuous time: the ODE's bits/dim of uniformly dequantized images, and samples of 200 steps."""
    for (process, weighting), arguments in PROCESSES.items():
        folder = ROOT / "runs/continuous" / f"{process}-{weighting}"
        pipe = run(["--config", "digits-vp", *arguments], folder)
        generator = torch.Generator().manual_seed(0)
        ode = ode_bits_per_dim(pipe.unet, pipe.scheduler, x_start, generator=generator, probes=2)
        found = [pipe(min(AT_ONCE, count - i), generator, 200, "latent").images for i in range(0, count, AT_ONCE)]
        row = {
            "data": data,
            "process": process,
            "weighting": weighting,
            "images": len(x_start),
            "ODE": ode.mean,
            "error": ode.standard_error,
            "of the probes": (ode.probe_error.square().sum().sqrt() / len(x_start)).item(),
            "network calls": round(ode.evaluations.double().mean().item()),
            **quality(judge, real, torch.cat(found)),
        }
        record("continuous_processes", "Trained in continuous time", row, keys=("data", "process", "weighting"))


def encodings(data, pipe, other, x_start):
    """Encoded, decoded, by how many calls; latents of two networks; a sheet of both with interpolations."""
    chain, network, second = pipe.scheduler, InferenceUNet(pipe.unet), InferenceUNet(other.unet)
    latents = {}
    for name, how in (
        ("adaptive, 1e-5", {}),
        ("adaptive, 1e-3", {"rtol": 1e-3, "atol": 1e-3}),
        ("DDIM, 50", {"num_inference_steps": 50}),
        ("DDIM, 250", {"num_inference_steps": 250}),
    ):
        up = encode(network, chain, x_start, **how)
        down = decode(network, chain, up.sample, **how)
        latents[name] = up.sample
        row = {
            "data": data,
            "way": name,
            "network calls there": int(up.evaluations[0]),
            "and back": int(down.evaluations[0]),
            "root mean square error": (down.sample - x_start).square().mean().sqrt().item(),
            "largest": (down.sample - x_start).abs().max().item(),
            "std of latents": up.sample.std().item(),
        }
        record("continuous_encodings", "Encoded and decoded", row, keys=("data", "way"))
    ours, theirs = latents["adaptive, 1e-5"], encode(second, chain, x_start).sample
    alike = torch.nn.functional.cosine_similarity(ours.flatten(1), theirs.flatten(1))
    strangers = torch.nn.functional.cosine_similarity(ours.flatten(1), theirs.roll(1, 0).flatten(1))
    row = {"data": data, "way": "two networks", "cosine of their latents": alike.mean().item()}
    row["of two images"] = strangers.mean().item()
    record("continuous_encodings", "Encoded and decoded", row, keys=("data", "way"))

    weights = [i / 8 for i in range(9)]
    mixed = interpolate_latents(ours[:6], ours[6:12], weights)
    between = decode(network, chain, mixed).sample.unflatten(0, (6, 9))
    back = decode(network, chain, ours[:6]).sample
    by_other = decode(second, chain, ours[:6]).sample
    shown = torch.cat((x_start[:6, None], ours[:6, None] / 3, back[:, None], by_other[:, None], between), dim=1)
    sheet = as_sheet(as_images(shown.flatten(0, 1).clamp(-1, 1)), 13)
    save_picture(sheet, RESULTS / f"continuous_{data}_encodings.png")


def trajectories(data, pipe):
    """The same noise down the SDE and the ODE: images on the way, and pixels against t."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    chain, figure, axes = pipe.scheduler, *plt.subplots(1, 2, figsize=(13, 4), layout="constrained", sharey=True)
    noise = torch.randn(1, *shape_of(pipe), generator=torch.Generator().manual_seed(3))
    strips, steps = [], 400
    middle = noise.shape[-1] // 2
    for axis, (name, predictor) in zip(axes, (("SDE", "reverse_diffusion"), ("ODE", "ddim"))):
        pipe.scheduler = VPSDEScheduler.from_config(chain.config, predictor=predictor)
        for seed in range(3):
            way = list(pipe.progressive(1, torch.Generator().manual_seed(seed), steps, latents=noise))
            t = [label / (len(chain.alphas_cumprod) - 1) for label, *_ in way]
            line = [x_t[0, 0, middle, middle].item() for _, x_t, _ in way]
            axis.plot(t, line, linewidth=0.8, label=f"seed {seed}" if name == "SDE" else None)
            strips.append(torch.cat([x_t for _, x_t, _ in way[:: steps // 10]] + [way[-1][2]]))
        axis.set(xlabel="t", ylabel="the middle pixel of x_t", title=f"{name}, from one x_T, three seeds")
        axis.invert_xaxis()
        axis.grid(alpha=0.3)
    pipe.scheduler = chain
    save_figure(figure, RESULTS / f"continuous_{data}_trajectories.png")
    sheet = as_sheet(as_images(torch.cat(strips[:4]).clamp(-1, 1)), len(strips[0]))
    save_picture(sheet, RESULTS / f"continuous_{data}_ways.png")


def plot(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(13, 4.5), layout="constrained")
    for axis, what in zip(axes, ("Fréchet distance", "recognised")):
        for name in dict.fromkeys(row["sampler"] for row in rows):
            points = sorted((row["network calls"], row[what]) for row in rows if row["sampler"] == name)
            axis.plot(*zip(*points), marker="o", markersize=4, label=name)
        axis.set(xlabel="network calls", ylabel=what, xscale="log")
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[0].legend(fontsize="small")
    save_figure(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", choices=list(RUNS))
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--calls", type=int, default=max(CALLS), help="of a sampler at the most")
    parser.add_argument("--images", type=int, default=64, help="of the likelihood")
    parser.add_argument("--only", choices=["samplers", "likelihood", "encodings", "processes"])
    arguments = parser.parse_args()
    data = arguments.data
    if arguments.only == "processes" and data != "digits":
        parser.error("--only processes is of the digits")

    def tensors(split):
        images, labels = pixels(split, data)
        return pixels_to_tensor(torch.from_numpy(images)[:, None], LEVELS[data]), torch.from_numpy(labels)

    (x_train, y_train), (x_test, _) = tensors("train"), tensors("test")
    parts = [arguments.only] if arguments.only else ["encodings", "likelihood", "samplers"]
    pipe, other = networks(data) if parts != ["processes"] else (None, None)
    for part in tqdm(parts):
        if part in ("samplers", "processes"):
            judge = judge_of(x_train, y_train)
            with torch.no_grad():
                order = torch.randperm(len(x_train), generator=torch.Generator().manual_seed(0))
                real = judge.features(x_train[order[: arguments.samples]])
        if part == "processes":
            processes(data, judge, real, x_test[: arguments.images], arguments.samples)
        elif part == "samplers":
            rows = samplers(data, pipe, judge, real, arguments.samples, arguments.calls)
            plot(rows, RESULTS / f"continuous_{data}.png")
        elif part == "likelihood":
            likelihood(data, pipe, x_test[: arguments.images])
        else:
            encodings(data, pipe, other, x_test[:64])
            trajectories(data, pipe)


if __name__ == "__main__":
    main()
