"""A saved pipeline and a data set -> bits/dim: the variational bound of Ho, Jain, Abbeel 2020, term by term, or the ODE's.

    python training/evaluate.py runs/digits/pipeline --data digits --split test
    python training/evaluate.py google/ddpm-cifar10-32 --data cifar10 --split test --estimate 50
    python training/evaluate.py runs/digits-vp/pipeline --data digits --ode      # Score-SDE, section 4.3

Takes any DDPM folder or Hub id, diffusers' own included; networks of continuous time have --ode alone. Prints a table; writes
evaluation.json and, where every term was computed, each of them as evaluation.csv and the plot evaluation.png (into the folder,
where there is one; its model card is brought up to date unless it was changed by hand).
"""

import argparse
import functools
import json
import math
import os
import sys
import tarfile
from pathlib import Path

import torch
from sheets import check_matplotlib, save_figure

from ddpm_hf import DDPMImagePipeline, InferenceUNet, OdeStopped, bits_per_dim, estimate_bits_per_dim, ode_bits_per_dim
from ddpm_hf.atomic import write_text
from ddpm_hf.data import (
    ImageDoesNotFit,
    check_levels,
    image_to_pixels,
    load_images,
    pixels_to_tensor,
    tensor_to_pixels,
    training_set,
)
from ddpm_hf.flow import DEQUANTIZATIONS
from ddpm_hf.hub import has_our_card, write_model_card
from ddpm_hf.likelihood import check_scheduler, rate_distortion, standard_error
from ddpm_hf.push import told_of, weights_digest


def histogram_bits_per_dim(train: torch.Tensor, test: torch.Tensor, levels: int) -> torch.Tensor:
    """Bits/dim, (N,) float64, of the model that draws each pixel on its own from its histogram over `train` (add-one smoothed).

    train, test: grey levels 0 .. levels - 1, (N, C, H, W) each, integers. A yardstick: a model that has learned how pixels go
    together is below it.
    """
    counts = torch.ones(levels, *train.shape[1:], dtype=torch.float64)
    counts.scatter_add_(0, train.long(), torch.ones(train.shape, dtype=torch.float64))
    log_probabilities = torch.log2(counts / counts.sum(0))
    return -log_probabilities.gather(0, test.long()).flatten(1).mean(1)


def load_tensor(
    source,
    split,
    unet,
    levels,
    count=None,
    column=None,
    label_column=None,
    training=None,
    max_broken=0.0,
    channels=None,
):
    """x_start (N, C, H, W) of a data set at the network's size, and labels or None, by the rules of training.json.

    channels: C; None for those that the network takes.
    """
    check_levels(source, levels)
    dataset = load_images(source, split)
    dataset = dataset if count is None else dataset.select(range(min(count, len(dataset))))
    size = unet.config.sample_size
    if size is None:
        raise ValueError("the network's config has no sample_size, the side of its images; set it")
    size = (size, size) if isinstance(size, int) else tuple(size)
    had = training or {}
    rules = {key: had[key] for key in ("background", "crop") if key in had}
    to_pixels, resized = image_to_pixels(size, channels or unet.config.in_channels, levels, **rules), set()

    def noted(image):
        if levels <= 256 and image.mode.startswith("I;16"):
            raise ImageDoesNotFit(f"an image has 16 bits, levels is {levels}; give levels=65536, or data of 8 bits")
        if image.size != size[::-1]:
            resized.add(image.size)
        return to_pixels(image)

    classes = unet.num_classes
    data = training_set(dataset, noted, column, label_column, classes, had.get("label_names"), max_broken, memory=2**40)
    if resized:
        told = ", ".join(f"{width}x{height}" for width, height in sorted(resized)[:3])
        print(f"images of {told} were scaled and cut to {size[1]}x{size[0]}, the network's", file=sys.stderr)
    return pixels_to_tensor(data.tensors["pixels"], levels), data.tensors.get("class_labels")


def terms_table(result, chain):
    """CSV of a row for each timestep: its term in bits/dim with the standard error over images, and the errors there."""
    lines = ["t,bits_per_dim,standard_error,x_start_mse,epsilon_mse"]
    for column, t in enumerate(chain):
        term, *errors = (part[:, column] for part in (result.terms, result.x_start_mse, result.epsilon_mse))
        values = (term.double().mean(), standard_error(term), *(error.double().mean() for error in errors))
        lines.append(",".join([str(t), *(f"{float(value):.8g}" for value in values)]))
    return "\n".join([*lines, ""])


