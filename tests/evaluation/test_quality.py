"""`ddpm-hf evaluate --metrics`: the names of metrics, what is measured and recorded, and mistakes."""

import json
import os
import shutil
import signal
from importlib.util import find_spec

import numpy as np
import pytest
import scipy.linalg
import torch
from huggingface_hub import ModelCard
from PIL import Image

from ddpm_hf import DDPMImagePipeline
from ddpm_hf.data.sources import load_images
from ddpm_hf.errors import UserError
from ddpm_hf.evaluation.features.extractors import Extractor
from ddpm_hf.evaluation.features.reference import Reference
from ddpm_hf.evaluation.quality import Measurement, measure, parse_metrics, table
from ddpm_hf.evaluation.sample_files import SampleFolder
from ddpm_hf.hub.card import write_model_card
from support.features import projected
from support.scripts import command, script

FUNCTION = "support.features:projected"


def evaluate(*argv, **kwargs):
    return command("evaluate", *argv, "--device", "cpu", **kwargs)


@pytest.fixture
def pipeline(make_pipeline, tmp_path):
    """A saved pipeline of 8x8 images of 17 grey levels, as a run of this user would save it."""
    from ddpm_hf import VariationalDDPMScheduler

    folder = tmp_path / "run/pipeline"
    make_pipeline(scheduler=VariationalDDPMScheduler(levels=17)).save_pretrained(folder)
    for name in ("config.yaml", "environment.json"):
        (tmp_path / "run" / name).write_text("{}")
    return folder


def test_names_of_metrics():
    assert parse_metrics("fid,sfid,is,kid,prc,fd-dinov2") == {
        "inception": ["fd", "sfd", "is", "kd", "prc"],
        "dinov2": ["fd"],
    }
    assert parse_metrics("fd, kd ,dc,FD", "clip") == {"clip": ["fd", "kd", "dc"]}
    assert parse_metrics("prc-efficientnet-lite0,fd-a.b:c", "clip") == {"efficientnet-lite0": ["prc"], "a.b:c": ["fd"]}
    for text, message in {
        "fidd": "'fidd' is unknown; did you mean 'fid'?",
        "lpips": "'lpips' is unknown; known are fid, sfid, is, kid, fd, kd, prc, dc and fd-EXTRACTOR",
        "fid,": "'' is unknown",
        "is-clip": "'is-clip' is unknown",
    }.items():
        with pytest.raises(UserError) as error:
            parse_metrics(text)
        assert message in str(error.value)


def test_measurements_carry_what_they_are_of():
    generator = torch.Generator().manual_seed(0)
    real, generated = torch.randn(300, 5, generator=generator), 1.2 * torch.randn(200, 5, generator=generator) + 0.3
    extractor = Extractor("x", "FD-X", None, "none", "0", torch.device("cpu"), None)
    reference = Reference({"images": "data"}, 300, real)
    rows, comparison = measure(["fd", "kd", "prc", "dc"], extractor, reference, {"features": generated})
    names = ["FD-X", "KD-X", "precision", "recall", "density", "coverage"]
    assert [row.name for row in rows] == names and comparison is not None
    assert {(row.real_images, row.generated_images) for row in rows} == {(300, 200)}
    first, second = (np.cov(part.double().numpy(), rowvar=False) for part in (real, generated))
    difference = (real.double().mean(0) - generated.double().mean(0)).numpy()
    distance = difference @ difference + np.trace(first + second - 2 * scipy.linalg.sqrtm(first @ second).real)
    assert rows[0].value == pytest.approx(distance, rel=1e-8)
    assert rows[0].at_infinity.value < rows[0].value and 0 < rows[0].standard_error < rows[0].value
    assert rows[0].note is None and rows[0].at_infinity.standard_error >= rows[0].standard_error
    (few,), _ = measure(["fd"], extractor, reference, {"features": generated[:4]}, with_limit=False)
    assert "4 images for 5 features: the covariance is singular" in few.note and "more than 5 images" in few.note
    for kinds, message in {("sfd",): "which sFID needs", ("is",): "x gives no such features"}.items():
        with pytest.raises(ValueError, match=message):
            measure(list(kinds), extractor, reference, {"features": generated})
    moments = Reference({"images": "stats.npz"}, None, given_moments=reference.moments)
    with pytest.raises(ValueError, match="precision and recall need features .* stats.npz holds moments alone"):
        measure(["prc"], extractor, moments, {"features": generated})


