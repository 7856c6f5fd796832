"""`ddpm-hf evaluate`: a saved pipeline and a data set -> bits/dim, by the variational bound or the probability-flow ODE.

With --metrics: samples and a data set -> FID and its kin, see cli/evaluate_samples.py.
"""

import argparse
import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path

from ddpm_hf.cli.parser import (
    SEED,
    Parser,
    check_path,
    choose_device,
    find_pipeline,
    hide_progress_in_logs,
    naming_options,
    number,
)
from ddpm_hf.cli.sampling import add_class_option, add_sampler_options
from ddpm_hf.extras import require_extra

DEQUANTIZATIONS = ("uniform", "decoder")  # of likelihood.ode, which is slow to import
BATCH = 128  # images per network call of bits/dim
OF_SAMPLES = (
    "samples",
    "reference",
    "extractor",
    "class_labels",
    "eta",
    "guidance_scale",
    "classifier_scale",
    "scheduler",
)
OF_BITS = ("histogram", "first", "estimate", "ode", "dequantization", "tolerance", "probes")
IMAGES = {
    "metavar": "IMAGES",
    "help": "a number: a fixed random subset of --data (all images); with --metrics also a folder, .npz or .parquet file: the "
    "generated images",
}
IMAGES_SPLIT = "test, or what the run held out of its only split; with --metrics, that of the training"
READING = ("image_column", "label_column", "max_broken", "max_image_pixels")  # options that `read_tensor` takes


def make_parser(program: str = "ddpm-hf evaluate") -> Parser:
    """The options of the command."""
    parser = Parser(
        program,
        "[PIPELINE] [--data DATA] [--OPTION VALUE ...]",
        "Measure how likely images of a data set are under a saved pipeline, in bits/dim: by the variational bound of Ho et "
        "al. 2020, term by term, or with --ode by the probability-flow ODE of Song et al. 2020. With --metrics, measure how "
        "good samples are: FID and its kin. Opens any DDPM folder or Hub id, diffusers' own included. Prints a table; writes "
        "evaluation.json, tables and pictures.",
        [
            ("runs/digits/pipeline", "bits/dim of the test split of its data set"),
            ("runs/digits/pipeline --data digits --images 64", "64 images, always the same"),
            ("runs/digits-vp/pipeline", "a model in continuous time: by the ODE"),
            ("google/ddpm-cifar10-32 --data uoft-cs/cifar10 --estimate 50", "50 network calls for each image"),
            (
                "runs/digits/pipeline --metrics fid,kid,prc --samples 50000",
                "50,000 samples against the training images, as in papers",
            ),
            ("runs/digits/pipeline --metrics fd --extractor efficientnet-lite0 --samples 2048", "without downloads"),
            ("--images samples/ --data my_folder/ --metrics fid,fd-dinov2", "images of any model against real ones"),
        ],
        section="scheduler",
    )
    add = parser.group("pipeline and output")
    add(
        "pipeline", metavar="PIPELINE", nargs="?", help="folder of a saved pipeline or of its run, or its id on the Hub"
    )
    add(
        "--out",
        metavar="FOLDER",
        help="folder to write to (the pipeline's, if a run of yours saved it; otherwise nothing is written)",
    )
    add("--histogram", metavar="SPLIT", help="compare with a per-pixel histogram of this split")
    add("-h", "--help", action="help", help="show this and stop")
    add_image_options(parser.group("images"), IMAGES)
    add = parser.group("quality of samples")
    add(
        "--metrics",
        metavar="LIST",
        help="fid, sfid, is, kid: of Inception features. fd, kd, prc, dc (Fréchet and kernel distance, precision and recall, "
        "density and coverage): of features of --extractor, or as fd-EXTRACTOR of another one",
    )
    add("--samples", type=number(int, 2), metavar="N", help="number of samples to draw, with the seeds from --seed on")
    add(
        "--reference",
        metavar="FILE",
        help="real images or their statistics, in place of --data: an .npz of ADM, pytorch-fid or score_sde",
    )
    add(
        "--extractor",
        metavar="NAME",
        default="inception",
        help="network of the features: inception, dinov2, clip, efficientnet-lite0, a TorchScript file (.pt), or "
        "module:function (%(default)s)",
    )
    add_class_option(add)
    add_sampler_options(add)
    add = parser.group("variational bound")
    add("--first", type=number(int, 0), metavar="T0", default=0, help="leave out the timesteps below T0 (%(default)s)")
    add("--estimate", type=number(int, 8), metavar="N", help="estimate from N network calls for each image, 8 or more")
    add = parser.group("probability-flow ODE")
    add("--ode", action="store_true", help="measure by the ODE instead of the bound; always in continuous time")
    add("--dequantization", choices=DEQUANTIZATIONS, help="uniform or decoder (decoder for a chain, else uniform)")
    add(
        "--tolerance",
        type=number(float, 1e-12, 1),
        metavar="TOL",
        default=1e-5,
        help="absolute and relative tolerance of the solver (%(default)s)",
    )
    add("--probes", type=number(int, 1), metavar="N", default=1, help="random probes per image (%(default)s)")
    add = parser.group("computation")
    add(
        "--steps",
        type=number(int, 1),
        metavar="N",
        help="timesteps of the bound, or with --metrics sampling steps (all timesteps; 50 for solvers)",
    )
    add("--optimize", action="store_true", help="compile the network first; pays off with many images")
    add(
        "--batch_size",
        type=number(int, 1),
        metavar="N",
        help=f"images per network call ({BATCH}; for samples the fastest number that fits into memory)",
    )
    add(
        "--seed",
        type=SEED,
        metavar="N",
        default=0,
        help="seed of the noise, or of the first sample; not of the subset of --images (%(default)s)",
    )
    add("--device", metavar="NAME", help="device, as torch names it (an accelerator if there is one)")
    return parser


