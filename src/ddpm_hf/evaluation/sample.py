"""A saved pipeline -> a sheet of samples.

python training/sample.py runs/digits/pipeline --count 64 --out samples.png
python training/sample.py runs/digits/pipeline --count 8 --progressive 12 --out progressive.png
python training/sample.py runs/digits/pipeline --count 8 --interpolate 500 --data digits --out interpolation.png
python training/sample.py runs/mnist-8-32/pipeline --count 16 --data mnist --out larger.png    # of an upsampler
"""

import argparse
import io
from pathlib import Path

import torch
from PIL import Image

from ddpm_hf.data.pixels import PIL_MODES
from ddpm_hf.evaluation.evaluate import SEED, choose_device, data_of, is_writable, load_tensor, number
from ddpm_hf.evaluation.sheets import (
    as_images,
    as_sheet,
    captions_of,
    class_columns,
    cycled_labels,
    picture_format,
    row_captions,
    save_picture,
)
from ddpm_hf.models.conditioning import shrunk
from ddpm_hf.pipelines.cascade import CascadePipeline
from ddpm_hf.pipelines.ddpm import DDPMImagePipeline
from ddpm_hf.pipelines.guidance import label_ids
from ddpm_hf.pipelines.super_resolution import DDPMSuperResolutionPipeline


def make_parser() -> argparse.ArgumentParser:
    scale = number(float, 0)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pipeline", help="folder of a saved pipeline, or its id on the Hub")
    parser.add_argument("--out", default="samples.png", help="file to write, in the format of its ending (%(default)s)")
    parser.add_argument(
        "--count",
        type=number(int, 1),
        default=64,
        help="number of images, a column for each class; with --progressive or --interpolate, number of rows (%(default)s)",
    )
    parser.add_argument(
        "--progressive",
        type=number(int, 2),
        metavar="N",
        help="a row for each image: its predicted x_0 at N timesteps on the way",
    )
    parser.add_argument(
        "--interpolate",
        type=number(int, 0),
        metavar="T",
        help="a row for each pair of images of --data, mixed at timestep T",
    )
    parser.add_argument(
        "--data",
        help="as in evaluate.py: random images for --interpolate, and for an upsampler, which sees them small",
    )
    parser.add_argument("--split", default="test", help="of --data (%(default)s)")
    parser.add_argument("--label_column", help="of --data, for a class-conditional upsampler; as in evaluate.py")
    parser.add_argument(
        "--noise_level",
        type=number(float, 0, 1),
        default=0.0,
        help="of an upsampler: noise on the small images (%(default)s)",
    )
    parser.add_argument(
        "--steps", type=number(int, 1), help="sampling steps; if left out the pipeline's default, see docs/samplers.md"
    )
    parser.add_argument(
        "--eta", type=number(float, 0, 1), help="DDIM with this eta in [0, 1]; ancestral sampling if left out"
    )
    parser.add_argument(
        "--class_label",
        help="of every image, its name or number (a number that is a name means the name); all in turn if left out",
    )
    parser.add_argument("--guidance_scale", type=scale, help="classifier-free guidance, 1 is none")
    parser.add_argument("--classifier_scale", type=scale, help="guidance by the pipeline's classifier, 0 is none")
    parser.add_argument(
        "--optimize", action="store_true", help="pipe.optimize(): compiles first, worth it for many steps"
    )
    parser.add_argument("--seed", type=SEED, default=0, help="of the noise (%(default)s)")
    parser.add_argument("--device", help="as torch calls it; an accelerator if left out, where there is one")
    return parser


def main(argv: list[str]):
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if arguments.progressive is not None and arguments.interpolate is not None:
        parser.error("--progressive and --interpolate make two sheets; give one of them")
    check_out(arguments.out)
    device = choose_device(arguments.device)
    pipeline = open_pipeline(arguments.pipeline).to(device)
    if type(pipeline) is not DDPMImagePipeline and (arguments.progressive, arguments.interpolate) != (None, None):
        parser.error(f"--progressive and --interpolate are not for a {type(pipeline).__name__}")
    if arguments.data is None and (arguments.interpolate is not None or type(pipeline) is DDPMSuperResolutionPipeline):
        arguments.data = data_of(arguments.pipeline, pipeline.folder)
    if type(pipeline) is DDPMImagePipeline and arguments.noise_level:
        parser.error(f"--noise_level {arguments.noise_level} is of an upsampler, which this pipeline has not")
    channels = (pipeline.base if isinstance(pipeline, CascadePipeline) else pipeline).channels
    check_out(arguments.out, channels)
    labels = label_of(pipeline, arguments.class_label)
    if arguments.optimize:
        for stage in (pipeline.base, pipeline.upsampler) if isinstance(pipeline, CascadePipeline) else (pipeline,):
            print(stage.optimize())
    generator = torch.Generator(device).manual_seed(arguments.seed)
    rows = {CascadePipeline: cascade_rows, DDPMSuperResolutionPipeline: upsampled_rows, DDPMImagePipeline: sample_rows}
    images, columns, captions = rows[type(pipeline)](pipeline, arguments, labels, generator)
    save_picture(as_sheet(images, columns, captions), arguments.out)
    print(f"wrote {arguments.out}")


def check_out(out: str, channels: int = 3) -> None:
    """Whether a sheet of images of these channels may be written to this file: before it is drawn. Raises ValueError."""
    path = Path(out)
    if path.is_dir():
        raise ValueError(f"--out {out} is a folder; give a file")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--out {out}: there is no such folder")
    if not is_writable(path.absolute().parent):
        raise ValueError(f"--out {out}: its folder may not be written to; give another one")
    kind = picture_format(path)
    if channels not in PIL_MODES:
        raise ValueError(f"images of {channels} channels cannot be shown; sheets are of 1, 3 or 4")
    try:
        Image.new(PIL_MODES[channels], (1, 1)).save(io.BytesIO(), kind)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"--out {out}: {error}; give a .png file for images of {channels} channels") from None


