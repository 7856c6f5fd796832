"""The records beside the weights: training.json and evaluation.json, and the digest of the weights they belong to."""

import hashlib
import os
import re
import shutil
from pathlib import Path

from ddpm_hf.files.digests import file_sha256
from ddpm_hf.files.guarded import (
    COUNT,
    INTEGER,
    NULL,
    NUMBER,
    PICTURE_BYTES,
    SHARE,
    TEXT,
    WORD,
    Kind,
    check_file,
    check_values,
    read_json,
)
from ddpm_hf.files.label_names import are_label_names
from ddpm_hf.files.pipeline_folder import STAGES, variants_in

NAMES = Kind("a list of at most 100,000 texts of 500 characters", are_label_names)


# the files that describe a run: its record, how the weights were measured, and their pictures
RECORD = re.compile(
    r"(training|evaluation)\.(json|csv|png)|samples\.png|animation\.(webp|gif)|evaluation-(neighbors|precision)\.png"
)


VERSIONS = Kind(
    "versions by name",
    lambda value: isinstance(value, dict) and all(WORD.fits(word) for pair in value.items() for word in pair),
)


SUBSET = Kind("the number of images {of: ...}", lambda value: isinstance(value, dict) and COUNT.fits(value.get("of")))


HELD_OUT = Kind(
    "the bits/dim of held-out images {step: ..., images: ..., total: ..., standard_error: ...}",
    lambda value: (
        isinstance(value, dict)
        and all(COUNT.fits(value.get(key)) for key in ("step", "images"))
        and NUMBER.fits(value.get("total"))
        and (NUMBER | NULL).fits(value.get("standard_error"))
    ),
)


COMMAND = Kind("one line of at most 4,000 characters", lambda value: isinstance(value, str) and len(value) <= 4000)


PLAIN = Kind(
    "1 to 200 letters, digits, spaces and . : / + -",
    lambda value: isinstance(value, str) and re.fullmatch(r"[\w .:/+-]{1,200}", value) is not None,
)


METRIC = {
    **dict.fromkeys(("name", "kind", "extractor"), PLAIN),
    "value": NUMBER,
    "standard_error": NUMBER | NULL,
    "generated_images": COUNT,
    "real_images": COUNT | NULL,
}


def _fits(value, schema):
    return isinstance(value, dict) and all(kind.fits(value.get(key)) for key, kind in schema.items())


SAMPLE_QUALITY = Kind(
    "the metrics of generated images {data: ..., split: ..., command: ..., metrics: [{name: ..., value: ..., ...}]}",
    lambda value: (
        _fits(value, {"data": TEXT, "split": TEXT | NULL, "command": COMMAND | NULL, "sampler": TEXT | NULL})
        and isinstance(value.get("metrics"), list)
        and len(value["metrics"]) <= 100
        and all(_fits(metric, METRIC) for metric in value["metrics"])
    ),
)


# what training/train.py writes, and training/evaluate.py by the bound or by the ODE, as far as others read it; keys that may
# be null may be left out
TRAINING = {
    **dict.fromkeys(("data", "split"), TEXT),
    **dict.fromkeys(("steps", "batch_size", "gradient_accumulation_steps"), COUNT),
    **dict.fromkeys(("learning_rate", "ema_decay"), NUMBER),
    **{"held_out": SHARE | NULL, "images": COUNT | NULL},
    **{"seed": INTEGER, "loss": WORD, "weighting": WORD | NULL, "preset": TEXT | NULL, "weights": WORD | NULL},
    **{"hub_dataset": TEXT | NULL, "label_names": NAMES | NULL, "versions": VERSIONS | NULL},
    **{"eval_evaluations": COUNT | NULL, "held_out_bits_per_dim": HELD_OUT | NULL},
}


EVALUATION = {
    **dict.fromkeys(("data", "split"), TEXT),
    **dict.fromkeys(("total", "prior", "kl", "decoder"), NUMBER),
    **dict.fromkeys(("images", "steps", "first_timestep"), COUNT),
    **dict.fromkeys(("standard_error", "sampling_error", "evaluations_per_image"), NUMBER | NULL),
    **{"seed": INTEGER, "subset": SUBSET | NULL, "command": COMMAND | NULL, "weights": WORD | NULL},
    "held_out": SHARE | NULL,
    "sample_quality": SAMPLE_QUALITY | NULL,
}


EVALUATION_OF_SAMPLES = {"sample_quality": SAMPLE_QUALITY, "weights": WORD | NULL}  # where bits/dim were not measured


EVALUATION_BY_ODE = {
    **{
        key: EVALUATION[key]
        for key in (
            "data",
            "split",
            "total",
            "images",
            "seed",
            "standard_error",
            "subset",
            "held_out",
            "command",
            "weights",
            "sample_quality",
        )
    },
    **{"dequantization": WORD, "tolerance": NUMBER, "evaluations_per_image": NUMBER},
}


def read_record(path: Path, folder: Path) -> dict:
    """training.json or evaluation.json of the pipeline in `folder`.

    Raises as `read_json`; ValueError for what training/train.py and evaluate.py do not write.
    """
    values = read_json(path, folder)
    if path.stem == "training":
        schema = TRAINING
    elif "total" not in values and "sample_quality" in values:
        schema = EVALUATION_OF_SAMPLES
    else:
        schema = EVALUATION_BY_ODE if "dequantization" in values else EVALUATION
    return check_values(values, schema, path, mend="remove the file")


def weights_digest(folder: Path) -> str | None:
    """SHA-256 of the network's weights in a saved pipeline, by which numbers are known to be of them; None if there are none.

    It is of the weights that are opened without a variant: others, such as "fp16", may stand beside them.
    """
    paths = variants_in(folder / "unet").get("diffusion_pytorch_model", [])
    digest = hashlib.sha256()
    for path in paths:
        if path.suffix == ".safetensors":
            digest.update(f"{path.name} {file_sha256(check_file(path, folder, None))}".encode())
    return digest.hexdigest() if paths else None


def records_of(folder: Path, pipeline_folder: Path | None = None) -> dict[str, dict | None]:
    """The records of a saved pipeline, by "training" and "evaluation": None for a record of other weights.

    Records that do not exist are left out. Raises ValueError for what training/train.py and evaluate.py do not write.

    Args:
        folder: of the pipeline.
        pipeline_folder: the folder of the cascade, if `folder` is that of a stage in it.
    """
    digest, records = weights_digest(folder), {}
    for name in ("training", "evaluation"):
        path = folder / f"{name}.json"
        if os.path.lexists(path):
            values = read_record(path, pipeline_folder or folder)
            records[name] = values if values["weights"] in (None, digest) else None
    return records


def copy_record(source: Path | None, folder: Path) -> None:
    """Copies card, license, pictures and numbers of the pipeline in `source` and its stages, where the weights are the same."""
    for stage in ("", *STAGES) if source else ():
        old, new = source / stage, folder / stage
        has_networks = (old / "unet").is_dir() and (new / "unet").is_dir()
        if has_networks and weights_digest(old) == weights_digest(new) is not None:
            for path in old.iterdir():
                if RECORD.fullmatch(path.name) or path.name in ("README.md", "LICENSE"):
                    shutil.copyfile(check_file(path, source, PICTURE_BYTES), new / path.name)
