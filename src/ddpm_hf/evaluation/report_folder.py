"""The training data of a pipeline that is evaluated, and the folder for the results."""

import contextlib
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
from PIL import Image

from ddpm_hf.arguments import shown
from ddpm_hf.data.sources import BUILT_IN, is_hub_id, load_images, public_name, public_path
from ddpm_hf.evaluation.likelihood_report import LikelihoodReport, plot_terms, terms_table
from ddpm_hf.evaluation.sheets import save_picture
from ddpm_hf.files.atomic import check_output_folder, is_writable, write_text
from ddpm_hf.hub.card import evaluation_command, has_our_card, write_model_card
from ddpm_hf.hub.records import read_record, weights_digest

REPORT, TERMS = "evaluation.json", ("evaluation.csv", "evaluation.png")
PICTURES = ("evaluation-neighbors.png", "evaluation-precision.png")  # of the quality of samples


def data_of(pipeline: str, folder: Path | None = None) -> str:
    """Return the built-in or Hub data set on which a pipeline was trained, from its training.json; digits without that file.

    Args:
        folder: the snapshot of a pipeline from the Hub.

    Raises:
        ValueError: the data was a local folder or has no Hub id, or training.json is invalid.
    """
    record = _training_record(folder or pipeline) or {"data": "digits"}
    data = record.get("data") if record.get("data") in BUILT_IN else record.get("hub_dataset")
    if data is None:
        raise ValueError(f"{pipeline} was trained on {shown(record['data'])}, a local folder or file; give --data")
    if data not in BUILT_IN and not is_hub_id(data):  # a stranger does not choose which files are read
        raise ValueError(
            f"{pipeline}: hub_dataset={shown(data)} in its training.json is not the id of a data set on the Hub; give --data"
        )
    return data


def held_out_of(pipeline: str | Path, data: str, split: str, images: int | None = None) -> float:
    """Return the share of this split that the training held out; 0 for data that the pipeline was not trained on.

    Args:
        images: number of images in the split. If it has changed since the training, the held-out images are unknown: the
            result is 0, with a message on stderr.

    Raises:
        ValueError: training.json is invalid.
    """
    record = _training_record(pipeline)
    if (record.get("data"), record.get("split")) != (public_name(data), split) or not record["held_out"]:
        return 0.0
    if None not in (images, record["images"]) and images != record["images"]:
        print(
            f"the run set aside held_out={record['held_out']:g} of {record['images']} images, but {data} has {images}: all are "
            "measured, those that it was trained on too",
            file=sys.stderr,
        )
        return 0.0
    return record["held_out"]


def open_split(data: str, split: str | None, pipeline: str | Path) -> tuple[datasets.Dataset, str]:
    """Open the images to measure.

    Args:
        split: a split, or None for "test". If the data has no such split, None takes the split of which the training of the
            pipeline held images out, with a message on stdout.

    Returns:
        All images of the split, and its name.

    Raises:
        ValueError: the data has no such split, or training.json is invalid.
    """
    if split is not None:
        return load_images(data, split), split
    try:
        return load_images(data, "test"), "test"
    except ValueError as error:
        if not re.match(r"split='test' is not|Unknown split|Bad split", str(error)):
            raise
        record = _training_record(pipeline)
        trained_split = record.get("split") or "test"
        if not held_out_of(pipeline, data, trained_split):
            raise ValueError(f"give --split: without it, {error}") from None
    print(f"{data} has no split 'test': measuring the images of {trained_split!r} that the run held out")
    return load_images(data, trained_split), trained_split


def trained_split(pipeline: str | Path, data: str) -> str:
    """Return the split on which a pipeline was trained; "train" for data that it was not trained on.

    Raises:
        ValueError: training.json is invalid.
    """
    record = _training_record(pipeline)
    return record["split"] if record.get("data") == public_name(data) else "train"


def _training_record(pipeline):
    path = Path(pipeline) / "training.json"
    return read_record(path, path.parent) if path.is_file() else {}


def check_out(out: str) -> None:
    """Check, before anything is computed, that an evaluation may be written to this folder.

    Raises:
        ValueError: it is not a folder, is not writable, or has files of the same names from elsewhere.
    """
    folder = Path(out)
    check_output_folder(folder, f"--out {out}")
    foreign = [
        name
        for name in (REPORT, *TERMS, *PICTURES)
        if os.path.lexists(folder / name) and name not in _report_files(folder)
    ]
    if foreign:
        raise ValueError(
            f"--out {out} holds {foreign[0]}, which is not of an evaluation; move it, or give another folder"
        )