def add_image_options(add: Callable, images: dict, split: str = IMAGES_SPLIT) -> None:
    """Add the options of the images of a data set, for `open_data` and `evaluation.images.read_tensor`.

    Args:
        add: `Parser.group`'s.
        images: arguments of the option --images.
        split: what --split is by default.
    """
    add(
        "--data",
        metavar="DATA",
        help="digits, mnist, a folder, a .parquet, .arrow or .tar file, or a Hub id (that of the training)",
    )
    add(
        "--split",
        metavar="SPLIT",
        help=f"split of --data ({split})",
    )
    add(
        "--held_out",
        type=number(float, 0, 1),
        metavar="SHARE",
        help="only the images that training with this --held_out set aside (as the run did)",
    )
    add(
        "--images",
        **images,
    )
    add("--image_column", metavar="NAME", help="column of the images (that of the training, or the only one)")
    add("--label_column", metavar="NAME", help="column of class labels (that of the training, or the only one)")
    add("--levels", type=number(int, 2, 65536), metavar="N", help="grey levels of the data (those of the pipeline)")
    add(
        "--max_broken",
        type=number(float, 0, 1),
        metavar="SHARE",
        default=0.0,
        help="share of images that may be unreadable (%(default)s)",
    )
    add("--max_image_pixels", type=number(int, 1), metavar="N", help="larger images are unreadable (Pillow's limit)")


def main(argv: list[str], program: str) -> None:
    parser = make_parser(program)
    arguments = parser.parse_args(argv)
    check_options(parser, arguments)
    if arguments.metrics is not None:
        from ddpm_hf.cli.evaluate_samples import run

        return run(parser, arguments, command_of)
    if arguments.ode and (arguments.estimate is not None or arguments.steps is not None or arguments.optimize):
        parser.error("--estimate, --steps and --optimize are of the bound; leave them out with --ode")
    require_extra("datasets", "data", "images of a data set")
    if arguments.estimate is None and not arguments.ode:
        require_extra("matplotlib", "eval", "plots")
    if arguments.ode:
        require_extra("torchdiffeq", "ode", "likelihoods by the ODE")
    arguments.pipeline = find_pipeline(program, arguments.pipeline)
    if arguments.data is not None:
        check_path(program, arguments.data, "data set")

    import torch

    from ddpm_hf.evaluation import images, likelihood_report, report_folder
    from ddpm_hf.fast.inference import InferenceUNet
    from ddpm_hf.pipelines.ddpm import DDPMImagePipeline

    hide_progress_in_logs()
    if arguments.out is not None:
        report_folder.check_out(arguments.out)
    device = choose_device(arguments.device)
    pipeline = DDPMImagePipeline.from_pretrained(arguments.pipeline).to(device)
    unet, scheduler = pipeline.unet, pipeline.scheduler
    open_chain(parser, arguments, scheduler)
    levels = scheduler.levels if arguments.levels is None else arguments.levels
    dataset, total, histogram_dataset = open_data(arguments, pipeline, levels)
    check_record(parser, arguments)
    reading = {name: getattr(arguments, name) for name in READING}
    x_start, labels = images.read_tensor(dataset, unet, levels, arguments.images, **reading, source=arguments.data)
    if histogram_dataset is not None:
        histogram_images, _ = images.read_tensor(histogram_dataset, unet, levels, **reading, with_labels=False)
    if arguments.optimize:
        unet = InferenceUNet(unet)
        print(unet.report)
    kwargs = dict(
        class_labels=None if labels is None else labels.to(device),
        generator=torch.Generator(device).manual_seed(arguments.seed),
        batch_size=arguments.batch_size or BATCH,
        levels=levels,
        progress_bar=True,
    )
    if arguments.ode:
        kwargs |= dict(dequantization=arguments.dequantization, tolerance=arguments.tolerance, probes=arguments.probes)
        report = likelihood_report.measure_ode(unet, scheduler, x_start.to(device), **kwargs)
    else:
        kwargs["num_evaluations"] = arguments.estimate
        report = likelihood_report.measure_bound(unet, scheduler, x_start.to(device), **kwargs)

    values, description = describe(parser, arguments, report, len(x_start), len(dataset), total)
    values["levels"] = levels
    lines = list(report.lines)
    if histogram_dataset is not None:
        values["per_pixel_histogram"], line = compare_with_histogram(
            report, histogram_images, x_start, levels, arguments.histogram
        )
        lines.append(line)
    print(f"bits/dim over {description} ({arguments.data}, {arguments.split}), {report.method}:")
    print("\n".join(lines))
    folder = report_folder.own_folder(arguments.pipeline) if arguments.out is None else Path(arguments.out)
    if folder is None:
        print("not written; give --out FOLDER for evaluation.json")
    else:
        chain = [] if arguments.ode else scheduler.chain
        report_folder.write_report(folder, arguments.pipeline, values, report, chain)