def plot(result, chain, path):
    """Every term over t, and rate against distortion (the paper's figure 5)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    terms = result.terms.mean(0).cpu()
    left.loglog([t + 1 for t in chain], terms)
    left.set_ylim(bottom=max(terms.min().item(), 1e-7 * terms.max().item()))  # a decoder of 1e-18 flattens the rest
    left.set(xlabel="t + 1 (the paper's t)", ylabel="term of the bound, bits/dim")
    rate, distortion = rate_distortion(result)
    right.plot(rate.cpu(), distortion.cpu())
    right.set(xlabel="rate, bits/dim", ylabel="distortion, RMSE of the predicted x_0 on 0..255", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    save_figure(figure, path)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pipeline", help="folder of a saved pipeline, or its id on the Hub")
    parser.add_argument("--data", default="digits", help="digits, mnist, a folder, a .parquet file or a Hub id")
    parser.add_argument("--split", default="test")
    parser.add_argument("--image_column")
    parser.add_argument("--label_column", help="for a class-conditional network")
    parser.add_argument(
        "--max_broken", type=float, default=0.0, help="share of images that may be left out as unreadable"
    )
    parser.add_argument("--images", type=int, help="how many images of the split; all if left out")
    parser.add_argument("--batch_size", type=int, default=128, help="images times timesteps a network call")
    parser.add_argument("--levels", type=int, help="grey levels of the data; those of the pipeline if left out")
    parser.add_argument("--steps", type=int, help="length of the chain; all timesteps if left out")
    parser.add_argument(
        "--first", type=int, default=0, metavar="T0", help="leave out the timesteps below: see bits_per_dim"
    )
    parser.add_argument("--estimate", type=int, metavar="N", help="estimate from N network evaluations an image")
    parser.add_argument(
        "--ode", action="store_true", help="by the probability-flow ODE in place of the bound: see ode_bits_per_dim"
    )
    parser.add_argument(
        "--dequantization", choices=DEQUANTIZATIONS, help="of --ode; decoder for a chain, uniform in continuous time"
    )
    parser.add_argument("--tolerance", type=float, default=1e-5, help="of the ODE's solver, absolute and relative")
    parser.add_argument("--probes", type=int, default=1, help="of the ODE's trace, for each image")
    parser.add_argument("--optimize", action="store_true", help="compile the network first, worth it for many images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--histogram", metavar="SPLIT", help="also fit a per-pixel histogram on this split")
    parser.add_argument("--out", help="folder to write to; the pipeline's own if it is one")
    arguments = parser.parse_args()

    if arguments.images is not None and arguments.images < 1:
        parser.error(f"--images {arguments.images} must be 1 or more")
    if arguments.first < 0:
        parser.error(f"--first {arguments.first} must be 0 or more")
    if arguments.ode and (arguments.estimate is not None or arguments.steps is not None or arguments.optimize):
        parser.error("--estimate, --steps and --optimize are of the bound; leave them out with --ode")
    if arguments.estimate is None and not arguments.ode:
        check_matplotlib("eval")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = DDPMImagePipeline.from_pretrained(arguments.pipeline).to(device)
    unet, scheduler = pipeline.unet, pipeline.scheduler
    if not arguments.ode and hasattr(scheduler, "sde"):
        parser.error(f"{type(scheduler).__name__} is in continuous time, where there is no bound; give --ode")
    if not arguments.ode or not hasattr(scheduler, "sde"):
        check_scheduler(scheduler)
        set_chain(scheduler, arguments.steps, arguments.first)
    elif arguments.first:
        parser.error(f"--first {arguments.first} is of a chain; {type(scheduler).__name__} has none")
    levels = scheduler.levels if arguments.levels is None else arguments.levels
    folder = Path(arguments.out or (arguments.pipeline if os.path.isdir(arguments.pipeline) else "."))
    own = folder.resolve() == Path(arguments.pipeline).resolve()  # not the folder one happens to be in
    our_card = own and has_our_card(folder)  # before evaluation.json, which it tells of
    data = (unet, levels)
    columns = (arguments.image_column, arguments.label_column)
    training = told_of(Path(arguments.pipeline)).get("training") if os.path.isdir(arguments.pipeline) else None
    x_start, labels = load_tensor(
        arguments.data, arguments.split, *data, arguments.images, *columns, training, arguments.max_broken
    )
    if arguments.optimize:
        unet = InferenceUNet(unet)
        print(unet.report)
    how = dict(
        class_labels=None if labels is None else labels.to(device),
        generator=torch.Generator(device).manual_seed(arguments.seed),
        batch_size=arguments.batch_size,
        levels=levels,
        progress_bar=True,
    )
    measure = by_ode if arguments.ode else by_bound
    result, measured, lines = measure(unet, scheduler, x_start.to(device), how, arguments)
    error = standard_error(result.total)
    report = {
        **measured,
        "standard_error": None if math.isnan(error) else error,
        "images": len(x_start),
        "data": Path(arguments.data).name if os.path.exists(arguments.data) else arguments.data,
        "split": arguments.split,
        "levels": levels,
        "seed": arguments.seed,
    }
    options = {"split": None, "images": None, "steps": None, "first": 0, "estimate": None, "levels": None}
    options |= {"ode": False, "dequantization": None, "tolerance": 1e-5, "probes": 1, "seed": 0}
    given = [
        (name, getattr(arguments, name)) for name, default in options.items() if getattr(arguments, name) != default
    ]
    told = " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in given)
    report["command"] = f"python training/evaluate.py pipeline --data {report['data']} {told}"
    if arguments.histogram:
        train, _ = load_tensor(
            arguments.data, arguments.histogram, *data, None, columns[0], None, training, arguments.max_broken
        )
        pixels = (tensor_to_pixels(x, levels) for x in (train, x_start))
        histogram = histogram_bits_per_dim(*pixels, levels)
        above = histogram - result.total.double().cpu()  # of the same images, so its error is smaller than theirs
        report["per_pixel_histogram"] = histogram.mean().item()
        beside = f"{above.mean():+.4f} +- {standard_error(above):.4f} from the total"
        lines.append(f"  an independent per-pixel histogram of {arguments.histogram}: {histogram.mean():.4f}, {beside}")

    print(f"bits/dim over {report['images']} images ({arguments.data}, {arguments.split}), {lines[0]}:")
    print("\n".join(lines[1:]))

    if own:
        report["weights"] = weights_digest(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "evaluation.json", json.dumps(report, indent=2) + "\n")
    every_term = hasattr(result, "terms")
    if every_term:
        write_text(folder / "evaluation.csv", terms_table(result, scheduler.chain))
        plot(result, scheduler.chain, folder / "evaluation.png")
    else:  # what an earlier evaluation left is not of this one
        (folder / "evaluation.csv").unlink(missing_ok=True)
        (folder / "evaluation.png").unlink(missing_ok=True)
    if our_card:
        write_model_card(folder)
    elif own and (folder / "README.md").is_file():
        print(f"{folder}/README.md is not as this package writes it, and stays as it is")
    print(f"wrote {folder}/evaluation.json" + (", .csv and .png" if every_term else ""))


def set_chain(scheduler, steps, first):
    """The chain of `steps` timesteps, all if None, without those below `first`."""
    if steps is not None:
        scheduler.set_timesteps(steps)
    if first > 0:
        timesteps = [t for t in reversed(scheduler.chain) if t >= first]
        if not timesteps:
            raise ValueError(f"--first {first} leaves no timestep of a chain that ends at {scheduler.chain[-1]}")
        scheduler.set_timesteps(timesteps=timesteps)


def by_bound(unet, scheduler, x_start, how, arguments):
    """The bound's result, what the report has of it, and lines to print: the first of them ends a heading."""
    measure = bits_per_dim
    if arguments.estimate is not None:
        measure = functools.partial(estimate_bits_per_dim, num_evaluations=arguments.estimate)
    result = measure(unet, scheduler, x_start, **how)
    parts = {"total": result.total, "prior": result.prior, "kl": result.kl, "decoder": result.decoder}
    errors = {name: standard_error(part) for name, part in parts.items()}
    report = {
        **{name: part.double().mean().item() for name, part in parts.items()},
        "standard_errors": None if math.isnan(errors["total"]) else errors,
        "steps": len(scheduler.chain),
        "first_timestep": scheduler.chain[0],
        "evaluations_per_image": arguments.estimate or len(scheduler.chain),
        "sampling_error": result.sampling_error if arguments.estimate else None,
    }
    lines = [f"{report['steps']} terms from t={report['first_timestep']} up"]
    for name, told in (
        ("total", "upper bound on the NLL"),
        ("prior", "L_T"),
        ("kl", "L_1 .. L_T-1"),
        ("decoder", "L_0"),
    ):
        lines.append(f"  {name:8} {report[name]:.4f} +- {errors[name]:.4f}   {told}")
    lines.append("  (+- is the standard error over images)")
    if arguments.estimate:
        told = f"{arguments.estimate} evaluations an image in place of {report['steps']}"
        lines.append(f"  estimated from {told}: +- {result.sampling_error:.4f} by that alone")
    return result, report, lines


