"""What stands beside the weights in a published folder: the model card."""

import hashlib
import json
import os
from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .push import read_json, read_text, told_of
from .unet import DDPMUNet, sides

# installed beside the package; at the project's root in a checkout
TEMPLATES = (Path(__file__).parent / "model_card.md", Path(__file__).parents[2] / "model_card.md")
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
    return write_whole(Path(folder) / "README.md", card_text(folder, repo_id))


def write_whole(path: Path, text: str) -> Path:
    """Writes a text file by way of a temporary name, so that it is never there in part; returns its path."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    os.replace(temporary, path)
    return path


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
        ValueError: its network is not one that `DDPMUNet` supports.
    """
    folder = Path(folder)
    index = read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    if "upsampler" in index:
        return _card_of_two_stages(folder, repo_id or folder.name, license)
    unet, scheduler = read_json(folder / "unet/config.json"), read_json(folder / "scheduler/scheduler_config.json")
    stock_prediction = scheduler.get("prediction_type", "epsilon")
    process = _continuous_process(scheduler)
    scheduler = {**scheduler, **scheduler.get("_ddpm_hf", {})}
    told = told_of(folder)
    training, evaluation = told.get("training"), told.get("evaluation")
    low = index.get("low_resolution")
    name = folder.name.lstrip(".")  # a folder that is being written has a dot
    repo_id = repo_id or (folder.absolute().parent.name if name == "pipeline" else name)
    size = unet["sample_size"]
    if size is None:
        images = "images of any size"
    else:
        images = "x".join(map(str, sides(size))) + " images"
    with torch.device("meta"):
        network = DDPMUNet.from_config(unet)
    variance = str(scheduler.get("variance_type") or "")
    reason = None
    if low:
        reason = "a network that makes images larger"
    elif process:
        reason = "a network of continuous time"
    elif stock_prediction == "previous":
        reason = "a network that predicts the previous image"
    elif variance.startswith("learned"):
        reason = "with learned variances"
    elif unet.get("num_class_embeds") is not None or unet.get("class_embed_type") is not None:
        reason = "a class-conditional network"
    elif size is None:
        reason = "a network of no fixed size"
    cited = ["ddpm"] + (["score-sde"] if process else [])
    if reason == "with learned variances" or scheduler.get("beta_schedule") == "cosine":
        cited.append("iddpm")
    classifier = read_json(folder / "classifier/config.json") if "classifier" in index else None
    cited += ["adm"] if classifier else []
    cited += ["cfg"] if network.null_class is not None else []
    return ModelCard.from_template(
        ModelCardData(
            license=license,
            library_name="diffusers",
            pipeline_tag="image-to-image" if low else "unconditional-image-generation",
            tags=["ddpm", "ddpm-hf", "diffusion"],
            datasets=[training["hub_dataset"]] if training and training.get("hub_dataset") else None,
            model_name=repo_id.split("/")[-1],
            eval_results=[_result(evaluation)] if evaluation else None,
        ),
        template_path=str(next(path for path in TEMPLATES if path.is_file())),
        title=repo_id,
        repo_id=repo_id,
        images=images,
        parameters=f"{network.num_parameters():,}",
        process=process,
        steps=scheduler.get("num_train_timesteps"),
        beta_schedule=scheduler.get("beta_schedule"),
        prediction_type=scheduler.get("prediction_type", "epsilon"),
        variance_type=variance,
        levels=scheduler.get("levels"),
        classes=network.num_classes,
        label_dropout=network.null_class is not None,
        classifier=classifier,
        pipeline_class="DDPMSuperResolutionPipeline" if low else "DDPMImagePipeline",
        low=low and f"{low[0]}x{low[1]}",
        stock=reason is None,
        stock_reason=reason,
        remote_code=remote_code,
        pictures=[path.name for path in folder.glob("*.png")],
        training=training,
        configuration=training and json.dumps(training, indent=2),
        evaluation=evaluation,
        citations="\n\n".join(CITATIONS[name] for name in cited),
    )


def _continuous_process(scheduler):
    """What the card says of a scheduler's config in continuous time; None of another."""
    kind = {"VPSDEScheduler": "VP", "SubVPSDEScheduler": "sub-VP", "VESDEScheduler": "VE"}.get(
        scheduler.get("_class_name")
    )
    if kind is None or scheduler.get("trained_betas"):
        return kind and f"{kind} SDE through the betas of a chain"
    name = "sigma" if kind == "VE" else "beta"
    return f"{kind} SDE, {name} {scheduler[f'{name}_min']} to {scheduler[f'{name}_max']}"


def _card_of_two_stages(folder, repo_id, license):
    """Of a cascade: how it is opened; its stages have cards of their own."""
    upsampler = read_json(folder / "upsampler/model_index.json")
    size, low = read_json(folder / "upsampler/unet/config.json")["sample_size"], upsampler["low_resolution"]
    side = "x".join(map(str, sides(size)))
    data = ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=["ddpm", "ddpm-hf", "diffusion"],
        model_name=repo_id.split("/")[-1],
    )
    return ModelCard(f"""---
{data.to_yaml()}
---

# {repo_id}

Two denoising diffusion models in a row (Dhariwal & Nichol 2021, section 5): one draws images of {low[0]}x{low[1]}, the other
makes them {side}. Each is a whole pipeline in its folder, `base` and `upsampler`.

## How to open it

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{repo_id}", trust_remote_code=True)  # from the code in this repository

from ddpm_hf import CascadePipeline  # with the package

pipe = CascadePipeline.from_pretrained("{repo_id}")
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
    return EvalResult(
        task_type="unconditional-image-generation",
        dataset_type=evaluation["data"],
        dataset_name=evaluation["data"],
        dataset_split=evaluation["split"],
        dataset_args={"images": evaluation["images"]},
        metric_type="bits_per_dim",
        metric_name="bits/dim, " + ("probability-flow ODE" if "dequantization" in evaluation else "variational bound"),
        metric_value=round(evaluation["total"], 4),
        metric_args={"command": evaluation["command"]} if evaluation.get("command") else None,
    )