def label_of(pipeline, text: str | None) -> int | None:
    """The label that a name of the pipeline's classes or a number stands for; where it could be both, the name's.

    Raises:
        ValueError: neither, with the nearest names.
    """
    if text is None or text in pipeline.labels:
        return pipeline.labels.get(text)
    try:
        return int(text)
    except ValueError:
        return label_ids([text], pipeline.class_names, "--class_label")[0]


def open_pipeline(path):
    """A pipeline of the class that its index names; the stock one as `DDPMImagePipeline`."""
    name = DDPMImagePipeline.load_config(path)["_class_name"]
    name = name[-1] if isinstance(name, list) else name
    others = {cls.__name__: cls for cls in (CascadePipeline, DDPMSuperResolutionPipeline)}
    return others.get(name, DDPMImagePipeline).from_pretrained(path)


def labels_of(pipeline, classes, label, count):
    """The label of each of `count` images, (N,), `label` or all classes in turn, and columns and captions of their sheet."""
    if label is not None:
        return torch.full((count,), label), None, None
    labels = cycled_labels(classes, count)
    return labels, class_columns(classes, count), captions_of(pipeline, labels)


def sample_rows(pipeline, arguments, label, generator):
    """Images, columns and captions of the sheet that the arguments ask for."""
    count = arguments.count
    classes = pipeline.classifier if arguments.classifier_scale is not None and pipeline.classifier else pipeline.unet
    labels, columns, captions = labels_of(pipeline, classes, label, count)
    how = dict(
        generator=generator,
        num_inference_steps=arguments.steps,
        eta=arguments.eta,
        class_labels=labels,
        guidance_scale=arguments.guidance_scale,
        classifier_scale=arguments.classifier_scale,
    )
    if arguments.progressive is not None:
        images, columns = progressive_rows(pipeline, count, arguments.progressive, how)
    elif arguments.interpolate is not None:
        images, columns = interpolation_rows(pipeline, arguments, how)
    else:
        return pipeline(count, **how).images, columns, captions
    return images, columns, row_captions(captions, count, columns)


def cascade_rows(pipeline, arguments, label, generator):
    """Samples of both stages, as a plain pipeline's."""
    base, count = pipeline.base, arguments.count
    classes = base.classifier if arguments.classifier_scale is not None and base.classifier else base.unet
    if not classes.num_classes:
        classes = pipeline.upsampler.unet
    labels, columns, captions = labels_of(pipeline, classes, label, count)
    images = pipeline(
        count,
        generator,
        arguments.steps,
        upsampler_steps=arguments.steps,
        eta=arguments.eta,
        upsampler_kwargs={"eta": arguments.eta},
        class_labels=labels,
        guidance_scale=arguments.guidance_scale,
        classifier_scale=arguments.classifier_scale,
        noise_level=arguments.noise_level,
    ).images
    return images, columns, captions


def upsampled_rows(pipeline, arguments, label, generator):
    """Of random images of the data: as each is given, scaled up; what is made of it; and as it was. Four of these a row."""
    levels = getattr(pipeline.scheduler, "levels", 256)
    how = dict(label_column=arguments.label_column, channels=pipeline.channels)
    x_start, labels = load_tensor(arguments.data, arguments.split, pipeline.unet, levels, arguments.count, **how)
    if label is not None:
        labels = torch.full((len(x_start),), label)
    small = shrunk(x_start.to(pipeline.device), tuple(pipeline.config.low_resolution))
    made = pipeline(
        small,
        generator,
        arguments.steps,
        "latent",
        eta=arguments.eta,
        class_labels=labels,
        guidance_scale=arguments.guidance_scale,
        classifier_scale=arguments.classifier_scale,
        noise_level=arguments.noise_level,
    ).images.cpu()
    given = torch.nn.functional.interpolate(small.cpu(), x_start.shape[2:], mode="nearest")
    images = as_images(torch.cat((given, made.clamp(-1, 1), x_start), dim=-1))
    return images, 4, captions_of(pipeline, labels)


def progressive_rows(pipeline, count, columns, how):
    """The predicted x_0 of each image, at evenly spread steps from noise to image (the paper's figure 6)."""
    steps = pipeline.progressive(count, **how)
    shown = {round(i * (pipeline.num_timesteps - 1) / (columns - 1)) for i in range(columns)}
    seen = [x_start for i, (_, _, x_start) in enumerate(steps) if i in shown]
    return as_images(torch.stack(seen, dim=1).flatten(0, 1)), len(seen)


def interpolation_rows(pipeline, arguments, how, columns=9):
    """Pairs of the data's images with what lies between (the paper's figure 8): source, mixtures from 0 to 1, source."""
    levels = getattr(pipeline.scheduler, "levels", 256)
    data, _ = load_tensor(
        arguments.data, arguments.split, pipeline.unet, levels, 2 * arguments.count, with_labels=False
    )
    if len(data) < 2 * arguments.count:
        raise ValueError(f"--count {arguments.count} needs two images a row; --data has {len(data)}")
    a, b = data[::2].to(pipeline.device), data[1::2].to(pipeline.device)
    weights = [i / (columns - 1) for i in range(columns)]
    mixed = pipeline.interpolate(a, b, weights, arguments.interpolate, output_type="latent", **how).images
    rows = torch.cat((a[:, None], mixed.unflatten(0, (len(a), columns)), b[:, None]), dim=1)
    return as_images(rows.flatten(0, 1)), columns + 2
