"""What stands beside the weights in a published folder: the model card."""

import hashlib
import json
import os
import re
import shlex
from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ddpm_hf.arguments import sides
from ddpm_hf.files.atomic import final_name, write_text
from ddpm_hf.files.guarded import COUNT, NULL, NUMBER, WORD, Kind, check_values, naming, read_json, read_text
from ddpm_hf.files.pipeline_folder import PARTS, STAGES, component_classes, read_config
from ddpm_hf.hub.records import records_of
from ddpm_hf.models.classifier import NoisyClassifier
from ddpm_hf.models.unet import DDPMUNet
from ddpm_hf.schedulers.ddpm import LEARNED_VARIANCES

# installed beside the package; at the project's root in a checkout
TEMPLATES = (Path(__file__).parents[1] / "model_card.md", Path(__file__).parents[3] / "model_card.md")


CITATIONS = {
    "ddpm": """@inproceedings{ho2020denoising,
  title = {Denoising Diffusion Probabilistic Models},
  author = {Jonathan Ho and Ajay Jain and Pieter Abbeel},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2020}
}""",
    "iddpm": """@inproceedings{nichol2021improved,
  title = {Improved Denoising Diffusion Probabilistic Models},
  author = {Alexander Quinn Nichol and Prafulla Dhariwal},
  booktitle = {International Conference on Machine Learning},
  year = {2021}
}""",
    "adm": """@inproceedings{dhariwal2021diffusion,
  title = {Diffusion Models Beat {GANs} on Image Synthesis},
  author = {Prafulla Dhariwal and Alexander Quinn Nichol},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2021}
}""",
    "score-sde": """@inproceedings{song2021scorebased,
  title = {Score-Based Generative Modeling through Stochastic Differential Equations},
  author = {Yang Song and Jascha Sohl-Dickstein and Diederik P. Kingma and Abhishek Kumar and Stefano Ermon and Ben Poole},
  booktitle = {International Conference on Learning Representations},
  year = {2021}
}""",
    "cfg": """@inproceedings{ho2021classifier,
  title = {Classifier-Free Diffusion Guidance},
  author = {Jonathan Ho and Tim Salimans},
  booktitle = {NeurIPS Workshop on Deep Generative Models and Downstream Applications},
  year = {2021}
}""",
}


def write_model_card(folder: str | os.PathLike, repo_id: str | None = None) -> Path:
    """Writes README.md of a saved pipeline, as `card_text` makes it; returns its path. Arguments and errors are its."""
    return write_text(Path(folder) / "README.md", card_text(folder, repo_id))


def has_our_card(folder: str | os.PathLike) -> bool:
    """Whether README.md of a saved pipeline is as `write_model_card` left it."""
    path = Path(folder) / "README.md"
    return path.is_file() and is_our_card(read_text(path))


def is_our_card(text: str) -> bool:
    """Whether a card is as `card_text` made it, by the digest in its last line."""
    return text == _signed(text.rpartition("\n\n<!--")[0])


def license_of(text: str) -> str | None:
    """The license in a card's header, if it has one."""
    if not text:
        return None
    try:
        return ModelCard(text, ignore_metadata_errors=True).data.license
    except Exception:  # no YAML
        return None


