"""A saved pipeline and a data set -> bits/dim: the variational bound of Ho, Jain, Abbeel 2020, term by term, or the ODE's.

    python training/evaluate.py runs/digits/pipeline --data digits --split test
    python training/evaluate.py google/ddpm-cifar10-32 --data uoft-cs/cifar10 --split test --estimate 50 --out measured
    python training/evaluate.py runs/digits-vp/pipeline --data digits --ode      # Score-SDE, section 4.3

Takes any DDPM folder or Hub id, diffusers' own included; networks of continuous time have --ode alone. Background, crop,
columns and names of the labels are those of the training, as the pipeline's config has them. Prints a table; writes
evaluation.json and, where every term was computed, each of them as evaluation.csv and the plot evaluation.png: into --out, or
beside the weights of a run of train.py, whose model card is brought up to date unless it was changed by hand.
"""

import argparse
import functools
import itertools
import json
import math
import os
import shlex
import sys
import tempfile
from pathlib import Path

import datasets
import numpy as np
import torch

from ddpm_hf.arguments import listed, shown
from ddpm_hf.data.dataset import PixelTensors, held_out_rows, training_set
from ddpm_hf.data.pixels import ImageDoesNotFit, image_to_pixels, pixels_to_tensor, tensor_to_pixels
from ddpm_hf.data.sources import BUILT_IN, check_levels, is_hub_id, load_images, public_name
from ddpm_hf.evaluation.sheets import save_figure
from ddpm_hf.extras import require_extra
from ddpm_hf.fast.inference import InferenceUNet
from ddpm_hf.files.atomic import write_text
from ddpm_hf.files.guarded import check_values
from ddpm_hf.hub.card import has_our_card, write_model_card
from ddpm_hf.hub.records import EVALUATION, read_record, weights_digest
from ddpm_hf.likelihood.bound import bits_per_dim, check_scheduler, rate_distortion, standard_error
from ddpm_hf.likelihood.estimate import estimate_bits_per_dim
from ddpm_hf.likelihood.ode import DEQUANTIZATIONS, ode_bits_per_dim
from ddpm_hf.pipelines.ddpm import DDPMImagePipeline

if not sys.stderr.isatty():
    datasets.disable_progress_bars()  # a log would have a line of each of their changes


SUBSET_SEED = 0  # of --images: another --seed draws other noise, but measures the same images


REPORT, TERMS = "evaluation.json", ("evaluation.csv", "evaluation.png")


READING = "image_column", "label_column", "max_broken", "max_image_pixels"  # options that `read_tensor` takes


PROGRAM = "python training/evaluate.py"


def histogram_bits_per_dim(train: torch.Tensor, test: torch.Tensor, levels: int) -> torch.Tensor:
    """Bits/dim, (N,) float64, of the model that draws each pixel on its own from its histogram over `train` (add-one smoothed).

    train, test: grey levels 0 .. levels - 1, (N, C, H, W) each, integers. A yardstick: a model that has learned how pixels go
    together is below it.
    """
    counts = torch.ones(levels, *train.shape[1:], dtype=torch.float64)
    counts.scatter_add_(0, train.long(), torch.ones(train.shape, dtype=torch.float64))
    log_probabilities = torch.log2(counts / counts.sum(0))
    return -log_probabilities.gather(0, test.long()).flatten(1).mean(1)


def load_tensor(source: str, split: str, unet, levels: int, count: int | None = None, **kwargs) -> tuple:
    """x_start (N, C, H, W) of a data set, and labels (N,) or None, by `load_images` and `read_tensor`."""
    check_levels(source, levels)
    return read_tensor(load_images(source, split), unet, levels, count, **kwargs)


