"""`ddpm-hf sample`: a saved pipeline -> a sheet of samples, or a file for each of thousands."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ddpm_hf.cli.animation import add_animation_options, check_animation_options, write_animation
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
from ddpm_hf.cli.sampling import (
    OPTIONS,
    add_batch_option,
    add_class_option,
    add_sampler_options,
    class_rule,
    sampler_of,
)
from ddpm_hf.extras import require_extra

COUNT = 64  # samples of a sheet, unless told
ON_SHEETS = ("progressive", "interpolate")
IN_FILES = ("seeds", "batch_size")


def make_parser(program: str = "ddpm-hf sample") -> Parser:
    """The options of the command."""
    parser = Parser(
        program,
        "PIPELINE [--out FILE] [--OPTION VALUE ...]",
        "Draw samples from a saved pipeline: one picture with a sheet of them, or single images by the thousand. A single "
        "image depends on its seed, not on the batch size or the number of processes. An interrupted command resumes when it "
        "is given again. To use several GPUs: torchrun --nproc_per_node 8 -m ddpm_hf sample ...",
        [
            ("runs/digits-classes/pipeline --count 60", "a sheet of 60, a column for each class"),
            ("runs/digits/pipeline --steps 50 --eta 0", "DDIM, 50 steps"),
            ("runs/digits/pipeline --count 50000 --out samples/", "50,000 PNG files"),
            ("runs/digits/pipeline --seeds 0-49999 --out samples.npz", "one file, as ADM's evaluation reads"),
            ("runs/digits/pipeline --count 8 --progressive 12", "8 samples, each at 12 timesteps"),
            ("runs/digits/pipeline --count 8 --interpolate 500", "mixtures of real images"),
            ("runs/digits/pipeline --steps 50 --eta 0 --animation out.gif", "the denoising as a moving picture"),
            ("runs/mnist-8-32/pipeline --count 16 --data mnist", "real images, upsampled"),
        ],
        section="scheduler",
    )
    add = parser.group("pipeline and output")
    add("pipeline", metavar="PIPELINE", help="folder of a saved pipeline or of its run, or its id on the Hub")
    add(
        "--out",
        metavar="FILE",
        default="samples.png",
        help="a picture, such as sheet.png, gets a sheet; a folder (samples/, with the slash), a .npz or a .parquet file gets "
        "single images (%(default)s)",
    )
    add("-h", "--help", action="help", help="show this and stop")
    add = parser.group("what to draw")
    add(
        "--count",
        type=number(int, 1),
        metavar="N",
        help=f"number of samples; with --progressive and --interpolate, of rows ({COUNT})",
    )
    add_class_option(add)
    add(
        "--progressive",
        type=number(int, 2),
        metavar="N",
        help="a row for each sample: its predicted x_0 at N timesteps",
    )
    add("--interpolate", type=number(int, 0), metavar="T", help="a row for each pair of images, mixed at timestep T")
    add = parser.group("how to sample")
    add("--steps", type=number(int, 1), metavar="N", help="sampling steps (all timesteps; 50 for solvers)")
    add_sampler_options(add)
    add("--optimize", action="store_true", help="compile the network first; pays off with many steps")
    add("--seed", type=SEED, metavar="N", default=0, help="seed of a sheet, or of the first single image (%(default)s)")
    add("--device", metavar="NAME", help="device, as torch names it (an accelerator if there is one)")
    add = parser.group("single images")
    add("--seeds", metavar="SEEDS", help="draw these seeds: 0-49999, or 0-9,20 (as many as --count, from --seed on)")
    add_batch_option(add)
    add_animation_options(parser.group("a moving picture"))
    add = parser.group("images of a data set, for --interpolate and for upsamplers")
    add("--data", metavar="DATA", help="digits, mnist, a folder, a file or a Hub id (the data set of the training)")
    add("--split", metavar="SPLIT", default="test", help="split of --data (%(default)s)")
    add("--label_column", metavar="NAME", help="column of class labels (that of the training, or the only one)")
    add(
        "--noise_level",
        type=number(float, 0, 1),
        metavar="LEVEL",
        default=0.0,
        help="noise added to the small images that an upsampler enlarges, 0 to 1 (%(default)s)",
    )
    return parser


def main(argv: list[str], program: str) -> None:
    parser = make_parser(program)
    arguments = parser.parse_args(argv)
    if arguments.progressive is not None and arguments.interpolate is not None:
        parser.error("--progressive and --interpolate make two sheets; give one of them")
    in_files = is_for_single_images(arguments.out)
    check_output_options(parser, arguments, in_files)
    if arguments.animation is not None:
        check_animation_options(parser, arguments)
    elif not in_files:
        check_out(arguments.out)
    device = choose_device(arguments.device)
    arguments.pipeline = find_pipeline(program, arguments.pipeline)
    if arguments.data is not None:
        check_path(program, arguments.data, "data set")

    from ddpm_hf.evaluation.generation import stages_of
    from ddpm_hf.evaluation.processes import Processes
    from ddpm_hf.evaluation.samples import open_pipeline
    from ddpm_hf.evaluation.scheduler_by_name import use_scheduler

    hide_progress_in_logs()
    processes = Processes.launched()
    pipeline = open_pipeline(arguments.pipeline).to(
        processes.device if arguments.device is None and processes.device else device
    )
    pipeline.set_progress_bar_config(disable=None)  # no bars in logs
    stages = stages_of(pipeline)
    check_combinations(parser, arguments, pipeline)
    if arguments.scheduler or arguments.scheduler_settings:
        use_scheduler(pipeline, arguments.scheduler, arguments.scheduler_settings)
    rule = class_rule(parser, pipeline, arguments.class_labels)
    if arguments.optimize:
        for stage in stages:
            print(stage.optimize())
    with naming_options(arguments, {**OPTIONS, "timestep": "--interpolate", "what": "--show"}):
        if in_files:
            draw_files(pipeline, arguments, rule, processes)
        elif not processes.is_main:
            pass  # one picture is drawn by one process
        elif arguments.animation is not None:
            write_animation(parser, pipeline, arguments, rule, arguments.count or COUNT)
        else:
            draw_sheet(parser, pipeline, arguments, rule)
    processes.leave()


def is_for_single_images(out: str) -> bool:
    """Whether an output is a folder (it ends with / or holds samples), an .npz or a .parquet file; if not, it is a picture."""
    path = Path(out)
    return out.endswith(("/", os.sep)) or path.suffix in (".npz", ".parquet") or (path / "samples.json").is_file()


def check_output_options(parser: Parser, arguments: argparse.Namespace, in_files: bool) -> None:
    """End the command for options that the kind of output does not have."""
    for name in ON_SHEETS if in_files else IN_FILES:
        if getattr(arguments, name) is not None:
            kind = "a sheet; give --out FILE.png" if in_files else "single images; give --out FOLDER/, .npz or .parquet"
            parser.error(f"--{name} is for {kind}")
    if arguments.seeds is not None and arguments.count is not None:
        parser.error("--seeds and --count both say how many; give one of them")
    if Path(arguments.out).suffix == ".parquet":
        require_extra("datasets", "data", "image data sets")


def draw_files(pipeline, arguments: argparse.Namespace, rule: str | int, processes) -> None:
    """Draw single images into a folder or file."""
    from ddpm_hf.data.sources import public_path
    from ddpm_hf.evaluation.generation import generate
    from ddpm_hf.evaluation.seeds import parse_seeds, seeds_from
    from ddpm_hf.models.conditioning import downsample
    from ddpm_hf.pipelines.super_resolution import DDPMSuperResolutionPipeline

    if arguments.seeds is None:
        seeds: Sequence[int] = seeds_from(arguments.seed, arguments.count or COUNT)
    else:
        seeds = parse_seeds(arguments.seeds)
    of_stages = {}
    if isinstance(pipeline, DDPMSuperResolutionPipeline):
        x_start, labels = load_images_of(arguments, pipeline, None, channels=pipeline.channels)
        small = downsample(x_start, tuple(pipeline.config.low_resolution))
        of_stages = dict(low_resolution=small, low_resolution_labels=labels)
    if of_stages or hasattr(pipeline, "upsampler"):
        of_stages["noise_level"] = arguments.noise_level
    try:
        out = generate(
            pipeline,
            seeds,
            arguments.out,
            batch_size=arguments.batch_size,
            name=public_path(arguments.pipeline),
            processes=processes,
            class_labels=rule,
            **sampler_of(arguments),
            **of_stages,
        )
    except KeyboardInterrupt:
        sys.exit(f"{arguments.out}: interrupted; the same command goes on from here")
    if processes.is_main:
        print(f"wrote {out}, {len(seeds):,} image{'s' * (len(seeds) > 1)}")


def draw_sheet(parser: Parser, pipeline, arguments: argparse.Namespace, rule: str | int) -> None:
    """Draw a sheet into a picture."""
    import torch

    from ddpm_hf.evaluation.generation import stages_of
    from ddpm_hf.evaluation.sheets import check_picture, save_picture

    check_picture(arguments.out, stages_of(pipeline)[0].channels)
    if rule == "random":
        parser.error("--class_labels random is for single images; give --out FOLDER/, .npz or .parquet")
    label = rule if isinstance(rule, int) else None
    generator = torch.Generator(pipeline.device).manual_seed(arguments.seed)
    arguments.count = arguments.count or COUNT
    sheet = draw(pipeline, arguments, label, {"generator": generator, **sampler_of(arguments)})
    save_picture(sheet.picture(), arguments.out)
    print(f"wrote {arguments.out}")


def check_out(out: str) -> None:
    """Check, before anything is opened, that a sheet may be written to this file.

    Raises:
        ValueError: a folder that does not exist or is not writable, or an ending that no picture has.
    """
    from ddpm_hf.evaluation.sheets import picture_format
    from ddpm_hf.files.atomic import is_writable

    path = Path(out)
    if path.is_dir():
        raise ValueError(f"--out {out} is a folder; give a file, or end it with / for single images")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--out {out}: there is no such folder")
    if not is_writable(path.absolute().parent):
        raise ValueError(f"--out {out}: its folder may not be written to; give another one")
    picture_format(path)


def check_combinations(parser: Parser, arguments: argparse.Namespace, pipeline) -> None:
    """End the command with a message for options that the pipeline does not have."""
    from ddpm_hf.pipelines.cascade import CascadePipeline
    from ddpm_hf.pipelines.super_resolution import DDPMSuperResolutionPipeline

    if isinstance(pipeline, (CascadePipeline, DDPMSuperResolutionPipeline)):
        if (arguments.progressive, arguments.interpolate) != (None, None):
            parser.error(f"--progressive and --interpolate are not for a {type(pipeline).__name__}")
    elif arguments.noise_level:
        parser.error(f"--noise_level {arguments.noise_level} is of an upsampler, which this pipeline does not have")


def draw(pipeline, arguments: argparse.Namespace, class_label: int | None, sampling: dict):
    """The `SampleSheet` that the options ask for."""
    import torch

    from ddpm_hf.evaluation import samples
    from ddpm_hf.pipelines.cascade import CascadePipeline
    from ddpm_hf.pipelines.super_resolution import DDPMSuperResolutionPipeline

    count, noise_level = arguments.count, arguments.noise_level
    if isinstance(pipeline, CascadePipeline):
        return samples.draw_cascade(pipeline, count, class_label, noise_level, **sampling)
    if isinstance(pipeline, DDPMSuperResolutionPipeline):
        x_start, labels = load_images_of(arguments, pipeline, count, channels=pipeline.channels)
        if class_label is not None:
            labels = torch.full((len(x_start),), class_label)
        return samples.draw_upsampled(pipeline, x_start, labels, noise_level, **sampling)
    if arguments.interpolate is not None:
        x_start, _ = load_images_of(arguments, pipeline, 2 * count, with_labels=False)
        if len(x_start) < 2 * count:
            raise ValueError(f"--count {count} needs two images a row; --data has {len(x_start)}")
        return samples.draw_interpolations(pipeline, x_start, arguments.interpolate, class_label, **sampling)
    if arguments.progressive is not None:
        return samples.draw_denoising(pipeline, count, arguments.progressive, class_label, **sampling)
    return samples.draw_samples(pipeline, count, class_label, **sampling)


def load_images_of(arguments: argparse.Namespace, pipeline, count: int | None, **kwargs):
    """Images and labels of --data, or of the data set that the pipeline was trained on; `kwargs` are those of `read_tensor`."""
    require_extra("datasets", "data", "images of a data set")
    from ddpm_hf.evaluation.images import load_tensor
    from ddpm_hf.evaluation.report_folder import data_of

    hide_progress_in_logs()
    source = arguments.data or data_of(arguments.pipeline, pipeline.folder)
    levels = getattr(pipeline.scheduler, "levels", 256)
    if kwargs.get("with_labels", True):
        kwargs["label_column"] = arguments.label_column
    return load_tensor(source, arguments.split, pipeline.unet, levels, count, **kwargs)