def check_options(parser: Parser, arguments: argparse.Namespace) -> None:
    """End the command for options of another measurement than the one that is asked for; read the number in --images."""
    given = {name for name, value in vars(arguments).items() if value != parser.get_default(name)}
    if arguments.metrics is None:
        if arguments.scheduler_settings:
            given.add("scheduler")
        for name in OF_SAMPLES:
            if name in given:
                parser.error(f"--{name} is for samples; give --metrics too, or leave it out")
        if arguments.pipeline is None:
            parser.error("give a PIPELINE: the folder of a saved pipeline, or its id on the Hub")
    else:
        for name in OF_BITS:
            if name in given:
                parser.error(f"--{name} is for bits/dim; leave it out with --metrics")
    if arguments.images is not None and (arguments.metrics is None or arguments.images.isdecimal()):
        try:
            arguments.images = number(int, 1)(arguments.images)
        except argparse.ArgumentTypeError as error:
            parser.error(f"argument --images: {error}")


def open_chain(parser: Parser, arguments: argparse.Namespace, scheduler) -> None:
    """Set the chain that the options ask for; end the command for a process that does not have what they ask for."""
    from ddpm_hf.evaluation.likelihood_report import set_chain
    from ddpm_hf.likelihood.bound import check_scheduler

    name, continuous = type(scheduler).__name__, getattr(scheduler, "is_continuous", False)
    if not arguments.ode and continuous:
        if arguments.estimate is not None or arguments.steps is not None or arguments.optimize:
            parser.error(f"{name} is in continuous time, where there is no bound; leave out what is of the bound")
        require_extra("torchdiffeq", "ode", "likelihoods by the ODE")
        arguments.ode = True
    if continuous and arguments.first:
        parser.error(f"--first {arguments.first} is of a chain; {name} has none")
    if not continuous:
        check_scheduler(scheduler)
        with naming_options(arguments, {"num_inference_steps": "--steps", "timesteps": "--timesteps"}):
            set_chain(scheduler, arguments.steps, arguments.first, arguments.timesteps)
    if arguments.ode and arguments.first and arguments.dequantization == "uniform":
        raise ValueError(f"--first {arguments.first} is of --dequantization decoder; leave it out")