def read_tensor(
    dataset: datasets.Dataset,
    unet,
    levels: int,
    count: int | None = None,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    max_broken: float = 0.0,
    max_image_pixels: int | None = None,
    channels: int | None = None,
    with_labels: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Images as the network was trained on them (`unet.preprocessing`), at its size; labels by `unet.class_names`.

    Args:
        levels: grey levels of the data.
        count: of fewer images than there are, a random subset is read, the same one each time: `subset_rows`. Those that cannot
            be read do not count.
        image_column, label_column: None for those of the training where the data has them, else the only ones.
        max_broken, max_image_pixels: see `training_set`.
        channels: of the images; None for those that the network takes.
        with_labels: False for the images alone.

    Returns:
        x_start (N, C, H, W), float32 in [-1, 1], and labels int64 (N,) for a class-conditional network, else None.

    Raises:
        ValueError: data that does not fit: its columns, labels or grey levels, or broken images.
    """
    size = unet.config.sample_size
    if size is None:
        raise ValueError("the network's config has no sample_size, the side of its images; set it")
    size = (size, size) if isinstance(size, int) else tuple(size)
    trained = unet.preprocessing
    rules = {key: trained[key] for key in ("background", "crop") if key in trained}
    to_pixels, resized = image_to_pixels(size, channels or unet.config.in_channels, levels, **rules), set()
    if image_column is None and trained.get("image_column") in dataset.column_names:
        image_column = trained["image_column"]
    label_column = label_column_of(dataset, unet, label_column) if with_labels else None

    def noted(image):
        if levels <= 256 and image.mode.startswith("I;16"):
            raise ImageDoesNotFit(f"an image has 16 bits, levels is {levels}; give levels=65536, or data of 8 bits")
        if image.size != size[::-1]:
            resized.add(image.size)
        return to_pixels(image)

    columns = image_column, label_column, unet.num_classes, unet.class_names
    limits = dict(max_broken=max_broken, max_image_pixels=max_image_pixels)
    images = training_set(dataset, noted, *columns, memory=0, **limits)
    if count is None or count >= len(images):
        images = images.in_memory()
    else:
        items = list(itertools.islice(images.readable(subset_rows(len(images))), count))
        if not items:
            raise ValueError("no image of the data can be read")
        images = PixelTensors.of(items)
    if resized:
        sizes = ", ".join(f"{width}x{height}" for width, height in sorted(resized)[:3])
        print(f"images of {sizes} were scaled and cut to {size[1]}x{size[0]}, the network's", file=sys.stderr)
    return pixels_to_tensor(images.tensors["pixels"], levels), images.tensors.get("class_labels")


def subset_rows(total: int) -> np.ndarray:
    """All row numbers in a random order, always the same: the first N of them are the subset of N images."""
    return np.random.default_rng(SUBSET_SEED).permutation(total)


def label_column_of(dataset: datasets.Dataset, unet, column: str | None = None) -> str | None:
    """The column of labels for a class-conditional network, None for another.

    It is `column` if given, else that of the training if the data has it, else the only `ClassLabel`, else "label".

    Raises:
        ValueError: no such column, or a column for a network that is not class-conditional.
    """
    if unet.class_embedding is None:
        if column is not None:
            raise ValueError(f"label_column={column!r}, but the network is not class-conditional; leave it out")
        return None
    if column is not None:
        return column
    labeled = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)]
    for name in (unet.preprocessing.get("label_column"), labeled[0] if len(labeled) == 1 else None, "label"):
        if name in dataset.column_names:
            return name
    raise ValueError(
        f"the network is class-conditional: give label_column, the labels among {listed(dataset.column_names)}"
    )


def terms_table(result, chain):
    """CSV of a row for each timestep: its term in bits/dim with the standard error over images, and the errors there."""
    lines = ["t,bits_per_dim,standard_error,x_start_mse,epsilon_mse"]
    for column, t in enumerate(chain):
        term, *errors = (part[:, column] for part in (result.terms, result.x_start_mse, result.epsilon_mse))
        values = (term.cpu().double().mean(), standard_error(term), *(error.cpu().double().mean() for error in errors))
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


def number(kind: type, low: float, high: float = math.inf):
    """For argparse: reads a finite number of this type, `low` to `high`."""

    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or value == math.inf:
            name = "an integer" if kind is int else "a number"
            end = " or more" if high == math.inf else f" to {high}"
            raise argparse.ArgumentTypeError(f"{text[:40]} must be {name}, {low}{end}")
        return value

    return read


SEED = number(int, -(2**63), 2**64 - 1)  # what torch takes


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pipeline", help="folder of a saved pipeline, or its id on the Hub")
    parser.add_argument(
        "--data",
        help="digits, mnist, a folder of images, a .parquet, .arrow or .tar file or a folder of these, a save_to_disk "
        "folder, or a Hub id; if left out, what it was trained on by training.json, digits without one",
    )
    parser.add_argument("--split", default="test", help="of --data (%(default)s)")
    parser.add_argument(
        "--held_out",
        type=number(float, 0, 1),
        metavar="SHARE",
        help="only what train.py --held_out SHARE set aside of the split; if left out, as the run did with the same data",
    )
    parser.add_argument("--image_column", help="if left out, that of the training, or the only one")
    parser.add_argument(
        "--label_column", help="for a class-conditional network; if left out, that of the training, or the only one"
    )
    parser.add_argument(
        "--max_broken",
        type=number(float, 0, 1),
        default=0.0,
        help="share of images that may be left out as unreadable (%(default)s)",
    )
    parser.add_argument(
        "--max_image_pixels", type=number(int, 1), help="larger images count as unreadable; Pillow's limit if left out"
    )
    parser.add_argument(
        "--images",
        type=number(int, 1),
        help="how many images of the split, always the same random ones; all if left out",
    )
    parser.add_argument(
        "--batch_size", type=number(int, 1), default=128, help="images times timesteps a network call (%(default)s)"
    )
    parser.add_argument(
        "--levels", type=number(int, 2, 65536), help="grey levels of the data; those of the pipeline if left out"
    )
    parser.add_argument("--steps", type=number(int, 1), help="length of the chain; all timesteps if left out")
    parser.add_argument(
        "--first",
        type=number(int, 0),
        default=0,
        metavar="T0",
        help="leave out the timesteps below: see bits_per_dim (%(default)s)",
    )
    parser.add_argument(
        "--estimate", type=number(int, 8), metavar="N", help="estimate from N network evaluations an image, 8 or more"
    )
    parser.add_argument(
        "--ode", action="store_true", help="by the probability-flow ODE in place of the bound: see ode_bits_per_dim"
    )
    parser.add_argument(
        "--dequantization", choices=DEQUANTIZATIONS, help="of --ode; decoder for a chain, uniform in continuous time"
    )
    parser.add_argument(
        "--tolerance",
        type=number(float, 1e-12, 1),
        default=1e-5,
        help="of the ODE's solver, absolute and relative (%(default)s)",
    )
    parser.add_argument(
        "--probes", type=number(int, 1), default=1, help="random probes per image for the ODE's trace (%(default)s)"
    )
    parser.add_argument("--optimize", action="store_true", help="compile the network first, worth it for many images")
    parser.add_argument(
        "--seed", type=SEED, default=0, help="of the noise; the images of --images do not depend on it (%(default)s)"
    )
    parser.add_argument("--histogram", metavar="SPLIT", help="also fit a per-pixel histogram on this split")
    parser.add_argument("--device", help="as torch calls it; an accelerator if left out, where there is one")
    parser.add_argument("--out", help="folder to write to; if left out, that of a run's own pipeline, or none")
    return parser


def command_of(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> str:
    """A shell command that measures the same again: data, split and every option that is not its default.

    --out is left out, as it changes nothing. Of local paths it has the last name only; the reader puts their own in.
    """
    words = [*PROGRAM.split(), public_name(arguments.pipeline)]
    for name, value in (vars(arguments) | {"data": public_name(arguments.data)}).items():
        if name in ("pipeline", "out") or (value == parser.get_default(name) and name not in ("data", "split")):
            continue
        if value is True:
            words.append(f"--{name}")
        else:
            words += [f"--{name}={value}"] if str(value).startswith("-") else [f"--{name}", str(value)]
    return shlex.join(words)


def choose_device(name: str | None) -> str:
    """The device of this name, or the accelerator, or else the CPU.

    Raises:
        ValueError: torch does not have it.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name} cannot be used: {str(error).strip().splitlines()[0]}") from None
    return name