def by_ode(unet, scheduler, x_start, how, arguments):
    """The same of the ODE."""
    tolerance = arguments.tolerance
    dequantization = arguments.dequantization or ("uniform" if hasattr(scheduler, "sde") else "decoder")
    if dequantization == "uniform" and arguments.first:
        raise ValueError(f"--first {arguments.first} is of --dequantization decoder; leave it out")
    how |= dict(rtol=tolerance, atol=tolerance, probes=arguments.probes, dequantization=dequantization)
    result = ode_bits_per_dim(unet, scheduler, x_start, **how)
    told = result.probe_error.square().sum().sqrt().item() / len(x_start)
    report = {
        "total": result.mean,
        "dequantization": dequantization,
        "tolerance": tolerance,
        "probes": arguments.probes,
        "sampling_error": None if math.isnan(told) else told,
        "evaluations_per_image": result.evaluations.double().mean().item(),
    }
    total = f"{result.mean:.4f} +- {result.standard_error:.4f}"
    lines = ["by the probability-flow ODE", f"  total    {total}   with {dequantization} dequantization"]
    lines.append("  (+- is the standard error over images, dequantization and probes together)")
    calls = f"{report['evaluations_per_image']:.0f} network calls an image, tolerance {tolerance:g}"
    lines.append(f"  {calls}" + ("" if math.isnan(told) else f"; +- {told:.4f} by the probes alone"))
    return result, report, lines


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError, OdeStopped, tarfile.TarError) as error:
        sys.exit(f"evaluate.py: {' '.join(str(error).split())}")
