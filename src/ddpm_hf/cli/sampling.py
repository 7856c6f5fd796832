"""Options of drawing samples, which `ddpm-hf sample` and `ddpm-hf evaluate --metrics` share."""

import argparse
from collections.abc import Callable
from typing import Any

from ddpm_hf.cli.parser import Parser, number

# argument of a pipeline -> the option that sets it, for messages
OPTIONS = {
    "num_inference_steps": "--steps",
    "class_labels": "--class_labels",
    **{name: f"--{name}" for name in ("eta", "timesteps", "guidance_scale", "classifier_scale", "noise_level")},
}


def add_sampler_options(add: Callable[..., argparse.Action]) -> None:
    """Add the options of the sampler, but for --steps: eta, timesteps, guidance, scheduler."""
    add(
        "--eta",
        type=number(float, 0, 1),
        metavar="ETA",
        help="DDIM: 0 is deterministic, 1 is as noisy as DDPM (ancestral sampling)",
    )
    add(
        "--timesteps",
        metavar="NAME",
        help="list of timesteps that `optimize-chain` saved, by its name: optimal (evenly spaced ones)",
    )
    add("--guidance_scale", type=number(float, 0), metavar="SCALE", help="classifier-free guidance; 1 is none (none)")
    add(
        "--classifier_scale",
        type=number(float, 0),
        metavar="SCALE",
        help="guidance by the pipeline's classifier; 0 is none (none)",
    )
    add(
        "--scheduler",
        metavar="NAME",
        help="class of diffusers, such as DPMSolverMultistepScheduler (the pipeline's own)",
    )
    add("--scheduler.KEY", metavar="VALUE", help="a setting of the scheduler, such as --scheduler.solver_order 2")


def add_class_option(add: Callable[..., argparse.Action]) -> None:
    """Add the option of the classes."""
    add(
        "--class_labels",
        "--class_label",
        metavar="CLASS",
        default="balanced",
        help="a class by name or number; balanced: all classes in turn; random: one drawn for each seed (%(default)s)",
    )


def add_batch_option(add: Callable[..., argparse.Action], name: str = "--batch_size") -> None:
    """Add the option of the batch size."""
    add(
        name,
        type=_batch_size,
        metavar="N",
        help="images that each process draws at once; auto: the fastest number that fits into memory (auto)",
    )


def _batch_size(text):
    return None if text == "auto" else number(int, 1)(text)


def sampler_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of a pipeline's call that the options set."""
    return dict(
        num_inference_steps=arguments.steps,
        eta=arguments.eta,
        timesteps=arguments.timesteps,
        guidance_scale=arguments.guidance_scale,
        classifier_scale=arguments.classifier_scale,
    )


def class_rule(parser: Parser, pipeline, text: str) -> str | int:
    """The rule of `labels_of_seeds` that --class_labels asks for; ends the command for a pipeline without classes.

    Raises:
        ValueError: an unknown class.
    """
    from ddpm_hf.evaluation.generation import stages_of
    from ddpm_hf.evaluation.samples import parse_class_label

    if text in ("balanced", "random") and text not in pipeline.labels:
        return text
    if not any(stage.takes_labels or stage.classifier for stage in stages_of(pipeline)):
        parser.error(f"--class_labels {text}: this pipeline has no classes; leave it out")
    label = parse_class_label(pipeline, text, "--class_labels")
    assert label is not None
    return label