def data_of(pipeline: str, folder: Path | None = None) -> str:
    """The built-in or Hub data set that a pipeline's training.json says that it was trained on; digits without a training.json.

    folder: the snapshot that a pipeline of the Hub was opened from.

    Raises ValueError where the data was a local path or has no id of the Hub, and for a training.json not of train.py.
    """
    told = _training_of(folder or pipeline) or {"data": "digits"}
    data = told.get("data") if told.get("data") in BUILT_IN else told.get("hub_dataset")
    if data is None:
        raise ValueError(f"{pipeline} was trained on {shown(told['data'])}, a local folder or file; give --data")
    if data not in BUILT_IN and not is_hub_id(data):  # a stranger does not choose which files are read
        raise ValueError(
            f"{pipeline}: hub_dataset={shown(data)} in its training.json is not the id of a data set on the Hub; give --data"
        )
    return data


def held_out_of(pipeline: str | Path, data: str, split: str, images: int | None = None) -> float:
    """The share of this split that the run of a pipeline's folder set aside; 0 of other data than it was trained on.

    images: how many the split has. Of another number than in the training other images would be set aside, so it is 0, too.

    Raises ValueError for a training.json that train.py does not write.
    """
    told = _training_of(pipeline)
    if (told.get("data"), told.get("split")) != (public_name(data), split) or not told["held_out"]:
        return 0.0
    if None not in (images, told["images"]) and images != told["images"]:
        print(
            f"the run set aside held_out={told['held_out']:g} of {told['images']} images, but {data} has {images}: all are "
            "measured, those that it was trained on too",
            file=sys.stderr,
        )
        return 0.0
    return told["held_out"]


