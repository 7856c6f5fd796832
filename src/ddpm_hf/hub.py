"""What stands beside the weights in a published folder: the model card."""

import json
import os
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData

from .unet import DDPMUNet

# installed beside the package; at the project's root in a checkout
TEMPLATES = (Path(__file__).parent / "model_card.md", Path(__file__).parents[2] / "model_card.md")


def write_model_card(folder: str | os.PathLike, repo_id: str | None = None) -> Path:
    """Writes README.md of a saved pipeline, as `model_card` makes it; returns its path. Arguments and errors are its."""
    return write_whole(Path(folder) / "README.md", str(model_card(folder, repo_id)))


def write_whole(path: Path, text: str) -> Path:
    """Writes a text file by way of a temporary name, so that it is never there in part; returns its path."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    os.replace(temporary, path)
    return path


def has_our_card(folder: str | os.PathLike) -> bool:
    """Whether README.md of a saved pipeline is word for word what `write_model_card(folder)` would write now."""
    card = Path(folder) / "README.md"
    try:
        return card.read_text(encoding="utf-8") == str(model_card(folder))
    except (OSError, KeyError, ValueError):  # no card, or not a folder that one of ours could be of
        return False


def model_card(folder: str | os.PathLike, repo_id: str | None = None) -> ModelCard:
    """The card of a saved pipeline from `model_card.md` and what the folder tells of itself.

    Args:
        folder: a saved pipeline; training.json and evaluation.json in it are told where they are.
        repo_id: what the card's examples open; None for the name of the folder, or of the run whose "pipeline" it is.

    Raises:
        FileNotFoundError: not a saved pipeline.
        ValueError: its network is not one that `DDPMUNet` supports.
    """
    folder = Path(folder)
    unet, scheduler = _read(folder / "unet/config.json"), _read(folder / "scheduler/scheduler_config.json")
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
    return ModelCard.from_template(
        ModelCardData(
            library_name="diffusers",
            pipeline_tag="unconditional-image-generation",
            tags=["ddpm", "ddpm-hf", "diffusion"],
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
        training=training,
        evaluation=evaluation,
    )


def _read(path):
    return json.loads(path.read_text(encoding="utf-8"))