def _report_files(folder: Path) -> tuple[str, ...]:
    """Return the names of the files that an earlier evaluation has written to a folder."""
    report = _read_report(folder)
    quality = report.get("sample_quality")
    command = report.get("command") or (quality.get("command") if isinstance(quality, dict) else None)
    if not isinstance(command, str) or evaluation_command(command) is None:
        return ()
    every_term = "kl" in report and report.get("sampling_error", 0) is None
    return (REPORT, *(TERMS if every_term else ()), *(PICTURES if quality else ()))


def _read_report(folder: Path) -> dict:
    """Return the content of a folder's evaluation.json; {} without a valid one."""
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return report if isinstance(report, dict) else {}


def own_folder(pipeline: str) -> Path | None:
    """Return the folder of a pipeline if a run of this user saved it, so that it may be written to; else None."""
    folder = Path(pipeline).resolve()
    files = [folder / "model_index.json", folder.parent / "config.yaml", folder.parent / "environment.json"]
    is_of_run = folder.name == "pipeline" and all(path.is_file() for path in files)
    is_own = is_of_run and all(path.stat().st_uid == os.geteuid() for path in files if hasattr(os, "geteuid"))
    return folder if is_own and is_writable(folder) else None


def write_report(folder: Path, pipeline: str, values: dict, report: LikelihoodReport, chain: list[int]) -> None:
    """Write the results of an evaluation, replacing earlier ones; in the pipeline's own folder also update the model card.

    The quality of samples of the same weights that evaluation.json holds is kept.

    Args:
        pipeline: the folder or Hub id from the command line.
        values: the content of evaluation.json.
    """
    every_term = hasattr(report.result, "terms")
    with _updated_card(folder, pipeline) as weights:
        outdated = (
            TERMS if folder == own_folder(pipeline) else [name for name in _report_files(folder) if name in TERMS]
        )
        quality = _earlier(folder, pipeline, weights).get("sample_quality")
        for name in outdated:
            (folder / name).unlink(missing_ok=True)
        values = {**values, **weights, **({"sample_quality": quality} if quality else {})}
        write_text(folder / REPORT, json.dumps(values, indent=2) + "\n")
        if every_term:
            write_text(folder / TERMS[0], terms_table(report.result, chain))
            plot_terms(report.result, chain, folder / TERMS[1])
    print(f"wrote {folder}/evaluation.json" + (", .csv and .png" if every_term else ""))


def write_quality(folder: Path, pipeline: str, quality: dict, pictures: dict[str, Image.Image]) -> None:
    """Write the quality of samples beside the bits/dim of the same weights; else as `write_report`.

    Args:
        quality: the entry "sample_quality" of evaluation.json.
        pictures: a picture for each of some of `PICTURES`; earlier ones are removed.
    """
    with _updated_card(folder, pipeline) as weights:
        earlier = _earlier(folder, pipeline, weights)
        for name in PICTURES if folder == own_folder(pipeline) else _report_files(folder):
            if name in PICTURES:
                (folder / name).unlink(missing_ok=True)
        write_text(folder / REPORT, json.dumps({**earlier, **weights, "sample_quality": quality}, indent=2) + "\n")
        for name, picture in pictures.items():
            save_picture(picture, folder / name)
    print(f"wrote {', '.join(f'{folder}/{name}' for name in (REPORT, *pictures))}")


@contextlib.contextmanager
def _updated_card(folder: Path, pipeline: str) -> Iterator[dict[str, str | None]]:
    """Make the folder; within the context evaluation.json is written, after it the pipeline's own card.

    Yields {"weights": digest} in the pipeline's own folder, else {}.
    """
    is_own = os.path.isdir(pipeline) and folder.resolve() == Path(pipeline).resolve()
    our_card = is_own and has_our_card(folder)  # before evaluation.json changes, which the card shows
    folder.mkdir(exist_ok=True)
    yield {"weights": weights_digest(folder)} if is_own else {}
    if our_card:
        write_model_card(folder)
    elif is_own and (folder / "README.md").is_file():
        print(f"{folder}/README.md is not as this package writes it, and stays as it is")


def _earlier(folder: Path, pipeline: str, weights: dict) -> dict:
    """Return the earlier content of evaluation.json if it is of the same weights, or elsewhere of the same pipeline."""
    report = _read_report(folder)
    if weights:
        return report if report.get("weights") == weights["weights"] else {}
    quality = report.get("sample_quality")
    commands = [report.get("command"), quality.get("command") if isinstance(quality, dict) else None]
    named = [shlex.split(text)[2:3] for text in commands if isinstance(text, str) and evaluation_command(text)]
    return report if named and all(words == [public_path(pipeline)] for words in named) else {}
