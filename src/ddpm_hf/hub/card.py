"""The model card of a saved pipeline."""

import hashlib
import json
import os
import re
import shlex
from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ddpm_hf.arguments import listed, sides
from ddpm_hf.files.atomic import final_name, write_text
from ddpm_hf.files.guarded import COUNT, NULL, NUMBER, WORD, Kind, check_values, naming, read_json, read_text
from ddpm_hf.files.pipeline_folder import component_classes, pipeline_class, read_config
from ddpm_hf.hub.markdown import code, fenced_json, listed_names, printable, title, with_error
from ddpm_hf.hub.records import RECORD, records_of
from ddpm_hf.hub.saved import CASCADE, class_of_part, kind_of_class
from ddpm_hf.models.classifier import NoisyClassifier
from ddpm_hf.models.unet import DDPMUNet
from ddpm_hf.schedulers.conditioning_times import rescales_timesteps
from ddpm_hf.schedulers.ddpm import LEARNED_VARIANCES

# installed beside the package; at the project's root in a checkout
TEMPLATES = (Path(__file__).parents[1] / "model_card.md", Path(__file__).parents[3] / "model_card.md")


# the key of an entry -> the entry
CITATIONS = {
    entry.partition("{")[2].partition(",")[0]: entry.strip()
    for entry in Path(__file__).with_name("citations.bib").read_text(encoding="utf-8").split("\n\n")
}


def write_model_card(folder: str | os.PathLike, repo_id: str | None = None) -> Path:
    """Writes `card_text` to README.md of a saved pipeline; returns its path. Raises as `model_card`."""
    return write_text(Path(folder) / "README.md", card_text(folder, repo_id))


def has_our_card(folder: str | os.PathLike) -> bool:
    """Whether README.md of a saved pipeline is unchanged since `write_model_card`."""
    path = Path(folder) / "README.md"
    return path.is_file() and is_our_card(read_text(path))


def is_our_card(text: str) -> bool:
    """Whether a card is unchanged since `card_text` made it, by the digest in its last line."""
    return text == _signed(text.rpartition("\n\n<!--")[0])


def license_of(text: str) -> str | None:
    """Returns the license in a card's header, or None."""
    if not text:
        return None
    try:
        return ModelCard(text, ignore_metadata_errors=True).data.license
    except Exception:  # no YAML
        return None


def licensed(text: str, license: str) -> str:
    """Returns a card with this license in its header, with a new digest if the card was unchanged.

    Raises:
        ValueError: the header is not YAML.
    """
    ours = is_our_card(text)
    try:
        card = ModelCard(text.rpartition("\n\n<!--")[0] if ours else text, ignore_metadata_errors=True)
    except Exception as error:
        raise ValueError(
            f"README.md: its header is not YAML ({' '.join(str(error).split())}); mend it by hand"
        ) from None
    card.data.license = license
    return _signed(str(card)) if ours else str(card)


def _signed(text):
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    note = "written anew with the numbers of the folder, unless it is changed by hand"
    return f"{text}\n\n<!-- of ddpm-hf, {digest}: {note} -->\n"


def model_card(
    folder: str | os.PathLike, repo_id: str | None = None, license: str | None = None, remote_code: bool = True
) -> ModelCard:
    """Renders the card of a saved pipeline from the template `model_card.md` and the files in the folder.

    Args:
        folder: a saved pipeline; the card also shows its training.json, evaluation.json and pictures.
        repo_id: the repository in the card's examples; None for "USER/" and the name of the folder, or of the run if that is
            "pipeline".
        license: the Hub's name of a license, such as "apache-2.0"; None leaves it out.
        remote_code: whether the repository has the branch "remote-code" beside main.

    Raises:
        FileNotFoundError: the folder is not a saved pipeline.
        ValueError: `DDPMUNet` does not support the network, or a file is invalid; the message names it.
    """
    folder = Path(folder)
    index = read_json(folder / "model_index.json", folder)
    kind = kind_of_class(pipeline_class(index, folder))
    classes = component_classes(index, folder, kind.components)
    name = final_name(folder.absolute())
    name = repo_id or (folder.absolute().parent.name if name == "pipeline" else name)
    low = check_values(index, {"low_resolution": SIDES | NULL}, folder / "model_index.json")["low_resolution"]
    values, data = _values_of_cascade(folder) if kind is CASCADE else _values_of_pipeline(folder, classes, low, repo_id)
    card_data = ModelCardData(
        license=license,
        library_name="diffusers",
        # the Hub has no tag for images of a class
        pipeline_tag="image-to-image" if low else None if values.get("classes") else "unconditional-image-generation",
        tags=["ddpm", "ddpm-hf", "diffusion"],
        model_name=printable(name.split("/")[-1]),
        **data,
    )
    return ModelCard.from_template(
        card_data,
        template_path=str(next(path for path in TEMPLATES if path.is_file())),
        **values,
        cascade=kind is CASCADE,
        title=title(name),
        repo_id=json.dumps(repo_id or f"USER/{name}"),
        pipeline_class=kind.name,
        remote_code=remote_code,
        citations="\n\n".join(CITATIONS[key] for key in values["cited"]),
    )