def _training_of(pipeline):
    path = Path(pipeline) / "training.json"
    return read_record(path, path.parent) if path.is_file() else {}


def check_out(out: str) -> None:
    """Whether an evaluation may be written to this folder: before it is computed.

    Raises:
        ValueError: it is no folder, cannot be written to, or holds files of these names that no evaluation has written.
    """
    folder = Path(out)
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder")
    if not folder.absolute().parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {folder.absolute().parent}; make it first")
    if not is_writable(folder if folder.exists() else folder.absolute().parent):
        raise ValueError(f"--out {out} may not be written to; give another folder")
    others = [name for name in (REPORT, *TERMS) if os.path.lexists(folder / name) and name not in _written(folder)]
    if others:
        raise ValueError(
            f"--out {out} holds {others[0]}, which is not of an evaluation; move it, or give another folder"
        )


def _written(folder):
    """The files that an earlier evaluation has written to a folder."""
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        ours = report["command"].startswith(f"{PROGRAM} ")
        every_term = "kl" in report and report["sampling_error"] is None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ()
    return (REPORT, *TERMS) if ours and every_term else (REPORT,) if ours else ()


def own_folder(pipeline: str) -> Path | None:
    """The folder of a pipeline that a run of this user's has saved; None for any other, in which nothing is written unasked."""
    folder = Path(pipeline).resolve()
    files = [folder / "model_index.json", folder.parent / "config.yaml", folder.parent / "environment.json"]
    whole = folder.name == "pipeline" and all(path.is_file() for path in files)
    own = whole and all(path.stat().st_uid == os.geteuid() for path in files if hasattr(os, "geteuid"))
    return folder if own and is_writable(folder) else None