def test_the_table_shows_two_digits_of_the_error():
    row = Measurement("fd", "FID", 12.3456, 0.0321, 50000, 10000)
    assert (
        "FID                    12.346 +- 0.032" in table([row])[0]
        and "10,000 generated, 50,000 real" in table([row])[0]
    )
    assert "1235 +- 41" in table([Measurement("fd", "FID", 1235.4, 41.0, 1, 1)])[0]
    assert "0.5000  " in table([Measurement("prc", "precision", 0.5, float("nan"), 1, 1)])[0]


def test_samples_of_a_pipeline_against_its_data(pipeline, tmp_path):
    argv = [pipeline, "--data", "digits", "--metrics", "fd,prc", "--extractor", FUNCTION, "--steps", 3]
    write_model_card(pipeline)
    result = evaluate(*argv, "--samples", 80, "--batch_size", 30)
    # by hand: the same images, drawn one by one
    opened = DDPMImagePipeline.from_pretrained(pipeline)
    opened.set_progress_bar_config(disable=True)
    images = [opened(generator=torch.Generator().manual_seed(i), num_inference_steps=3).images[0] for i in range(80)]
    real = [np.asarray(image) for image in load_images("digits", "train")["image"]]
    real = projected(torch.from_numpy((np.stack(real)[:, None] * (255 / 16)).round().astype(np.uint8)))
    generated = projected(torch.from_numpy(np.stack([np.asarray(image) for image in images])[:, None]))
    moments = [
        (part.double().numpy().mean(0), np.cov(part.double().numpy(), rowvar=False)) for part in (real, generated)
    ]
    (m, c), (n, d) = moments
    expected = (m - n) @ (m - n) + np.trace(c + d - 2 * scipy.linalg.sqrtm(c @ d).real)
    report = json.loads((pipeline / "evaluation.json").read_text())
    distance, precision, recall = report["sample_quality"]["metrics"]
    assert distance["value"] == pytest.approx(expected, rel=1e-6)
    assert (distance["name"], precision["name"], recall["name"]) == ("FD-projected", "precision", "recall")
    assert distance["generated_images"] == 80 and distance["real_images"] == 1437 and distance["standard_error"] > 0
    assert distance["extractor"] == FUNCTION and report["sample_quality"]["sampler"] == (
        "3 steps of DDPMScheduler, seeds 0 to 79"
    )
    assert "FD-projected" in result.stdout and "digits, split train, 1,437 images of 8x8" in result.stdout
    samples = [path for path in (tmp_path / "run").iterdir() if path.name.startswith("samples-")]
    assert len(samples) == 1 and len(list(samples[0].glob("*.png"))) == 80
    for name in ("evaluation-neighbors.png", "evaluation-precision.png"):
        assert Image.open(pipeline / name).width > 200
    # the model card, and the samples are not drawn again
    results = {entry.metric_type: entry for entry in ModelCard.load(pipeline / "README.md").data.eval_results}
    assert results["fd-projected"].metric_value == round(distance["value"], 4)
    card = (pipeline / "README.md").read_text()
    value, error = distance["value"], distance["standard_error"]
    assert "evaluation-neighbors.png" in card
    assert 1 < error < 10 and f"| FD-projected | {value:.1f} ± {error:.1f} |" in card  # two digits of the error
    before = samples[0].stat().st_mtime_ns, (samples[0] / "00000003.png").stat().st_mtime_ns
    evaluate(*argv, "--samples", 40)
    assert (samples[0] / "00000003.png").stat().st_mtime_ns == before[1]
    report = json.loads((pipeline / "evaluation.json").read_text())
    assert report["sample_quality"]["metrics"][0]["generated_images"] == 40


def test_data_of_few_grey_levels_with_another_scheduler(pipeline, tmp_path):
    """The grey levels are of the data: 17 stay 17."""
    argv = ["--data", "digits", "--metrics", "fd", "--extractor", FUNCTION, "--samples", 20, "--out", tmp_path / "out"]
    evaluate(pipeline, *argv, "--scheduler", "DDIMScheduler", "--steps", 2)
    assert json.loads((tmp_path / "out/evaluation.json").read_text())["sample_quality"]["real"]["levels"] == 17


