"""The pipeline that a run saves: weights, the record of their training, pictures and a model card."""

import contextlib
import json
import os
import shutil
from pathlib import Path

from ddpm_hf.data.sources import BUILT_IN, public_name
from ddpm_hf.files.atomic import replacing_folder, write_text
from ddpm_hf.hub.card import write_model_card
from ddpm_hf.hub.records import weights_digest
from ddpm_hf.pipelines.ddpm import DDPMImagePipeline
from ddpm_hf.training.config import TrainConfig, values_of
from ddpm_hf.training.environment import MODULES
from ddpm_hf.training.messages import print_above_progress_bar

# keys that are left out of training.json
PRIVATE = {"output_dir", "resume", "push_to_hub", "hub_private", "license", "eval_extractor"}


def save_pipeline(
    pipeline: DDPMImagePipeline,
    folder: Path,
    *,
    config: TrainConfig,
    step: int,
    class_names: list[str] | None = None,
    split_size: int | None = None,
    held_out_images: int | None = None,
) -> None:
    """Save a pipeline atomically after `step` steps of training.

    Args:
        config: the run's config.
        class_names: class names of labels 0, 1, ... in the data.
        split_size: number of images in the training split, held-out images included.
        held_out_images: number of images whose bits/dim the run measures; None if it does not.
    """
    with replacing_folder(folder) as temporary:
        pipeline.save_pretrained(temporary)
        record = _record(config, step, temporary) | {"images": split_size, "label_names": class_names}
        record["held_out_bits_per_dim"] = held_out_images and _held_out_bits_per_dim(folder.parent, held_out_images)
        write_text(temporary / "training.json", json.dumps(record, indent=2) + "\n")
        pictures = {"training.png": "curves.png", "samples.png": f"samples/{step:07d}.png"}  # of these weights
        for name, source in pictures.items():
            if (folder.parent / source).is_file():
                shutil.copy(folder.parent / source, temporary / name)
        try:
            write_model_card(temporary)
        except ValueError as error:  # a pipeline without a card is better than none
            print_above_progress_bar(f"the pipeline has no model card: {' '.join(str(error).split())}")


def _record(config, step, folder):
    """Return the content of training.json."""
    record = {key: value for key, value in values_of(config).items() if key not in PRIVATE}
    record["preset"] = config.preset
    for key in ("data", "eval_data", "init_from"):
        if record[key]:
            record[key] = public_name(record[key])
    is_local = os.path.exists(config.data) or config.data in BUILT_IN
    record["hub_dataset"] = None if is_local else config.data
    record["weights"] = weights_digest(folder)
    record["versions"] = {module.__name__: module.__version__ for module in MODULES}
    record["steps"] = step
    return record


def _held_out_bits_per_dim(run, images):
    """Return the last measurement in a run's metrics.jsonl; None if there is none."""
    row = last_measurement(run)
    if row is None:
        return None
    error = row.get("bits_per_dim_standard_error")
    return {"step": row["step"], "images": images, "total": row["bits_per_dim"], "standard_error": error}


def last_measurement(run: Path) -> dict | None:
    """Return the last row of a run's metrics.jsonl that has held-out bits/dim; None if there is none."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for line in reversed(lines):
        with contextlib.suppress(ValueError):  # the disk was full
            row = json.loads(line)
            if row.get("bits_per_dim") is not None:
                return row
    return None