def is_writable(folder: Path) -> bool:
    """Whether a file can be made in a folder: tried out, as permissions alone do not tell."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def main(argv: list[str]):
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if arguments.ode and (arguments.estimate is not None or arguments.steps is not None or arguments.optimize):
        parser.error("--estimate, --steps and --optimize are of the bound; leave them out with --ode")
    if arguments.out is not None:
        check_out(arguments.out)
    if arguments.estimate is None and not arguments.ode:
        require_extra("matplotlib", "eval", "plots")
    device = choose_device(arguments.device)
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
    if arguments.data is None:
        arguments.data = data_of(arguments.pipeline, pipeline.folder)
    check_levels(arguments.data, levels)
    dataset = whole = load_images(arguments.data, arguments.split)
    if arguments.held_out is None:
        opened = pipeline.folder or arguments.pipeline
        arguments.held_out = held_out_of(opened, arguments.data, arguments.split, len(whole)) or None
    if arguments.held_out:
        dataset = whole.select(held_out_rows(arguments.held_out, len(whole))[0])
    told = {"data": public_name(arguments.data), "split": arguments.split, "command": command_of(parser, arguments)}
    check_values(told, {key: EVALUATION[key] for key in told}, REPORT, mend="shorten it")
    columns = {name: getattr(arguments, name) for name in READING}
    x_start, labels = read_tensor(dataset, unet, levels, arguments.images, **columns)
    if arguments.histogram:
        rest = load_images(arguments.data, arguments.histogram)
        if arguments.held_out and arguments.histogram == arguments.split:
            rest = rest.select(held_out_rows(arguments.held_out, len(rest))[1])
        train, _ = read_tensor(rest, unet, levels, **columns, with_labels=False)
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
        "data": told["data"],
        "split": arguments.split,
        "held_out": arguments.held_out,
        "levels": levels,
        "seed": arguments.seed,
    }
    total, images = len(dataset), f"{len(x_start)} images"
    if arguments.images is not None and arguments.images < total:
        rows = f"numpy.random.default_rng({SUBSET_SEED}).permutation({total})[:{arguments.images}]"
        report["subset"] = {"of": total, "seed": SUBSET_SEED, "rows": rows}
        images = f"{len(x_start)} of {total} images, a fixed random subset"
    if arguments.held_out:
        images += f" that held_out={arguments.held_out:g} sets aside of {len(whole)}"
    report["command"] = told["command"]
    if arguments.histogram:
        pixels = (tensor_to_pixels(x, levels) for x in (train, x_start))
        histogram = histogram_bits_per_dim(*pixels, levels)
        above = histogram - result.total.cpu().double()  # of the same images, so its error is smaller than theirs
        report["per_pixel_histogram"] = histogram.mean().item()
        beside = f"{above.mean():+.4f} +- {standard_error(above):.4f} from the total"
        lines.append(f"  an independent per-pixel histogram of {arguments.histogram}: {histogram.mean():.4f}, {beside}")

    print(f"bits/dim over {images} ({arguments.data}, {arguments.split}), {lines[0]}:")
    print("\n".join(lines[1:]))
    folder = own_folder(arguments.pipeline) if arguments.out is None else Path(arguments.out)
    if folder is None:
        print("not written; give --out FOLDER for evaluation.json")
    else:
        write(folder, arguments.pipeline, report, result, scheduler)


def write(folder: Path, pipeline: str, report: dict, result, scheduler) -> None:
    """Writes an evaluation in place of an earlier one; in the pipeline's own folder its model card too."""
    own = os.path.isdir(pipeline) and folder.resolve() == Path(pipeline).resolve()
    our_card = own and has_our_card(folder)  # before evaluation.json, which it tells of
    if own:
        report = {**report, "weights": weights_digest(folder)}
    folder.mkdir(exist_ok=True)
    for name in TERMS if folder == own_folder(pipeline) else _written(folder)[1:]:  # of other numbers
        (folder / name).unlink(missing_ok=True)
    write_text(folder / REPORT, json.dumps(report, indent=2) + "\n")
    every_term = hasattr(result, "terms")
    if every_term:
        write_text(folder / TERMS[0], terms_table(result, scheduler.chain))
        plot(result, scheduler.chain, folder / TERMS[1])
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
        **{name: part.cpu().double().mean().item() for name, part in parts.items()},
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
