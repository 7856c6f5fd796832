"""Options of `ddpm-hf sample --animation`: the denoising as a moving picture."""

import argparse
from collections.abc import Callable
from pathlib import Path

from ddpm_hf.cli.parser import Parser, number
from ddpm_hf.cli.sampling import sampler_of


def add_animation_options(add: Callable[..., argparse.Action]) -> None:
    """Add the options of the animation."""
    add(
        "--animation", metavar="FILE", help="write the denoising of the samples instead of a sheet: .gif, .webp or .mp4"
    )
    add(
        "--show",
        choices=["both", "x_t", "x_0"],
        metavar="WHAT",
        default="both",
        help="x_t, x_0 (predicted from it), or both (%(default)s)",
    )
    add("--fps", type=number(float, 1, 50), metavar="N", default=20, help="frames per second (%(default)s)")


def check_animation_options(parser: Parser, arguments: argparse.Namespace) -> None:
    """End the command, before anything is opened, for options that an animation does not have. Raises as `check_animation`."""
    for name in ("progressive", "interpolate", "out"):
        if getattr(arguments, name) != parser.get_default(name):
            parser.error(f"--animation and --{name} make two pictures; give one of them")
    from ddpm_hf.evaluation.animation import check_animation

    check_animation(arguments.animation)


def write_animation(parser: Parser, pipeline, arguments: argparse.Namespace, rule: str | int, count: int) -> None:
    """Write the animation of `count` samples; one beside the pipeline also enters its model card."""
    import torch

    from ddpm_hf.evaluation.samples import animate_samples
    from ddpm_hf.hub.card import has_our_card, write_model_card
    from ddpm_hf.hub.records import RECORD
    from ddpm_hf.pipelines.ddpm import DDPMImagePipeline
    from ddpm_hf.pipelines.super_resolution import DDPMSuperResolutionPipeline

    if not isinstance(pipeline, DDPMImagePipeline) or isinstance(pipeline, DDPMSuperResolutionPipeline):
        parser.error(f"--animation is not for a {type(pipeline).__name__}")
    if rule == "random":
        parser.error("--class_labels random is for single images; give a class, or leave it out")
    out, folder = Path(arguments.animation), Path(arguments.pipeline)
    animate_samples(
        pipeline,
        out,
        count,
        rule if isinstance(rule, int) else None,
        what=arguments.show,
        fps=arguments.fps,
        generator=torch.Generator(pipeline.device).manual_seed(arguments.seed),
        **sampler_of(arguments),
    )
    print(f"wrote {out}")
    if not has_our_card(folder):
        return
    if RECORD.fullmatch(out.name) and out.parent.resolve() == folder.resolve():
        write_model_card(folder)
        print(f"{folder / 'README.md'} shows it")
    else:
        print(f"--animation {folder / 'animation.webp'} puts it on the model card")