def test_bits_per_dim_and_the_quality_of_samples_stand_side_by_side(pipeline):
    quality = [pipeline, "--data", "digits", "--metrics", "fd", "--extractor", FUNCTION, "--samples", 70, "--steps", 2]
    bits = [pipeline, "--data", "digits", "--images", 8, "--steps", 5]
    evaluate(*quality)
    evaluate(*bits)
    both = json.loads((pipeline / "evaluation.json").read_text())
    assert both["images"] == 8 and both["sample_quality"]["metrics"][0]["kind"] == "fd"
    evaluate(*quality, "--seed", 5)
    again = json.loads((pipeline / "evaluation.json").read_text())
    assert again["total"] == both["total"] and again["sample_quality"] != both["sample_quality"]
    text = write_model_card(pipeline).read_text()
    assert "## Likelihood" in text and "## Sample quality" in text and f"{again['total']:.4f}" in text
    # after the weights have changed, neither is of them
    values = {**again, "weights": "0" * 64}
    (pipeline / "evaluation.json").write_text(json.dumps(values))
    evaluate(*bits)
    assert "sample_quality" not in json.loads((pipeline / "evaluation.json").read_text())


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda: signal.default_int_handler(signal.SIGINT, None), "ddpm-hf evaluate: interrupted"),
        (lambda: os.open("/nowhere/x", os.O_RDONLY), "complete images stay, and the same command goes on from them"),
    ],
)
def test_what_stops_the_drawing_is_one_line(pipeline, monkeypatch, fault, message):
    monkeypatch.setattr(SampleFolder, "write", lambda self, seed, image: None if seed else fault())
    argv = ["--data", "digits", "--metrics", "fd", "--extractor", FUNCTION, "--samples", 20, "--steps", 10]
    monkeypatch.setattr(DDPMImagePipeline, "maybe_free_model_hooks", lambda self: fault())  # in the main thread
    result = evaluate(pipeline, *argv, check=False)
    assert result.returncode == 1 and message in result.stderr and result.stderr.count("\n") == 1, result.stderr


def test_samples_of_other_weights_are_not_this_pipelines(pipeline, tmp_path):
    """Their numbers would stand on its card."""
    command("sample", pipeline, "--count", 20, "--steps", 10, "--out", f"{tmp_path}/samples/", "--device", "cpu")
    argv = ["--images", tmp_path / "samples", "--data", "digits", "--metrics", "fd", "--extractor", FUNCTION]
    evaluate(pipeline, *argv)
    opened = DDPMImagePipeline.from_pretrained(pipeline)
    with torch.no_grad():
        opened.unet.conv_in.bias += 1
    opened.save_pretrained(pipeline)
    result = evaluate(pipeline, *argv, check=False)
    assert "was drawn with other weights than those of" in result.stderr and result.stderr.count("\n") == 1
    evaluate(*argv)


def test_given_images_need_no_pipeline(pipeline, tmp_path):
    """Images of any model, here those of the pipeline: as a folder, an .npz and a .parquet they give the same numbers."""
    numbers = []
    for out in ("samples/", "samples.npz", "samples.parquet"):
        command("sample", pipeline, "--count", 70, "--steps", 2, "--out", f"{tmp_path}/{out}", "--device", "cpu")
        argv = ["--images", tmp_path / out, "--data", "digits", "--metrics", "fd,kd,dc", "--extractor", FUNCTION]
        evaluate(*argv, "--out", tmp_path / "report")
        report = json.loads((tmp_path / "report/evaluation.json").read_text())
        numbers.append([metric["value"] for metric in report["sample_quality"]["metrics"]])
    assert numbers[0] == numbers[1] == numbers[2] and len(numbers[0]) == 4