def _values_of_cascade(folder):
    """Returns the template's values for a cascade, and no data for the header; stages have their own cards."""
    path = folder / "upsampler/model_index.json"
    low = check_values(read_json(path, folder), {"low_resolution": SIDES}, path)["low_resolution"]
    size = _network(folder / "upsampler/unet", DDPMUNet, folder).config.sample_size
    return {"low": _size(low), "size": _size(size), "cited": ["ho2020denoising", "dhariwal2021diffusion"]}, {}


def _values_of_pipeline(folder, classes, low, repo_id):
    """Returns the template's values for a pipeline of one network, and the data for the card's header.

    Args:
        repo_id: the repository in which the card is published; None for a card that stays in the folder.
    """
    network, scheduler = _network(folder / "unet", DDPMUNet, folder), _scheduler(folder)
    stock_prediction, process = scheduler["prediction_type"] or "epsilon", _continuous_process(scheduler)
    own_settings = scheduler.get("_ddpm_hf") or {}
    check_values(own_settings, SCHEDULER, folder / "scheduler/scheduler_config.json")
    scheduler |= own_settings
    records = records_of(folder)
    training, evaluation = records.get("training"), records.get("evaluation")
    quality = evaluation and evaluation.get("sample_quality")
    evaluation = evaluation if evaluation and "total" in evaluation else None  # bits/dim
    size, variance = network.config.sample_size, scheduler["variance_type"] or ""
    channels, outputs = network.config.in_channels, network.config.out_channels
    timestep_lists = {
        name: listed(sorted(lists, key=int)) for name, lists in (own_settings.get("timestep_lists") or {}).items()
    }
    reasons = {
        "a network that makes images larger": low,
        "a network of continuous time": process,
        "a network that predicts the previous image": stock_prediction == "previous",
        'with the variance "learned"': variance == "learned",  # "learned_range" it can
        "a network whose learned variance was replaced": variance == "analytic" and outputs == 2 * channels,
        "a class-conditional network": network.class_embedding is not None,
        "a network of no fixed size": size is None,
        "a network with settings that only ddpm-hf has": network.has_own_settings,
        "a network that is given t * 1000 / T in place of t": rescales_timesteps(scheduler),
    }
    reason = next((reason for reason, applies in reasons.items() if applies), None)
    classifier = _network(folder / "classifier", NoisyClassifier, folder) if "classifier" in classes else None
    cited = {
        "ho2020denoising": True,
        "song2021scorebased": process,
        "nichol2021improved": variance in LEARNED_VARIANCES or scheduler["beta_schedule"] == "cosine",
        "dhariwal2021diffusion": classifier is not None,
        "ho2021classifier": network.null_class is not None,
        "kingma2021variational": scheduler["beta_schedule"] == "learned" or network.arguments["fourier_features"],
        "bao2022analytic": variance == "analytic",
        "watson2021learning": timestep_lists,
    }
    # of the Hub's tasks only the first two exist; the third is used for images of a class
    task = "image-to-image" if low else "unconditional-image-generation"
    if not low and network.class_embedding is not None:
        task = "image-generation"
    command = evaluation and evaluation_command(evaluation["command"], repo_id)
    data_id = (training or {}).get("hub_dataset") or ""
    data = {
        "datasets": [data_id] if REPOSITORY.fullmatch(data_id) else None,
        "eval_results": _results(evaluation, quality, task, command, repo_id) or None,
    }
    return {
        "images": "images of any size" if size is None else f"{_size(size)} images",
        "parameters": f"{network.num_parameters():,}",
        "process": process,
        "steps": scheduler["num_train_timesteps"],
        "beta_schedule": scheduler["beta_schedule"],
        "prediction_type": scheduler["prediction_type"] or "epsilon",
        "variance_type": variance,
        "timestep_lists": timestep_lists,
        "levels": scheduler["levels"],
        "classes": network.num_classes,
        "class_names": listed_names(network.class_names),
        "label_dropout": network.null_class is not None,
        "classifier": classifier,
        "low": low and _size(low),
        "call": _call(network, low),
        "stock": reason is None,
        "stock_reason": reason,
        "pictures": sorted(path.name for path in folder.iterdir() if RECORD.fullmatch(path.name)),
        "training": training,
        "is_converted": "original" in network.own_settings(),
        "ema_decay": training and _decay_at(training["steps"], training["ema_decay"]),
        "configuration": training and fenced_json(training),
        "evaluation": evaluation,
        "held_out": training and training["held_out_bits_per_dim"],
        "command": command,
        "quality": quality,
        "quality_command": quality and evaluation_command(quality["command"], repo_id),
        "code": code,
        "with_error": with_error,
        "cited": [key for key, is_cited in cited.items() if is_cited],
    }, data


def _call(network, low):
    """The arguments with which the example calls the pipeline; None where it would need tensors."""
    is_conditional = network.class_embedding is not None
    if network.config.sample_size is None or (is_conditional and network.num_classes is None):
        return None
    if low:
        return "small_images, class_labels=class_labels" if is_conditional else "small_images"
    return "class_labels=0" if is_conditional else "batch_size=4"