def licensed(text: str, license: str) -> str:
    """A card with this license in its header; as `card_text` made it if it was.

    Raises:
        ValueError: a header that is no YAML.
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
    """The card of a saved pipeline from `model_card.md` and what the folder tells of itself.

    Args:
        folder: a saved pipeline; training.json, evaluation.json and pictures in it are told where they are.
        repo_id: what the card's examples open; None for the name of the folder, or of the run whose "pipeline" it is.
        license: the Hub's name of one, "apache-2.0"; None says nothing of it.
        remote_code: whether it is the card of a repository's main, beside which the branch "remote-code" is kept.

    Raises:
        FileNotFoundError: not a saved pipeline.
        ValueError: its network is not one that `DDPMUNet` supports; a file in it that is not as it is saved, which is named.
    """
    folder = Path(folder)
    index = read_json(folder / "model_index.json", folder)
    cascade = index.keys() >= {*STAGES}
    classes = component_classes(index, folder, STAGES if cascade else PARTS)
    name = final_name(folder.absolute())
    repo_id = repo_id or (folder.absolute().parent.name if name == "pipeline" else name)
    if cascade:
        return _card_of_two_stages(folder, repo_id, license)
    network, scheduler = _network(folder / "unet", DDPMUNet, folder), _scheduler(folder)
    stock_prediction, process = scheduler["prediction_type"] or "epsilon", _continuous_process(scheduler)
    own_settings = scheduler.get("_ddpm_hf") or {}
    check_values(own_settings, SCHEDULER, folder / "scheduler/scheduler_config.json")
    scheduler |= own_settings
    records = records_of(folder)
    training, evaluation = records.get("training"), records.get("evaluation")
    data_id = (training or {}).get("hub_dataset") or ""
    low = check_values(index, {"low_resolution": SIDES | NULL}, folder / "model_index.json")["low_resolution"]
    low = low and "x".join(map(str, low))
    size = network.config.sample_size
    images = "images of any size" if size is None else "x".join(map(str, sides(size))) + " images"
    variance = scheduler["variance_type"] or ""
    reason = None
    if low:
        reason = "a network that makes images larger"
    elif process:
        reason = "a network of continuous time"
    elif stock_prediction == "previous":
        reason = "a network that predicts the previous image"
    elif variance in LEARNED_VARIANCES:
        reason = "with learned variances"
    elif network.class_embedding is not None:
        reason = "a class-conditional network"
    elif size is None:
        reason = "a network of no fixed size"
    cited = ["ddpm"] + (["score-sde"] if process else [])
    if reason == "with learned variances" or scheduler["beta_schedule"] == "cosine":
        cited.append("iddpm")
    classifier = _network(folder / "classifier", NoisyClassifier, folder) if "classifier" in classes else None
    cited += ["adm"] if classifier else []
    cited += ["cfg"] if network.null_class is not None else []
    return ModelCard.from_template(
        ModelCardData(
            license=license,
            library_name="diffusers",
            pipeline_tag="image-to-image" if low else "unconditional-image-generation",
            tags=["ddpm", "ddpm-hf", "diffusion"],
            datasets=[data_id] if REPOSITORY.fullmatch(data_id) else None,
            model_name=printable(repo_id.split("/")[-1]),
            eval_results=[_result(evaluation)] if evaluation else None,
        ),
        template_path=str(next(path for path in TEMPLATES if path.is_file())),
        title=title(repo_id),
        repo_id=json.dumps(repo_id),
        images=images,
        parameters=f"{network.num_parameters():,}",
        process=process,
        steps=scheduler["num_train_timesteps"],
        beta_schedule=scheduler["beta_schedule"],
        prediction_type=scheduler["prediction_type"] or "epsilon",
        variance_type=variance,
        levels=scheduler["levels"],
        classes=network.num_classes,
        class_names=_listed_names(network.class_names),
        label_dropout=network.null_class is not None,
        classifier=classifier,
        pipeline_class="DDPMSuperResolutionPipeline" if low else "DDPMImagePipeline",
        low=low,
        stock=reason is None,
        stock_reason=reason,
        remote_code=remote_code,
        pictures=[path.name for path in folder.glob("*.png")],
        training=training,
        configuration=training and fenced_json(training),
        evaluation=evaluation,
        command=evaluation and evaluation_command(evaluation["command"]),
        code=code,
        citations="\n\n".join(CITATIONS[name] for name in cited),
    )


REPOSITORY = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)


SIDES = Kind(
    "[height, width] in pixels",
    lambda value: isinstance(value, list) and len(value) == 2 and all(COUNT.fits(side) for side in value),
)


# of a scheduler's config what the card shows
SCHEDULER = {
    **dict.fromkeys(("num_train_timesteps", "levels"), COUNT | NULL),
    **dict.fromkeys(("_class_name", "beta_schedule", "prediction_type", "variance_type"), WORD | NULL),
    **dict.fromkeys(("beta_min", "beta_max", "sigma_min", "sigma_max"), NUMBER | NULL),
}


def _scheduler(folder):
    path = folder / "scheduler/scheduler_config.json"
    return check_values(read_config(path, folder), SCHEDULER, path)


def _network(part, cls, folder):
    """The network whose config lies in the folder `part`, without weights."""
    with naming(part / "config.json"), torch.device("meta"):
        network = cls.from_config(read_config(part / "config.json", folder))
        size = network.config.sample_size
        if size is not None and not SIDES.fits(list(sides(size))):
            raise ValueError(f"sample_size={size!r} must be {SIDES.words}, or one number for both")
        network.class_names, getattr(network, "null_class", None)  # raise what is wrong with them
        return network


def _continuous_process(scheduler):
    """What the card says of a scheduler's config in continuous time; None of another."""
    kind = {"VPSDEScheduler": "VP", "SubVPSDEScheduler": "sub-VP", "VESDEScheduler": "VE"}.get(scheduler["_class_name"])
    if kind is None or scheduler.get("trained_betas"):
        return kind and f"{kind} SDE through the betas of a chain"
    name = "sigma" if kind == "VE" else "beta"
    return f"{kind} SDE, {name} {scheduler[f'{name}_min']} to {scheduler[f'{name}_max']}"


