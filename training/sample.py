"""A saved pipeline -> a sheet of samples.

python training/sample.py runs/digits/pipeline --count 64 --out samples.png
python training/sample.py runs/digits/pipeline --count 8 --progressive 12 --out progressive.png
python training/sample.py runs/digits/pipeline --count 8 --interpolate 500 --data digits --out interpolation.png
python training/sample.py runs/mnist-8-32/pipeline --count 16 --data mnist --out larger.png    # of an upsampler
"""

import argparse
import sys
from pathlib import Path

import torch
from sheets import as_images, as_sheet, class_columns, cycled_labels, save_picture

from ddpm_hf import CascadePipeline, DDPMImagePipeline, DDPMSuperResolutionPipeline
from ddpm_hf.conditioning import shrunk
from evaluate import load_tensor


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pipeline", help="folder of a saved pipeline, or its id on the Hub")
    parser.add_argument("--out", default="samples.png", help="PNG file to write")
    parser.add_argument(
        "--count", type=int, default=64, help="number of images, a column for each class; of rows with the next two"
    )
    parser.add_argument(
        "--progressive", type=int, metavar="N", help="a row for each image: its predicted x_0 at N timesteps on the way"
    )
    parser.add_argument(
        "--interpolate", type=int, metavar="T", help="a row for each pair of images of --data, mixed at timestep T"
    )
    parser.add_argument(
        "--data",
        default="digits",
        help="as in evaluate.py; of --interpolate, and of an upsampler, which sees it made small",
    )
    parser.add_argument("--split", default="test", help="of --data")
    parser.add_argument("--label_column", default="label", help="of --data, for a class-conditional upsampler")
    parser.add_argument("--noise_level", type=float, default=0.0, help="of an upsampler: noise on the small images")
    parser.add_argument("--steps", type=int, help="network calls an image; all timesteps if left out")
    parser.add_argument("--eta", type=float, help="DDIM with this eta in [0, 1]; ancestral sampling if left out")
    parser.add_argument("--class_label", type=int, help="of every image; all in turn if left out")
    parser.add_argument("--guidance_scale", type=float, help="classifier-free guidance, 1 is none")
    parser.add_argument("--classifier_scale", type=float, help="guidance by the pipeline's classifier, 0 is none")
    parser.add_argument(
        "--optimize", action="store_true", help="pipe.optimize(): compiles first, worth it for many steps"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not Path(arguments.out).absolute().parent.is_dir():
        parser.error(f"--out {arguments.out}: there is no such folder")
    if arguments.count < 1:
        parser.error(f"--count {arguments.count} must be 1 or more")
    if arguments.progressive is not None and arguments.progressive < 2:
        parser.error(f"--progressive {arguments.progressive} must be 2 or more")
    if arguments.progressive is not None and arguments.interpolate is not None:
        parser.error("--progressive and --interpolate make two sheets; give one of them")
    pipeline = open_pipeline(arguments.pipeline).to(device)
    if arguments.optimize:
        for stage in (pipeline.base, pipeline.upsampler) if isinstance(pipeline, CascadePipeline) else (pipeline,):
            print(stage.optimize())
    if type(pipeline) is not DDPMImagePipeline:
        if arguments.progressive is not None or arguments.interpolate is not None:
            parser.error(f"--progressive and --interpolate are not for a {type(pipeline).__name__}")
        draw = cascade_rows if isinstance(pipeline, CascadePipeline) else upsampled_rows
        images, columns = draw(pipeline, arguments, torch.Generator(device).manual_seed(arguments.seed))
        save_picture(as_sheet(images, columns), arguments.out)
        print(f"wrote {arguments.out}")
        return
    labels = arguments.class_label
    classes = pipeline.classifier if arguments.classifier_scale is not None and pipeline.classifier else pipeline.unet
    how = dict(
        generator=torch.Generator(device).manual_seed(arguments.seed),
        num_inference_steps=arguments.steps,
        eta=arguments.eta,
        class_labels=cycled_labels(classes, arguments.count) if labels is None else labels,
        guidance_scale=arguments.guidance_scale,
        classifier_scale=arguments.classifier_scale,
    )
    if arguments.progressive is not None:
        images, columns = progressive_rows(pipeline, arguments.count, arguments.progressive, how)
    elif arguments.interpolate is not None:
        images, columns = interpolation_rows(pipeline, arguments, how)
    else:
        columns = class_columns(classes, arguments.count) if labels is None else None
        images = pipeline(arguments.count, **how).images
    save_picture(as_sheet(images, columns), arguments.out)
    print(f"wrote {arguments.out}")


def open_pipeline(path):
    """A pipeline of the class that its index names; the stock one as `DDPMImagePipeline`."""
    name = DDPMImagePipeline.load_config(path)["_class_name"]
    name = name[-1] if isinstance(name, list) else name
    others = {cls.__name__: cls for cls in (CascadePipeline, DDPMSuperResolutionPipeline)}
    return others.get(name, DDPMImagePipeline).from_pretrained(path)


def cascade_rows(pipeline, arguments, generator):
    """Samples of both stages, as a plain pipeline's."""
    labels, base = arguments.class_label, pipeline.base
    classes = base.classifier if arguments.classifier_scale is not None and base.classifier else base.unet
    images = pipeline(
        arguments.count,
        generator,
        arguments.steps,
        upsampler_steps=arguments.steps,
        eta=arguments.eta,
        upsampler_kwargs={"eta": arguments.eta},
        class_labels=cycled_labels(classes, arguments.count) if labels is None else labels,
        guidance_scale=arguments.guidance_scale,
        classifier_scale=arguments.classifier_scale,
        noise_level=arguments.noise_level,
    ).images
    return images, class_columns(classes, arguments.count) if labels is None else None


def upsampled_rows(pipeline, arguments, generator):
    """Of each image of the data: as it is given, scaled up; what is made of it; and as it was. Four of these a row."""
    levels, column = (
        getattr(pipeline.scheduler, "levels", 256),
        arguments.label_column if pipeline.takes_labels else None,
    )
    how = dict(label_column=column, channels=pipeline.channels)
    x_start, labels = load_tensor(arguments.data, arguments.split, pipeline.unet, levels, arguments.count, **how)
    small = shrunk(x_start.to(pipeline.device), tuple(pipeline.config.low_resolution))
    made = pipeline(
        small,
        generator,
        arguments.steps,
        "latent",
        eta=arguments.eta,
        class_labels=labels if arguments.class_label is None else arguments.class_label,
        guidance_scale=arguments.guidance_scale,
        noise_level=arguments.noise_level,
    ).images.cpu()
    given = torch.nn.functional.interpolate(small.cpu(), x_start.shape[2:], mode="nearest")
    return as_images(torch.cat((given, made.clamp(-1, 1), x_start), dim=-1)), 4


def progressive_rows(pipeline, count, columns, how):
    """The predicted x_0 of each image, at evenly spread steps from noise to image (the paper's figure 6)."""
    steps = how["num_inference_steps"] or pipeline.scheduler.config.num_train_timesteps
    shown = {round(i * (steps - 1) / (columns - 1)) for i in range(columns)}
    seen = [x_start for i, (_, _, x_start) in enumerate(pipeline.progressive(count, **how)) if i in shown]
    return as_images(torch.stack(seen, dim=1).flatten(0, 1)), len(seen)


def interpolation_rows(pipeline, arguments, how, columns=9):
    """Pairs of the data's images with what lies between (the paper's figure 8): source, mixtures from 0 to 1, source."""
    levels = getattr(pipeline.scheduler, "levels", 256)
    data, _ = load_tensor(arguments.data, arguments.split, pipeline.unet, levels, 2 * arguments.count)
    if len(data) < 2 * arguments.count:
        raise ValueError(f"--count {arguments.count} needs two images a row; --data has {len(data)}")
    a, b = data[::2].to(pipeline.device), data[1::2].to(pipeline.device)
    weights = [i / (columns - 1) for i in range(columns)]
    mixed = pipeline.interpolate(a, b, weights, arguments.interpolate, output_type="latent", **how).images
    rows = torch.cat((a[:, None], mixed.unflatten(0, (len(a), columns)), b[:, None]), dim=1)
    return as_images(rows.flatten(0, 1)), columns + 2


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"sample.py: {' '.join(str(error).split())}")
