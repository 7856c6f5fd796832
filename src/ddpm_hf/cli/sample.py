"""`ddpm-hf sample`: a saved pipeline -> a sheet of samples."""

import argparse
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
from ddpm_hf.extras import require_extra

# argument of a pipeline -> the option that sets it, for messages
OPTIONS = {
    "num_inference_steps": "--steps",
    "class_labels": "--class_label",
    "timestep": "--interpolate",
    **{name: f"--{name}" for name in ("eta", "guidance_scale", "classifier_scale", "noise_level")},
}


def make_parser(program: str = "ddpm-hf sample") -> Parser:
    """The options of the command."""
    parser = Parser(
        program,
        "PIPELINE [--out FILE] [--OPTION VALUE ...]",
        "Draw a sheet of samples from a saved pipeline.",
        [
            ("runs/digits-classes/pipeline --count 60", "60 samples, a column for each class"),
            ("runs/digits/pipeline --steps 50 --eta 0", "DDIM, 50 steps"),
            ("runs/digits/pipeline --count 8 --progressive 12", "8 samples, each at 12 timesteps"),
            ("runs/digits/pipeline --count 8 --interpolate 500", "mixtures of real images"),
            ("runs/mnist-8-32/pipeline --count 16 --data mnist", "real images, upsampled"),
        ],
    )
    add = parser.group("pipeline and output")
    add("pipeline", metavar="PIPELINE", help="folder of a saved pipeline or of its run, or its id on the Hub")
    add("--out", metavar="FILE", default="samples.png", help="file to write, in the format of its ending (%(default)s)")
    add("-h", "--help", action="help", help="show this and stop")
    add = parser.group("what to draw")
    add("--count", type=number(int, 1), metavar="N", default=64, help="number of samples, or of rows (%(default)s)")
    add("--class_label", metavar="CLASS", help="name or number of the class of every sample (all classes in turn)")
    add(
        "--progressive",
        type=number(int, 2),
        metavar="N",
        help="a row for each sample: its predicted x_0 at N timesteps",
    )
    add("--interpolate", type=number(int, 0), metavar="T", help="a row for each pair of images, mixed at timestep T")
    add = parser.group("how to sample")
    add("--steps", type=number(int, 1), metavar="N", help="sampling steps (the pipeline's own number)")
    add("--eta", type=number(float, 0, 1), metavar="ETA", help="DDIM with this eta, 0 to 1 (ancestral sampling)")
    add("--guidance_scale", type=number(float, 0), metavar="SCALE", help="classifier-free guidance; 1 means none")
    add(
        "--classifier_scale",
        type=number(float, 0),
        metavar="SCALE",
        help="guidance by the pipeline's classifier; 0 means none",
    )
    add("--optimize", action="store_true", help="compile the network first; pays off with many steps")
    add("--seed", type=SEED, metavar="N", default=0, help="seed of the noise (%(default)s)")
    add("--device", metavar="NAME", help="device, as torch names it (an accelerator if there is one)")
    add = parser.group("images of a data set, for --interpolate and for upsamplers")
    add("--data", metavar="DATA", help="as in ddpm-hf evaluate (the data set of the training)")
    add("--split", metavar="SPLIT", default="test", help="split of --data (%(default)s)")
    add("--label_column", metavar="NAME", help="column of class labels, as in ddpm-hf evaluate")
    add(
        "--noise_level",
        type=number(float, 0, 1),
        metavar="LEVEL",
        default=0.0,
        help="noise on an upsampler's small images, 0 to 1 (%(default)s)",
    )
    return parser


def main(argv: list[str], program: str) -> None:
    parser = make_parser(program)
    arguments = parser.parse_args(argv)
    if arguments.progressive is not None and arguments.interpolate is not None:
        parser.error("--progressive and --interpolate make two sheets; give one of them")
    check_out(arguments.out)
    device = choose_device(arguments.device)
    arguments.pipeline = find_pipeline(program, arguments.pipeline)
    if arguments.data is not None:
        check_path(program, arguments.data, "data set")

    import torch

    from ddpm_hf.evaluation.samples import open_pipeline, parse_class_label
    from ddpm_hf.evaluation.sheets import check_picture, save_picture

    hide_progress_in_logs()
    pipeline = open_pipeline(arguments.pipeline).to(device)
    pipeline.set_progress_bar_config(disable=None)  # no bars in logs
    stages = [pipeline.base, pipeline.upsampler] if hasattr(pipeline, "upsampler") else [pipeline]
    check_picture(arguments.out, stages[0].channels)
    check_combinations(parser, arguments, pipeline, stages)
    label = parse_class_label(pipeline, arguments.class_label, "--class_label")
    if arguments.optimize:
        for stage in stages:
            print(stage.optimize())
    sampling = dict(
        generator=torch.Generator(device).manual_seed(arguments.seed),
        num_inference_steps=arguments.steps,
        eta=arguments.eta,
        guidance_scale=arguments.guidance_scale,
        classifier_scale=arguments.classifier_scale,
    )
    with naming_options(arguments, OPTIONS):
        sheet = draw(pipeline, arguments, label, sampling)
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
        raise ValueError(f"--out {out} is a folder; give a file")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--out {out}: there is no such folder")
    if not is_writable(path.absolute().parent):
        raise ValueError(f"--out {out}: its folder may not be written to; give another one")
    picture_format(path)


def check_combinations(parser: Parser, arguments: argparse.Namespace, pipeline, stages: list) -> None:
    """End the command with a message for options that the pipeline does not have."""
    from ddpm_hf.pipelines.cascade import CascadePipeline
    from ddpm_hf.pipelines.super_resolution import DDPMSuperResolutionPipeline

    if isinstance(pipeline, (CascadePipeline, DDPMSuperResolutionPipeline)):
        if (arguments.progressive, arguments.interpolate) != (None, None):
            parser.error(f"--progressive and --interpolate are not for a {type(pipeline).__name__}")
    elif arguments.noise_level:
        parser.error(f"--noise_level {arguments.noise_level} is of an upsampler, which this pipeline does not have")
    if arguments.class_label is not None and not any(stage.takes_labels or stage.classifier for stage in stages):
        parser.error(f"--class_label {arguments.class_label}: this pipeline has no classes; leave it out")


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


def load_images_of(arguments: argparse.Namespace, pipeline, count: int, **kwargs):
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