# text of others in a card: what follows is all that puts it there


def printable(text: str) -> str:
    """Text in one line: what does not print, such as line ends and changes of direction, as its escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def code(text: str) -> str:
    """Text as a code span of Markdown."""
    text = printable(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if text.strip("`") != text or text.strip() != text else ""
    return f"{fence}{space}{text}{space}{fence}"


def title(text: str) -> str:
    """Text as that of a heading: plain names as they are, of others each sign of Markdown and HTML escaped."""
    text = printable(text)
    return text if re.fullmatch(r"[\w./ -]+", text) else re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", text)


def fenced_json(values: dict) -> str:
    """JSON for a fenced block, whose end nothing in it can be taken for."""
    return json.dumps(values, indent=2).replace("`", "\\u0060").replace("<", "\\u003c").replace(">", "\\u003e")


EVALUATION_PROGRAMS = (["ddpm-hf", "evaluate"], ["python", "training/evaluate.py"])


def evaluation_command(text: str | None) -> str | None:
    """The command that measured, quoted for a shell word by word; None for anything but a call of `EVALUATION_PROGRAMS`."""
    try:
        words = shlex.split(text or "")
    except ValueError:
        return None
    options = [word for word in words[3:] if word.startswith("--")]
    whole = words[:2] in EVALUATION_PROGRAMS and len(words) > 2 and text.isprintable()
    return shlex.join(words) if whole and all(re.fullmatch(r"--\w+(=.*)?", word) for word in options) else None


def _listed_names(names):
    """The first 20 class names as code spans of a table's cell; "" where they are not known."""
    listed = ", ".join(code(name[:100]) for name in (names or [])[:20] if name)
    return listed.replace("|", "\\|") + (", ..." if len(names or []) > 20 else "")


def _card_of_two_stages(folder, repo_id, license):
    """Of a cascade: how it is opened; its stages have cards of their own."""
    path = folder / "upsampler/model_index.json"
    low = check_values(read_json(path, folder), {"low_resolution": SIDES}, path)["low_resolution"]
    side = "x".join(map(str, sides(_network(folder / "upsampler/unet", DDPMUNet, folder).config.sample_size)))
    data = ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=["ddpm", "ddpm-hf", "diffusion"],
        model_name=printable(repo_id.split("/")[-1]),
    )
    return ModelCard(f"""---
{data.to_yaml()}
---

# {title(repo_id)}

Two denoising diffusion models in a row (Dhariwal & Nichol 2021, section 5): one draws images of {low[0]}x{low[1]}, the other
makes them {side}. Each is a whole pipeline in its folder, `base` and `upsampler`.

## How to open it

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({json.dumps(repo_id)}, trust_remote_code=True)  # from the code in this repository

from ddpm_hf import CascadePipeline  # with the package

pipe = CascadePipeline.from_pretrained({json.dumps(repo_id)})
images = pipe(batch_size=4, num_inference_steps=250, upsampler_steps=250).images
```

## Citation

```bibtex
{CITATIONS["ddpm"]}

{CITATIONS["adm"]}
```
""")


def card_text(folder: str | os.PathLike, repo_id: str | None = None, **kwargs) -> str:
    """README.md with `model_card`, of the same arguments, and a last line by which `has_our_card` knows it."""
    return _signed(str(model_card(folder, repo_id, **kwargs)))


def _result(evaluation):
    """What was measured, as the Hub's model-index has it."""
    command = evaluation_command(evaluation["command"])
    return EvalResult(
        task_type="unconditional-image-generation",
        dataset_type=printable(evaluation["data"]),
        dataset_name=printable(evaluation["data"]),
        dataset_split=printable(evaluation["split"]),
        dataset_args={"images": evaluation["images"]},
        metric_type="bits_per_dim",
        metric_name="bits/dim, " + ("probability-flow ODE" if "dequantization" in evaluation else "variational bound"),
        metric_value=round(evaluation["total"], 4),
        metric_args={"command": command} if command else None,
    )