def open_data(arguments: argparse.Namespace, pipeline, levels: int) -> tuple:
    """Return the images to measure, the size of their split, and the images of the histogram (None without one).

    Also sets --data, --split and --held_out if they were left out.
    """
    from ddpm_hf.data.dataset import held_out_rows
    from ddpm_hf.data.sources import check_levels, load_images
    from ddpm_hf.evaluation.report_folder import data_of, held_out_of, open_split

    if arguments.data is None:
        arguments.data = data_of(arguments.pipeline, pipeline.folder)
    check_levels(arguments.data, levels)
    folder = pipeline.folder or arguments.pipeline
    dataset, arguments.split = open_split(arguments.data, arguments.split, folder)
    total, histogram_dataset = len(dataset), None
    if arguments.held_out is None:
        arguments.held_out = held_out_of(folder, arguments.data, arguments.split, total) or None
    if arguments.histogram:
        histogram_dataset = load_images(arguments.data, arguments.histogram)
        if arguments.held_out and arguments.histogram == arguments.split:
            histogram_dataset = histogram_dataset.select(held_out_rows(arguments.held_out, len(histogram_dataset))[1])
    if arguments.held_out:
        dataset = dataset.select(held_out_rows(arguments.held_out, total)[0])
    return dataset, total, histogram_dataset


def check_record(parser: Parser, arguments: argparse.Namespace) -> None:
    """Raises ValueError, before anything is computed, for texts that evaluation.json cannot hold."""
    from ddpm_hf.files.guarded import check_values
    from ddpm_hf.hub.records import EVALUATION

    texts = recorded_texts(parser, arguments)
    check_values(texts, {key: EVALUATION[key] for key in texts}, Path("evaluation.json"), mend="shorten it")


def recorded_texts(parser: Parser, arguments: argparse.Namespace) -> dict[str, str]:
    """Data, split and command of evaluation.json."""
    from ddpm_hf.data.sources import public_name

    return {
        "data": public_name(arguments.data),
        "split": arguments.split,
        "command": command_of(parser, arguments),
    }


def command_of(parser: Parser, arguments: argparse.Namespace) -> str:
    """Return a shell command that repeats a measurement: data, split and every option that is not its default.

    --out is left out, as it changes nothing. Of absolute paths outside of the current folder only the last name is given.
    """
    from ddpm_hf.data.sources import public_path

    words = [*parser.command, *([] if arguments.pipeline is None else [public_path(arguments.pipeline)])]
    paths = {name: getattr(arguments, name) for name in ("data", "images", "reference")}
    paths = {name: public_path(path) for name, path in paths.items() if isinstance(path, str)}
    for name, value in (vars(arguments) | paths).items():
        is_needed = name in ("data", "split") and value is not None
        if name in ("pipeline", "out", "scheduler_settings", "scheduler.KEY") or (
            value == parser.get_default(name) and not is_needed
        ):
            continue
        if value is True:
            words.append(f"--{name}")
        else:
            words += [f"--{name}={value}"] if str(value).startswith("-") else [f"--{name}", str(value)]
    words += [f"--scheduler.{key}={json.dumps(value)}" for key, value in arguments.scheduler_settings.items()]
    return shlex.join(words)


def describe(parser, arguments, report, count: int, available: int, total: int) -> tuple[dict, str]:
    """The content of evaluation.json, and the images in words.

    Args:
        count: images that were measured; available: of which they were drawn; total: images of the split.
    """
    from ddpm_hf.evaluation.images import SUBSET_SEED

    texts, error = recorded_texts(parser, arguments), report.standard_error
    values = {
        **report.values,
        "standard_error": None if math.isnan(error) else error,
        "images": count,
        **texts,
        "held_out": arguments.held_out,
        "seed": arguments.seed,
    }
    description = f"{count} images"
    if arguments.images is not None and arguments.images < available:
        rows = f"numpy.random.default_rng({SUBSET_SEED}).permutation({available})[:{arguments.images}]"
        values["subset"] = {"of": available, "seed": SUBSET_SEED, "rows": rows}
        description = f"{count} of {available} images, a fixed random subset"
    if arguments.held_out:
        description += f" that held_out={arguments.held_out:g} sets aside of {total}"
    return values, description


def compare_with_histogram(report, train, test, levels: int, split: str) -> tuple[float, str]:
    """Bits/dim of the per-pixel histogram of `train`, and a line that compares it."""
    from ddpm_hf.data.pixels import tensor_to_pixels
    from ddpm_hf.evaluation.likelihood_report import histogram_bits_per_dim
    from ddpm_hf.likelihood.bound import standard_error

    histogram = histogram_bits_per_dim(tensor_to_pixels(train, levels), tensor_to_pixels(test, levels), levels)
    above = histogram - report.result.total.cpu().double()  # of the same images, so its error is smaller than theirs
    mean = histogram.mean().item()
    comparison = f"{above.mean():+.4f} +- {standard_error(above):.4f} from the total"
    return mean, f"  an independent per-pixel histogram of {split}: {mean:.4f}, {comparison}"
