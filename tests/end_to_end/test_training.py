"""The line from images to a loadable pipeline, as a user runs it."""

import contextlib
import json
import math
import os
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from diffusers import DDPMPipeline, UNet2DModel
from huggingface_hub import ModelCard
from PIL import Image

from ddpm_hf import DDPMImagePipeline
from ddpm_hf.data.sources import digits
from ddpm_hf.evaluation.sheets import as_sheet
from ddpm_hf.hub.card import write_model_card
from ddpm_hf.training import train
from ddpm_hf.training.command_line import load_config
from ddpm_hf.training.config import ConfigError, TrainConfig
from ddpm_hf.training.inputs import held_out_images, open_data, open_images
from support.scripts import script

SMALL = "--steps 6 --batch_size 16 --sample_every 3 --sample_count 4 --sample_steps 3 --log_every 2 --lr_warmup_steps 2"
NETWORK = [
    "--config",
    "digits",
    "--unet.block_out_channels",
    "[8, 16]",
    "--unet.norm_num_groups",
    "4",
    "--unet.attention_head_dim",
    "8",
]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    """`datasets` sleeps for 5 s at the end of each epoch of a shuffled stream."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)  # not of datasets 4.0


@contextlib.contextmanager
def one_core():
    """Processes started within have one core: several threads of so small a network mostly wait for each other."""
    if not hasattr(os, "sched_setaffinity"):  # macOS
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two runs of the same seed by accelerate launch and by python, the third with another seed."""
    folder = tmp_path_factory.mktemp("runs")
    accelerate = [str(Path(sys.executable).parent / "accelerate"), "launch", "--cpu", "--num_processes", "1"]
    with one_core():
        script("train.py", *SMALL.split(), *NETWORK, "--output_dir", folder / "a", launcher=accelerate)
    threads = json.loads((folder / "a/environment.json").read_text())["threads"]  # sums of as many parts
    script("train.py", *SMALL.split(), *NETWORK, "--output_dir", folder / "c", "--seed", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    script("train.py", *SMALL.split(), *NETWORK, "--output_dir", folder / "b")
    script("train.py", *SMALL.split(), *NETWORK, "--output_dir", folder / "d", "--gradient_checkpointing", "true")
    torch.set_num_threads(before)
    return folder


def weights(folder):
    return DDPMImagePipeline.from_pretrained(folder / "pipeline").unet.state_dict()


def test_what_a_run_writes(trained):
    run = trained / "a"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    sample_rows, rows = ([row for row in rows if (key in row)] for key in ("samples_mean_grey", "loss"))
    assert [row["step"] for row in rows] == [2, 4, 6] and [row["step"] for row in sample_rows] == [3, 6]
    assert all(row["nearest_rms_samples"] > 0 and 0.2 < row["nearest_rms_data"] < 0.3 for row in sample_rows)
    assert rows[0]["learning_rate"] > rows[-1]["learning_rate"] >= 0 and all(row["loss"] > 0 for row in rows)
    assert yaml.safe_load((run / "config.yaml").read_text())["steps"] == 6
    names = ["loss", *(f"loss_t_quarter_{i}" for i in range(1, 5)), "gradient_norm", "steps_skipped", "learning_rate"]
    names += ["ema_decay", "images_per_second", "memory_gb", "data_mean_grey", "data_std_grey"]
    assert all(sorted(row) == sorted(["step", *names]) for row in rows)
    environment = json.loads((run / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__ and environment["processes"] == 1
    kinds = ("", "-raw", "-denoising", "-nearest")
    assert len(list((run / "samples").iterdir())) == 2 * len(kinds)
    for name in ("curves.png", *(f"samples/000000{step}{kind}.png" for step in (3, 6) for kind in kinds)):
        assert np.asarray(Image.open(run / name)).std() > 0, name
    assert not list(run.rglob(".*"))  # nothing temporary stays
    card = (run / "pipeline/README.md").read_text()
    assert "library_name: diffusers" in card and "6 optimizer steps" in card and "Not measured" in card


def test_fine_tuning(trained, tmp_path):
    """From a folder, ours or stock: the first weights are its own, whatever the preset says of the network."""
    stock = DDPMPipeline.from_pretrained(trained / "a/pipeline")
    stock.save_pretrained(tmp_path / "stock")
    arguments = [*SMALL.split(), "--init_from", tmp_path / "stock", "--learning_rate", "1e-12"]
    script("train.py", *arguments, "--output_dir", tmp_path / "run", "--checkpoint_every", 3)
    before, after = weights(trained / "a"), weights(tmp_path / "run")
    for key in before:
        torch.testing.assert_close(after[key], before[key], rtol=0, atol=1e-9)
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert config["unet"]["block_out_channels"] == [8, 16] and config["unet"]["norm_num_groups"] == 4
    shutil.rmtree(tmp_path / "run/pipeline")
    stock.save_pretrained(tmp_path / "kept")
    shutil.rmtree(tmp_path / "stock")  # a run has all that it needs
    script("train.py", *arguments, "--output_dir", tmp_path / "run", "--checkpoint_every", 3)  # goes on
    shutil.move(tmp_path / "kept", tmp_path / "stock")
    assert json.loads((tmp_path / "run/pipeline/training.json").read_text())["init_from"].endswith("stock")
    shutil.copytree(tmp_path / "stock", tmp_path / "empty")
    next((tmp_path / "empty/unet").glob("*.safetensors")).unlink()
    for extra, message in (
        (["--channels", 3], f"channels=3, but init_from='{tmp_path / 'stock'}' has 1; leave it out"),
        (["--scheduler.variance_type", "learned"], "scheduler.variance_type='learned', but the network of init_from="),
        (["--unet.layers_per_block", 1], "unet.layers_per_block=1, but the network of init_from="),
        (["--label_column", "label"], "label_column='label' and unet.num_class_embeds=null go together"),
        (["--image_size", 7], "image_size=7 must be a multiple of 2"),
        (["--init_from", tmp_path], "init_from="),
        (["--init_from", tmp_path / "empty"], "init_from="),
    ):
        refused = script("train.py", *arguments, *extra, "--output_dir", tmp_path / "none", check=False)
        assert refused.returncode == 1 and message in refused.stderr and refused.stderr.count("\n") < 3, refused.stderr


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    script(
        "train.py",
        *SMALL.split(),
        *NETWORK,
        "--trackers",
        "tensorboard",
        "--tracker_project",
        "mine",
        "--output_dir",
        tmp_path,
    )
    events = EventAccumulator(str(tmp_path / "mine")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 4, 6]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert events.Scalars("gradient_norm")[0].value == pytest.approx(rows[0]["gradient_norm"])
    assert [event.step for event in events.Images("samples")] == [3, 6]
    for name, message in (("wandb", "'wandb' is not installed; pip install wandb"), ("tensorbord", "did you mean")):
        refused = script(
            "train.py", *SMALL.split(), "--trackers", f"[{name}]", "--output_dir", tmp_path / "b", check=False
        )
        assert refused.returncode == 1 and message in refused.stderr and not (tmp_path / "b").exists()


def test_the_quarters_of_the_loss_are_of_it(tmp_path):
    """And of the learned weights of an importance sampler only the loss itself."""
    from ddpm_hf.training.log import Log
    from ddpm_hf.training.output import OutputFolder

    accelerator, config = (
        Accelerator(cpu=True),
        TrainConfig(batch_size=4, steps=9, log_every=2, output_dir=str(tmp_path)),
    )
    with OutputFolder(config, accelerator) as folder:
        log = Log(config, folder, accelerator, 1000)
        x_start = torch.zeros(4, 1, 2, 2)
        log.add(x_start, torch.tensor([0, 249, 250, 999]), torch.tensor([1.0, 3, 5, 7]), torch.tensor([1.0, 1, 2, 1]))
        log.add(x_start, torch.tensor([600, 700, 800, 20]), torch.tensor([1.0, math.inf, math.nan, 2]), torch.ones(4))
        assert not log.step(1, torch.tensor(1.0), steps_skipped=0)
        assert log.step(2, torch.tensor(1.0), steps_skipped=0)
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row["loss"] == pytest.approx((1 + 3 + 10 + 7 + 1 + 2) / 6)
    assert [row[f"loss_t_quarter_{i}"] for i in range(1, 5)] == pytest.approx([2, 5, 1, 7])


def test_held_out_bits_per_dim_and_the_best_checkpoint(tmp_path):
    arguments = [*SMALL.split(), *NETWORK, "--eval_every", "2", "--eval_images", "40", "--keep_checkpoints", "1"]
    arguments += ["--checkpoint_every", "1", "--learning_rate", "0.01", "--lr_warmup_steps", "0"]
    arguments += ["--lr_schedule", "constant", "--ema_decay", "0.0", "--output_dir", tmp_path]
    # learns up to the fourth step, then forgets: the best is neither the first nor the last
    script("train.py", *arguments, "--steps", 4)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    measured = {row["step"]: row for row in rows if "bits_per_dim" in row}
    assert list(measured) == [2, 4]
    assert (
        abs(measured[4]["loss_held_out"] - measured[4]["loss_train"]) < 5 * measured[4]["loss_gap_standard_error"] < 0.3
    )
    script("evaluate.py", tmp_path / "pipeline", "--estimate", 20)  # of all 360 images
    report = json.loads((tmp_path / "pipeline/evaluation.json").read_text())
    error = math.hypot(report["standard_error"], measured[4]["bits_per_dim_standard_error"])
    assert abs(measured[4]["bits_per_dim"] - report["total"]) < 4 * error < 0.5
    best = min(measured, key=lambda step: measured[step]["bits_per_dim"])
    kept = [path.name for path in sorted((tmp_path / "checkpoints").iterdir())]
    assert kept == sorted({f"{best:07d}", "0000004"})
    assert json.loads((tmp_path / "pipeline/training.json").read_text())["steps"] == 4


def test_one_seed_makes_a_run_repeatable(trained):
    a, b, c, d = (weights(trained / name) for name in "abcd")
    for key in a:
        torch.testing.assert_close(a[key], d[key])  # activations computed twice are the same
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)
    assert (trained / "a/samples/0000006.png").read_bytes() == (trained / "b/samples/0000006.png").read_bytes()


def test_the_pipeline_samples_and_evaluates(trained, tmp_path):
    folder = trained / "a" / "pipeline"
    script("sample.py", folder, "--count", 4, "--steps", 3, "--out", tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").size == (136, 136)
    script("sample.py", folder, "--count", 2, "--steps", 7, "--progressive", 3, "--out", tmp_path / "rows.png")
    assert Image.open(tmp_path / "rows.png").size == (3 * 68, 2 * 68)
    script("sample.py", folder, "--count", 3, "--steps", 7, "--interpolate", 500, "--out", tmp_path / "mixed.png")
    assert Image.open(tmp_path / "mixed.png").size == (11 * 68, 3 * 68)
    result = script("evaluate.py", folder, "--images", 3, "--steps", 10, "--histogram", "train")
    report = json.loads((folder / "evaluation.json").read_text())
    assert report["images"] == 3 and report["steps"] == 10 and report["levels"] == 17
    assert report["total"] == pytest.approx(report["prior"] + report["kl"] + report["decoder"])
    assert 2 < report["per_pixel_histogram"] < 3.2
    difference = report["per_pixel_histogram"] - report["total"]
    assert f"{report['per_pixel_histogram']:.4f}, {difference:+.4f} +- " in result.stdout
    assert f"{report['total']:.4f}" in result.stdout
    assert f"{report['total']:.4f}" in (folder / "README.md").read_text()
    errors = report["standard_errors"]
    assert errors["total"] == report["standard_error"] > 0 and errors.keys() == {"total", "prior", "kl", "decoder"}
    assert report["evaluations_per_image"] == 10 and report["sampling_error"] is None and report["first_timestep"] == 0
    rows = (folder / "evaluation.csv").read_text().splitlines()[1:]
    terms = [float(row.split(",")[1]) for row in rows]
    assert [int(row.split(",")[0]) for row in rows][:2] == [0, 111] and terms[0] == pytest.approx(
        report["decoder"], 1e-6
    )
    assert sum(terms) == pytest.approx(report["kl"] + report["decoder"], rel=1e-6)
    result = script("evaluate.py", folder, "--images", 3, "--steps", 10, "--first", 200)
    report = json.loads((folder / "evaluation.json").read_text())
    assert report["first_timestep"] >= 200 and report["steps"] < 10 and "from t=2" in result.stdout
    assert "of the chain that begins at t = 2" in (folder / "README.md").read_text()
    refused = script("evaluate.py", folder, "--images", 3, "--first", 1000, check=False)
    assert refused.returncode == 1 and "--first 1000 leaves no timestep" in refused.stderr
    assert np.asarray(Image.open(folder / "evaluation.png")).std() > 0


def test_estimating_a_stock_folder(trained, tmp_path):
    stock = DDPMPipeline.from_pretrained(trained / "a" / "pipeline")
    stock.save_pretrained(tmp_path / "stock")
    into = ["--out", tmp_path / "stock"]
    result = script("evaluate.py", tmp_path / "stock", "--images", 4, "--estimate", 10, "--levels", 17, *into)
    report = json.loads((tmp_path / "stock/evaluation.json").read_text())
    assert report["levels"] == 17 and report["steps"] == 1000 and report["evaluations_per_image"] == 10
    assert report["sampling_error"] > 0 and "10 evaluations an image in place of 1000" in result.stdout
    assert not (tmp_path / "stock/README.md").exists()  # nobody's model of this package
    assert not (tmp_path / "stock/evaluation.png").exists()
    shutil.copytree(trained / "a/pipeline", tmp_path / "ours")
    (tmp_path / "ours/README.md").unlink()
    write_model_card(tmp_path / "ours")  # of that name
    script("evaluate.py", tmp_path / "ours", "--images", 4, "--estimate", 10, "--out", tmp_path / "ours")
    card = (tmp_path / "ours/README.md").read_text()
    assert "an unbiased estimate of the 1000 terms of the bound from\n10 network evaluations" in card
    config = tmp_path / "stock/scheduler/scheduler_config.json"
    old = {key: value for key, value in json.loads(config.read_text()).items() if key != "prediction_type"}
    config.write_text(json.dumps(old))  # as the first releases of diffusers wrote it
    (tmp_path / "stock/README.md").write_text("Mine")
    result = script("evaluate.py", tmp_path / "stock", "--images", 2, "--steps", 5, "--levels", 17, *into)
    assert (tmp_path / "stock/README.md").read_text() == "Mine" and "stays as it is" in result.stdout
    refused = script("evaluate.py", tmp_path / "stock", "--images", 4, "--estimate", 1000, "--levels", 17, check=False)
    assert refused.returncode == 1 and "num_evaluations=1000 must be an integer, 8 to 999" in refused.stderr
    refused = script("evaluate.py", tmp_path / "stock", "--images", 4, "--levels", 10, check=False)
    assert refused.returncode == 1 and "levels=10, but the data set 'digits' has 17 grey levels" in refused.stderr


def test_the_histogram_is_what_it_says():
    from ddpm_hf.evaluation.likelihood_report import histogram_bits_per_dim

    train, test = torch.tensor([[0], [0], [1]]), torch.tensor([[0], [2]])
    # counts 2, 1, 0 and one each: probabilities 3/6, 2/6, 1/6
    expected = [-np.log2(3 / 6), -np.log2(1 / 6)]
    assert histogram_bits_per_dim(train, test, 3).tolist() == pytest.approx(expected)


def test_the_averaged_weights_are_the_ones_saved(tmp_path):
    arguments = [*SMALL.split(), *NETWORK, "--ema_decay", "0.0", "--output_dir", str(tmp_path / "no_average")]
    last = train(load_config(arguments)[0])
    arguments[-3:] = ["0.9999", "--output_dir", str(tmp_path / "average")]
    average = train(load_config(arguments)[0])
    a, b = (DDPMImagePipeline.from_pretrained(folder).unet.conv_in.weight for folder in (last, average))
    assert not torch.equal(a, b)


def test_a_folder_of_colour_images_with_flips_and_accumulation(tmp_path):
    random = np.random.RandomState(0)
    (tmp_path / "images").mkdir()
    for i in range(8):
        Image.fromarray(random.randint(0, 256, (20, 30, 3), dtype=np.uint8)).save(tmp_path / f"images/{i}.png")
    arguments = (
        f"--data {tmp_path}/images --channels 3 --image_size [8,16] --scheduler.levels 256 --random_flip true "
        f"--batch_size 4 --gradient_accumulation_steps 2 --scheduler.variance_type learned_range --loss hybrid "
        f"--timesteps loss_second_moment --weighting min_snr "
        f"--output_dir {tmp_path}/run"
    )
    script("train.py", *SMALL.split(), *NETWORK, *arguments.split())
    pipeline = DDPMImagePipeline.from_pretrained(tmp_path / "run/pipeline")
    assert pipeline.unet.config.out_channels == 6
    assert pipeline(num_inference_steps=2).images[0].size == (16, 8)


def test_fourier_features(tmp_path):
    output = ["--unet.fourier_features", "3,4", "--output_dir", tmp_path / "run"]
    script("train.py", *SMALL.split(), *NETWORK, *output)
    folder = tmp_path / "run/pipeline"
    saved = json.loads((folder / "unet/config.json").read_text())
    assert saved["_ddpm_hf"]["fourier_features"] == [3, 4]
    pipeline = DDPMImagePipeline.from_pretrained(folder)
    assert pipeline.unet.arguments["fourier_features"] == [3, 4] and pipeline.unet.conv_in.in_channels == 5
    fine_tuned = ["--init_from", folder, "--data", "digits", "--steps", 2, "--batch_size", 8, "--eval_every", 0]
    script("train.py", *fine_tuned, "--sample_every", 0, "--output_dir", tmp_path / "tuned")
    assert DDPMImagePipeline.from_pretrained(tmp_path / "tuned/pipeline").unet.conv_in.in_channels == 5
    for values, message in (
        ("3,3", "fourier_features=[3, 3] must be 1 to 8 different exponents"),
        ("17,3", "fourier_features=[17, 3]"),
    ):
        refused = ["--unet.fourier_features", values, "--output_dir", tmp_path / "none"]
        run = script("train.py", *SMALL.split(), *NETWORK, *refused, check=False)
        assert run.returncode == 1 and message in run.stderr and run.stderr.count("\n") == 1, run.stderr


@pytest.mark.parametrize("extra", [[], ["--streaming", "true", "--shuffle_buffer", "9"]])
def test_a_folder_of_every_kind_of_image(tmp_path, extra, caplog):
    """Sub-folders are labels; a file that is no image is left out, the others are of one colour on the background."""
    folder = tmp_path / "all [of] them"
    red, wide = Image.new("RGB", (20, 12), (255, 0, 0)), (20, 12)
    kinds = {
        "a/rgb.png": red, "a/cmyk.jpg": red.convert("CMYK"), "a/palette.gif": red.convert("P"), "a/rgb.webp": red,
        "a/tall.bmp": red.resize((9, 40)), "b/rgba.png": red.convert("RGBA"), "b/clear.png": Image.new("RGBA", wide),
        "b/grey.png": Image.new("L", wide, 255), "b/alpha.png": Image.new("LA", wide, (9, 0)),
        "b/bit.png": Image.new("1", wide, 1), "b/sixteen.png": Image.fromarray(np.full(wide, 65535, np.uint16)),
        "b/turned.tiff": red,
    }  # fmt: skip
    for name, image in kinds.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / name, exif=Image.Exif() if "turned" not in name else _turned(), lossless=True)
    (folder / "b/torn.jpg").write_bytes((folder / "a/cmyk.jpg").read_bytes()[:300])
    arguments = ["--data", folder, "--channels", "3", "--scheduler.levels", "256", "--label_column", "label", *extra]
    arguments += ["--unet.num_class_embeds", 2, "--max_broken", 0.1, "--background", "#ff0000", "--batch_size", 4]
    script("train.py", *SMALL.split(), *NETWORK, *arguments, "--output_dir", tmp_path / "run")
    assert json.loads((tmp_path / "run/pipeline/training.json").read_text())["label_names"] == ["a", "b"]
    assert {record.message.split(" cannot")[0][-8:] for record in caplog.records} == {"torn.jpg"}
    config, _ = load_config([str(argument) for argument in arguments])
    dataset = open_data(config, open_images(config))
    items = [{key: torch.as_tensor(value) for key, value in item.items()} for item in dataset]
    assert sorted(item["class_labels"].item() for item in items) == [0] * 5 + [1] * 7
    colours = torch.stack([item["pixels"].float().mean((1, 2)) for item in items])
    white = (colours > 254).all(1)
    assert white.sum() == 3  # grey, 1 and 16 bits
    assert (colours[~white] - torch.tensor([255.0, 0, 0])).abs().max() < 3  # JPEG's


def _turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@pytest.mark.parametrize("extra", ["", "--memory_gb 0", "--memory_gb 0 --num_workers 1", "--streaming true"])
def test_images_that_cannot_be_read(tmp_path, extra, caplog):
    """Up to a share of them is left out, each with its name; more end the run in one line."""
    (tmp_path / "images").mkdir()
    for i in range(40):
        Image.fromarray(np.full((8, 8), i % 17, dtype=np.uint8)).save(tmp_path / f"images/{i:02}.png")
    whole = (tmp_path / "images/07.png").read_bytes()
    (tmp_path / "images/07.png").write_bytes(whole[: len(whole) // 2])
    arguments = [*SMALL.split(), *NETWORK, "--data", tmp_path / "images", *extra.split(), "--output_dir"]
    result = script("train.py", *arguments, tmp_path / "none", "--max_broken", 0, check=False)
    last = result.stderr.splitlines()[-1]
    assert result.returncode == 1 and last.startswith("train.py: data=") and "\r" not in last
    assert "images/07.png (" in last and "images cannot be read, the last " in last and "raise max_broken=0" in last
    assert not (tmp_path / "none/pipeline").exists()
    script("train.py", *arguments, tmp_path / "run", "--max_broken", 0.03)
    if "workers" not in extra:  # which log in their own process
        assert [record.message for record in caplog.records if "07.png cannot be read (" in record.message]
        assert len(caplog.records) < 4


@pytest.mark.parametrize("extra", ["", "--memory_gb 0 --num_workers 1", "--memory_gb 0", "--streaming true"])
def test_rows_that_are_no_data_are_reported_in_one_line(tmp_path, extra):
    rows = {"image": [Image.new("L", (8, 8), i) for i in range(16)], "label": list(range(16))}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    cases = [
        ({"image": [*rows["image"][:15], Image.new("L", (8, 8), 40)]}, "levels=17, but the data has a pixel of 40"),
        ({"label": [*range(15), 17]}, "label_column='label' h"),  # has 17 labels, or holds 17
        ({"label": [*range(15), None]}, "label_column='label' h"),  # has no value in 1 of 16 rows, or holds None
    ]
    for change, message in cases[: 3 if "num_workers" not in extra else 1]:
        datasets.Dataset.from_dict(rows | change, features=features).to_parquet(tmp_path / "rows.parquet")
        arguments = [*SMALL.split(), *NETWORK, *extra.split(), "--data", tmp_path / "rows.parquet"]
        arguments += ["--label_column", "label", "--unet.num_class_embeds", "16", "--output_dir", tmp_path / "run"]
        if message.startswith("label") and not extra.startswith(
            "--s"
        ):  # 15 others and this one: as many as there may be
            arguments[-3] = "15"
        result = script("train.py", *arguments, check=False)
        last = result.stderr.splitlines()[-1]
        assert result.returncode == 1 and last.startswith("train.py: data=") and message in last, last
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


def test_a_stream_that_workers_divide_unevenly(tmp_path):
    """Epochs in which no worker has a whole batch are passed over."""
    for i, count in enumerate((7, 8, 9)):
        digits("test").select(range(count)).to_parquet(tmp_path / f"{i}.parquet")
    arguments = [*SMALL.split(), *NETWORK, "--streaming", "true", "--num_workers", "2", "--data", str(tmp_path)]
    train(load_config([*arguments, "--output_dir", str(tmp_path / "run")])[0])


def test_held_out_images_are_of_all_that_there_are(tmp_path):
    """Also where some cannot be read, and of a folder that is sorted by class."""
    for kind in ("train", "test"):
        for label in "abc":
            (tmp_path / kind / label).mkdir(parents=True)
            for i in range(12):
                Image.new("L", (12, 12), i).save(tmp_path / kind / label / f"{i}.png")
    (tmp_path / "test/a/3.png").write_bytes(b"x")
    arguments = [
        "--data",
        str(tmp_path),
        "--label_column",
        "label",
        "--unet.num_class_embeds",
        "3",
        "--max_broken",
        "0.1",
    ]
    for streaming in ("true", "false"):
        config, _ = load_config([*arguments, "--eval_images", "20", "--streaming", streaming])
        x_start, labels = held_out_images(config, ["a", "b", "c"])
        assert len(x_start) == 20 and len(labels.unique()) == 3 and x_start.shape[1:] == (1, 8, 8)


def test_class_conditional(tmp_path):
    script(
        "train.py", *SMALL.split(), *NETWORK, "--label_column", "label", "--unet.num_class_embeds", "10",
        "--channels_last", "true",
        "--output_dir", tmp_path / "run",
    )  # fmt: skip
    folder = tmp_path / "run/pipeline"
    script("sample.py", folder, "--count", 20, "--steps", 2, "--out", tmp_path / "labels.png")
    sheet = Image.open(tmp_path / "labels.png")
    assert sheet.width == 10 * 68 and 2 * 68 < sheet.height < 3 * 68  # a column for each class, with its name
    script("evaluate.py", folder, "--images", 1, "--steps", 5)
    report = json.loads((folder / "evaluation.json").read_text())
    assert report["standard_error"] is None and "±" not in (folder / "README.md").read_text()
    pipeline, labels = DDPMImagePipeline.from_pretrained(folder), [*range(10)] * 2
    drawn = pipeline(20, class_labels=labels, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images
    expected = as_sheet(drawn, 10, [str(label) for label in labels])
    assert drawn[0].size == (8, 8) and sheet.size == expected.size
    assert np.abs(np.asarray(sheet, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1  # one grey level
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([10, 500])
    networks = pipeline.unet, UNet2DModel.from_pretrained(folder / "unet")
    with torch.no_grad():
        ours, stock, swapped = (
            network(x, t, class_labels=torch.tensor(pair)).sample
            for network, pair in ((networks[0], [1, 2]), (networks[1], [1, 2]), (networks[0], [2, 1]))
        )
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-6)
    assert (ours - swapped).abs().amax((1, 2, 3)).min() > 1e-4 * ours.std()  # labels matter to each image


def test_what_the_data_does_not_hold_is_reported_in_one_line(tmp_path):
    for extra, message in (
        (["--batch_size", "5000"], "batch_size=5000 is more than the 1437 images"),
        (["--split", "validation"], "split='validation'"),
        (["--image_column", "img"], "image_column='img' is not in the data"),
        (["--label_column", "kind", "--unet.num_class_embeds", "10"], "label_column='kind' is not in the data"),
        (["--eval_every", "5", "--eval_split", "held"], "eval_split='held': split='held' is not in this data set"),
    ):
        result = script("train.py", *extra, "--output_dir", tmp_path / "run", check=False)
        assert result.returncode == 1 and message in result.stderr and "Traceback" not in result.stderr
        assert not (tmp_path / "run").exists()


def test_too_few_images(tmp_path):
    """None, one, and one for a batch of one."""
    for name in ("empty", "one"):
        (tmp_path / name).mkdir()
    Image.new("L", (8, 8), 3).save(tmp_path / "one/a.png")
    arguments = [*SMALL.split(), *NETWORK, "--output_dir", tmp_path / "run", "--data"]
    for name, message in (
        ("empty", "empty holds no images: no .png, .jpg"),
        ("one", "batch_size=16 is more than the 1 images"),
    ):
        refused = script("train.py", *arguments, tmp_path / name, check=False)
        assert refused.returncode == 1 and message in refused.stderr.splitlines()[-1]
        assert refused.stderr.splitlines()[-1].startswith("train.py: data=") and not (tmp_path / "run").exists()
    script("train.py", *arguments, tmp_path / "one", "--batch_size", 1)
    kinds = {path.name[7:] for path in (tmp_path / "run/samples").iterdir()}
    assert kinds == {".png", "-raw.png", "-denoising.png"}  # there is no other image to be near


@pytest.mark.parametrize("steps", [1, 2])
def test_a_process_of_few_steps(tmp_path, steps):
    arguments = [
        "--scheduler.num_train_timesteps",
        steps,
        "--sample_steps",
        "null",
        "--eval_every",
        3,
        "--eval_images",
        8,
    ]
    script("train.py", *SMALL.split(), *NETWORK, *arguments, "--output_dir", tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row.get("bits_per_dim", 0) > 0] == [3, 6]


def test_a_stream(hub, tmp_path):
    """From the Hub and from files as from memory: the same images, each epoch in an order of its own."""
    digits("test").push_to_hub("user/streamed", split="train", num_shards=3)
    digits("test").to_parquet(tmp_path / "images.parquet")
    arguments = [*SMALL.split(), *NETWORK, "--streaming", "true", "--shuffle_buffer", "50", "--data"]
    config, _ = load_config(["--split", "test"])
    expected = torch.stack([item["pixels"] for item in open_data(config, open_images(config))])
    for source in ("user/streamed", str(tmp_path / "images.parquet")):
        config, _ = load_config([*arguments, source])
        epochs = []
        for epoch in (0, 1):
            stream = open_data(config, open_images(config))
            stream.set_epoch(epoch)
            epochs.append(torch.stack([item["pixels"] for item in stream]))
        shares = [
            torch.stack([item["pixels"] for item in open_data(config, open_images(config), process, 2)])
            for process in (0, 1)
        ]
        assert not torch.equal(*epochs)
        for images in (*epochs, torch.cat(shares)):
            assert not torch.equal(images, expected)
            torch.testing.assert_close(
                images.flatten(1).unique(dim=0), expected.flatten(1).unique(dim=0), rtol=0, atol=0
            )
            assert len(images) == 360
    folder = train(load_config([*arguments, "user/streamed", "--output_dir", str(tmp_path / "run")])[0])
    assert json.loads((folder / "training.json").read_text())["hub_dataset"] == "user/streamed"
    train(load_config([*SMALL.split(), *NETWORK, "--data", "user/streamed", "--output_dir", str(tmp_path / "copy")])[0])
    for extra, message in (
        (["user/streamed", "--batch_size", "361"], "batch_size=361 is more than the images of 'user/streamed'"),
        (["user/streamed", "--split", "train[:9]"], r"train\[:9\]"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(load_config([*arguments, *extra, "--output_dir", str(tmp_path / "none")])[0])


def test_from_a_data_set_on_the_hub_to_a_model_on_the_hub(hub, tmp_path):
    digits("test").select(range(32)).push_to_hub("user/training-images", split="train")
    arguments = [*SMALL.split(), *NETWORK, "--data", "user/training-images", "--output_dir", tmp_path / "run"]
    arguments += ["--push_to_hub", "user/trained", "--license", "mit"]
    hub.faults[:] = [dict(match="POST .*/trained/commit/main", do=500)]
    broken = script("train.py", *arguments, check=False)
    assert broken.returncode == 1 and "the Hub answered 500" in broken.stderr and "Traceback" not in broken.stderr
    assert f"python training/push.py {tmp_path}/run/pipeline --repo_id user/trained" in broken.stderr
    result = script(
        "push.py", tmp_path / "run", "--repo_id", "user/trained", "--license", "mit",
        launcher=[sys.executable], HF_HUB_OFFLINE="0",
    )  # fmt: skip
    assert f"published {hub.url}/user/trained/commit/" in result.stdout
    files = hub.files("user/trained")
    assert {"samples.png", "training.png", "training.json"} <= files.keys()
    assert not [name for name in files if "optimizer" in name or "checkpoint" in name]
    assert not [name for name, data in files.items() if str(tmp_path).encode() in data]
    card = ModelCard(files["README.md"].decode())
    assert card.data.datasets == ["user/training-images"] and card.data.license == "mit"
    refused = script("push.py", tmp_path / "run", "--repo_id", "user/x", "--token", "nobody", check=False)
    assert refused.returncode == 1 and refused.stderr.splitlines()[-1].startswith("push.py: user/x: no valid token")
    arguments[-5] = tmp_path / "other"
    refused = script("train.py", *arguments, check=False, HF_TOKEN="")
    assert refused.returncode == 1 and "there is no token; run `hf auth login` or set HF_TOKEN" in refused.stderr
    assert not (tmp_path / "other").exists()