def _decay_at(step, ema_decay):
    """The decay of the averaged weights at a step of the training: diffusers' `EMAModel` raises it from 0 to `ema_decay`."""
    return min(step / (step + 9), ema_decay) if step > 1 else 0.0


def _size(size):
    """Formats a side, or (height, width), as "32x32"."""
    return "x".join(map(str, sides(size)))


REPOSITORY = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)


SIDES = Kind(
    "[height, width] in pixels",
    lambda value: isinstance(value, list) and len(value) == 2 and all(COUNT.fits(side) for side in value),
)


# the keys of a scheduler's config that the card shows
LISTS = Kind(
    "lists of timesteps by name and number of steps",
    lambda value: (
        isinstance(value, dict)
        and all(
            WORD.fits(name) and isinstance(lists, dict) and lists and all(map(str.isdecimal, lists))
            for name, lists in value.items()
        )
    ),
)
SCHEDULER = {
    "timestep_lists": LISTS | NULL,
    **dict.fromkeys(("num_train_timesteps", "levels"), COUNT | NULL),
    **dict.fromkeys(("_class_name", "beta_schedule", "prediction_type", "variance_type"), WORD | NULL),
    **dict.fromkeys(("beta_min", "beta_max", "sigma_min", "sigma_max"), NUMBER | NULL),
}


def _scheduler(folder):
    path = folder / "scheduler/scheduler_config.json"
    return check_values(read_config(path, folder), SCHEDULER, path)


def _network(part, cls, folder):
    """Builds the network from the config in the folder `part`, without weights."""
    with naming(part / "config.json"), torch.device("meta"):
        network = cls.from_config(read_config(part / "config.json", folder))
        size = network.config.sample_size
        if size is not None and not SIDES.fits(list(sides(size))):
            raise ValueError(f"sample_size={size!r} must be {SIDES.words}, or one number for both")
        network.class_names, getattr(network, "null_class", None)  # these raise ValueError if they are invalid
        return network


def _continuous_process(scheduler):
    """Describes the process of a scheduler in continuous time; None for discrete time."""
    cls = class_of_part("scheduler", scheduler["_class_name"] or "")
    if cls is None or not cls.is_continuous:
        return None
    process = cls.process_class.short_name
    if scheduler.get("trained_betas"):
        return f"{process} SDE through the betas of a chain"
    name = "beta" if scheduler["sigma_min"] is None else "sigma"
    return f"{process} SDE, {name} {scheduler[f'{name}_min']} to {scheduler[f'{name}_max']}"


EVALUATION_PROGRAMS = (["ddpm-hf", "evaluate"], ["python", "training/evaluate.py"])


def evaluation_command(text: str | None, repo_id: str | None = None) -> str | None:
    """Returns the evaluation command quoted for a shell; None unless it is a call of one of `EVALUATION_PROGRAMS`.

    Args:
        repo_id: the repository that takes the place of the pipeline's folder; None leaves it.
    """
    try:
        words = shlex.split(text or "")
    except ValueError:
        return None
    options = [word for word in words[3:] if word.startswith("--")]
    is_call = words[:2] in EVALUATION_PROGRAMS and len(words) > 2 and text.isprintable()
    if repo_id is not None:
        words[2:3] = [repo_id]
    return shlex.join(words) if is_call and all(re.fullmatch(r"--[\w.]+(=.*)?", word) for word in options) else None


def card_text(folder: str | os.PathLike, repo_id: str | None = None, **kwargs) -> str:
    """Returns the text of README.md: `model_card`, and a last line with its digest for `is_our_card`."""
    return _signed(str(model_card(folder, repo_id, **kwargs)))


def _results(evaluation, quality, task, command, repo_id):
    """Converts bits/dim and the metrics of samples to entries of the Hub's model-index."""
    results = [] if evaluation is None else [_result(evaluation, task, command)]
    for metric in quality["metrics"] if quality else ():
        own = evaluation_command(quality["command"], repo_id)
        results.append(
            EvalResult(
                task_type=task,
                dataset_type=printable(quality["data"]),
                dataset_name=printable(quality["data"]),
                dataset_split=quality["split"] and printable(quality["split"]),
                dataset_args={"images": metric["real_images"]} if metric["real_images"] else None,
                metric_type=re.sub(r"[^a-z0-9]+", "-", metric["name"].lower()),
                metric_name=f"{metric['name']}, {metric['generated_images']:,} samples",
                metric_value=round(metric["value"], 4),
                metric_args={"extractor": metric["extractor"], **({"command": own} if own else {})},
            )
        )
    return results


def _result(evaluation, task, command):
    """Converts an evaluation to an entry of the Hub's model-index."""
    return EvalResult(
        task_type=task,
        dataset_type=printable(evaluation["data"]),
        dataset_name=printable(evaluation["data"]),
        dataset_split=printable(evaluation["split"]),
        dataset_args={"images": evaluation["images"]},
        metric_type="bits_per_dim",
        metric_name="bits/dim, " + ("probability-flow ODE" if "dequantization" in evaluation else "variational bound"),
        metric_value=round(evaluation["total"], 4),
        metric_args={"command": command} if command else None,
    )