def test_reference_files(pipeline, tmp_path):
    """An .npz of images is what --data of the same images is."""
    command("sample", pipeline, "--count", 70, "--steps", 2, "--out", f"{tmp_path}/samples.npz", "--device", "cpu")
    pixels = np.stack([np.asarray(image) for image in load_images("digits", "train")["image"]])
    pixels = (pixels * (255 / 16)).round().astype(np.uint8)[..., None]
    np.savez(tmp_path / "real.npz", arr_0=pixels)
    argv = [
        "--images",
        tmp_path / "samples.npz",
        "--metrics",
        "fd,prc",
        "--extractor",
        FUNCTION,
        "--out",
        tmp_path / "r",
    ]
    values = []
    for real in (["--data", "digits"], ["--reference", tmp_path / "real.npz"]):
        evaluate(*argv, *real)
        report = json.loads((tmp_path / "r/evaluation.json").read_text())
        values.append([metric["value"] for metric in report["sample_quality"]["metrics"]])
    assert values[0] == values[1]
    np.savez(tmp_path / "moments.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    result = evaluate(*argv, "--reference", tmp_path / "moments.npz", check=False)
    assert result.returncode == 1 and "moments.npz holds statistics of Inception features" in result.stderr


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--metrics", "fd"], "--metrics need --samples N (50000 in most papers), or --images FOLDER"),
        (["--metrics", "fd", "--samples", 5, "--images", "x"], "give one of them"),
        (["--metrics", "fd", "--samples", 5, "--reference", "a.npz"], "are both real images; give one of them"),
        (["--metrics", "fdd", "--samples", 5], "'fdd' is unknown"),
        (["--metrics", "fd", "--samples", 1], "--samples: 1 must be an integer, 2 or more"),
        (["--metrics", "fd", "--samples", 5, "--ode"], "--ode is for bits/dim; leave it out with --metrics"),
        (["--samples", 5], "--samples is for samples; give --metrics too, or leave it out"),
        (["--scheduler.solver_order", 5], "--scheduler is for samples; give --metrics too"),
        (["--images", "folder"], "argument --images: folder must be an integer, 1 or more"),
        (["--metrics", "fd", "--images", "nowhere"], "--images='nowhere': there is no such folder or file"),
        (["--metrics", "fd", "--images", "odd"], "has 9x8 pixels"),
        (["--metrics", "fd", "--images", "large"], "large has images of 16x16, the reference digits of 8x8"),
        (["--metrics", "fd", "--images", "float.npz"], "arr_0 has float64, not uint8"),
        (["--metrics", "fd", "--images", "white", "--extractor", "support.features:not_a_number"], "are not finite"),
        (["--metrics", "fd", "--samples", 70, "--extractor", "support.features:none"], "cannot be imported"),
        pytest.param(
            ["--metrics", "is", "--samples", 70],
            "Inception features need torch_fidelity; pip install",
            marks=pytest.mark.skipif(find_spec("torch_fidelity") is not None, reason="it is installed"),
        ),
        (["--metrics", "prc", "--samples", 3], "precision and recall need 6 generated images or more, not 3"),
    ],
)
def test_mistakes_are_one_line(pipeline, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd").mkdir()
    (tmp_path / "large").mkdir()
    (tmp_path / "white").mkdir()
    for i in range(8):
        Image.new("L", (8 + (i == 4), 8), 9 * i).save(f"odd/{i}.png")
        Image.new("L", (16, 16), 9 * i).save(f"large/{i}.png")
        Image.new("L", (8, 8), 255).save(f"white/{i}.png")
    np.savez("float.npz", arr_0=np.zeros((4, 8, 8, 1)))
    extractor = [] if "--extractor" in argv or "--metrics" not in argv else ["--extractor", FUNCTION]
    result = evaluate("run/pipeline", "--data", "digits", *extractor, *argv, check=False)
    assert result.returncode > 0 and message in result.stderr.splitlines()[-1], result.stderr
    assert not os.path.exists("run/pipeline/evaluation.json")


def test_constant_images(tmp_path):
    """Their covariance is zero, and their distance to themselves, too."""
    (tmp_path / "constant").mkdir()
    for i in range(70):
        Image.new("L", (8, 8), 99).save(tmp_path / f"constant/{i}.png")
    shutil.copytree(tmp_path / "constant", tmp_path / "real/all")
    argv = [
        "--images",
        tmp_path / "constant",
        "--data",
        tmp_path / "real",
        "--metrics",
        "fd,prc,kd",
        "--extractor",
        FUNCTION,
    ]
    evaluate(*argv, "--out", tmp_path / "r")
    report = json.loads((tmp_path / "r/evaluation.json").read_text())
    values = {metric["name"]: metric["value"] for metric in report["sample_quality"]["metrics"]}
    assert values["FD-projected"] == pytest.approx(0, abs=1e-9) and values["precision"] == values["recall"] == 1


def test_the_script_measures_as_the_command_does(pipeline, tmp_path):
    argv = [pipeline, "--data", "digits", "--metrics", "fd", "--extractor", FUNCTION, "--samples", 70, "--steps", 2]
    result = script("evaluate.py", *argv, "--device", "cpu")
    assert "FD-projected" in result.stdout
    report = json.loads((pipeline / "evaluation.json").read_text())
    assert report["sample_quality"]["command"].startswith("python training/evaluate.py ")
