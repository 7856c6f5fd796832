"""What stands beside the weights in a published folder: the model card."""

import hashlib
import json
import os
from pathlib import Path

import torch
from huggingface_hub import CommitInfo, EvalResult, ModelCard, ModelCardData

from .push import push_folder
from .unet import DDPMUNet

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
    """Whether README.md of a saved pipeline is as `write_model_card` left it, by the digest in its last line."""
    try:
        text = (Path(folder) / "README.md").read_text(encoding="utf-8")
    except OSError:
        return False
    return text == _signed(text.rpartition("\n<!--")[0])


def _signed(text):
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{text}\n<!-- of ddpm-hf, {digest}: written anew with the numbers of the folder, unless it is changed by hand -->\n"


def push_pipeline(folder: str | os.PathLike, repo_id: str, *, license: str | None = None, **options) -> CommitInfo:
    """`push_folder` with the folder's card written for `repo_id` and `license`, unless it was changed by hand.

    Args:
        options: of `push_folder`, but for card. Its errors are these.
    """
    card = card_text(folder, repo_id, license) if has_our_card(folder) else None
    return push_folder(folder, repo_id, card=card, **options)


def model_card(folder: str | os.PathLike, repo_id: str | None = None, license: str | None = None) -> ModelCard:
    """The card of a saved pipeline from `model_card.md` and what the folder tells of itself.

    Args:
        folder: a saved pipeline; training.json, evaluation.json and pictures in it are told where they are.
        repo_id: what the card's examples open; None for the name of the folder, or of the run whose "pipeline" it is.
        license: the Hub's name of one, "apache-2.0"; None says nothing of it.

    Raises:
        FileNotFoundError: not a saved pipeline.
        ValueError: its network is not one that `DDPMUNet` supports.
    """
    folder = Path(folder)
    unet, scheduler = _read(folder / "unet/config.json"), _read(folder / "scheduler/scheduler_config.json")
    stock_prediction = scheduler.get("prediction_type", "epsilon")
    scheduler = {**scheduler, **scheduler.get("_ddpm_hf", {"levels": 256})}
    training, evaluation = (
        _read(folder / name) if (folder / name).is_file() else None for name in ("training.json", "evaluation.json")
    )
    name = folder.name.lstrip(".")  # a folder that is being written has a dot
    repo_id = repo_id or (folder.absolute().parent.name if name == "pipeline" else name)
    size = unet["sample_size"]
    if size is None:
        images = "images of any size"
    else:
        sides = (size, size) if isinstance(size, int) else size
        images = "x".join(str(side) for side in sides) + " images"
    with torch.device("meta"):
        parameters = DDPMUNet.from_config(unet).num_parameters()
    reason = None
    if stock_prediction == "previous":
        reason = "a network that predicts the previous image"
    elif scheduler["variance_type"].startswith("learned"):
        reason = "with learned variances"
    cited = ["ddpm"]
    if reason == "with learned variances" or scheduler["beta_schedule"] == "cosine":
        cited.append("iddpm")
    return ModelCard.from_template(
        ModelCardData(
            license=license,
            library_name="diffusers",
            pipeline_tag="unconditional-image-generation",
            tags=["ddpm", "ddpm-hf", "diffusion"],
            datasets=[training["hub_dataset"]] if training and training.get("hub_dataset") else None,
            model_name=repo_id.split("/")[-1],
            eval_results=[_result(evaluation)] if evaluation else None,
        ),
        template_path=str(next(path for path in TEMPLATES if path.is_file())),
        title=repo_id,
        repo_id=repo_id,
        images=images,
        parameters=f"{parameters:,}",
        steps=scheduler["num_train_timesteps"],
        beta_schedule=scheduler["beta_schedule"],
        prediction_type=scheduler["prediction_type"],
        variance_type=scheduler["variance_type"],
        levels=scheduler["levels"],
        stock=reason is None,
        stock_reason=reason,
        pictures=[path.name for path in folder.glob("*.png")],
        training=training,
        configuration=training and json.dumps(training, indent=2),
        evaluation=evaluation,
        citations="\n\n".join(CITATIONS[name] for name in cited),
    )


def card_text(folder: str | os.PathLike, repo_id: str | None = None, license: str | None = None) -> str:
    """README.md with `model_card`, and a last line by which `has_our_card` knows it."""
    return _signed(str(model_card(folder, repo_id, license)))


def _result(evaluation):
    """What was measured, as the Hub's model-index has it."""
    return EvalResult(
        task_type="unconditional-image-generation",
        dataset_type=evaluation["data"],
        dataset_name=evaluation["data"],
        dataset_split=evaluation["split"],
        dataset_args={"images": evaluation["images"]},
        metric_type="bits_per_dim",
        metric_name="bits/dim, variational bound",
        metric_value=round(evaluation["total"], 4),
    )


def _read(path):
    return json.loads(path.read_text(encoding="utf-8"))
