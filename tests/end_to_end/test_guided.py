"""A class-conditional network and a classifier of its noisy images, trained, saved, opened and sampled as a user does it."""

import dataclasses
import json
import re
import shutil

import datasets
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from safetensors.torch import load_file

from ddpm_hf import DDPMImagePipeline, DDPMUNet, NoisyClassifier
from ddpm_hf.data.sources import digits
from ddpm_hf.hub.card import write_model_card
from ddpm_hf.hub.upload import push_folder
from ddpm_hf.training.classifier import random_crop
from ddpm_hf.training.command_line import load_config
from ddpm_hf.training.config import ClassifierConfig, ConfigError
from ddpm_hf.training.from_pipeline import guided_class_names
from ddpm_hf.training.inputs import open_data, open_images
from ddpm_hf.training.resolve import resolve
from support.elsewhere import ROUNDING, run_elsewhere
from support.scripts import script

SMALL = ["--steps", "6", "--batch_size", "16", "--log_every", "2", "--lr_warmup_steps", "2", "--seed", "3"]
BASE = [*SMALL, "--sample_every", "6", "--sample_count", "20", "--sample_steps", "3", "--sample_raw", "0"]
BASE += ["--unet.block_out_channels", "[8, 16]", "--unet.norm_num_groups", "4", "--unet.attention_head_dim", "8"]
CLASSIFIER = [
    "--config",
    "digits",
    *SMALL,
    "--classifier.block_out_channels",
    "[8, 16]",
    "--classifier.norm_num_groups",
    "4",
]
CLASSIFIER += ["--classifier.attention_head_dim", "8", "--classifier.layers_per_block", "1"]
CLASSIFIER += ["--eval_every", "3", "--eval_images", "8"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guided")
    script("train.py", "--config", "digits-classes", *BASE, "--output_dir", folder / "base")
    arguments = ["--pipeline", folder / "base/pipeline", "--output_dir", folder / "classifier"]
    output = script("train_classifier.py", *CLASSIFIER, *arguments).stdout
    assert f"saved {folder / 'classifier/classifier'} and {folder / 'classifier/pipeline'}" in output
    return folder


def test_a_network_with_label_dropout(trained):
    unet = DDPMImagePipeline.from_pretrained(trained / "base/pipeline").unet
    assert (unet.num_classes, unet.null_class, unet.config.num_class_embeds) == (10, 10, 11)
    saved = json.loads((trained / "base/pipeline/unet/config.json").read_text())
    assert saved["_ddpm_hf"] == {
        "null_class": 10,
        "class_names": [str(digit) for digit in range(10)],
        "preprocessing": {"background": "white", "crop": "center", "label_column": "label"},
    }
    assert not {"null_class", "class_names", "preprocessing"} & saved.keys()
    assert Image.open(trained / "base/samples/0000006.png").width == 10 * (8 * 8 + 4)  # a column for each class
    card = (trained / "base/pipeline/README.md").read_text()
    assert re.search(r"\| classes \| 10 .*: `class_labels=`; classifier-free guidance by `guidance_scale=` \|", card)


def test_what_a_run_writes(trained):
    run = trained / "classifier"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    training_rows, held_out = ([row for row in rows if key in row] for key in ("accuracy", "accuracy_held_out"))
    assert [row["step"] for row in training_rows] == [2, 4, 6] and [row["step"] for row in held_out] == [3, 6]
    for kind, of in (("accuracy", training_rows), ("accuracy_held_out", held_out)):
        keys = [kind, *(f"{kind}_t_quarter_{i}" for i in range(1, 5))]
        assert all(row[key] is None or 0 <= row[key] <= 1 for row in of for key in keys)
    assert all(row["loss"] > 0 for row in training_rows) and all(row["loss_held_out"] > 0 for row in held_out)
    assert np.asarray(Image.open(run / "curves.png")).std() > 0 and (run / "config.yaml").is_file()
    classifier = NoisyClassifier.from_pretrained(run / "classifier")
    assert classifier.num_classes == 10 and classifier.config.scheduler["_ddpm_hf"]["levels"] == 17
    assert "| classifier of noisy images | 10 classes" in (run / "pipeline/README.md").read_text()
    assert not list(run.rglob(".*"))


OPEN = """
    import sys
    import numpy as np, torch
    opener, x, out = sys.argv[1:]
    if opener != "package":
        sys.modules["ddpm_hf"] = None
    from diffusers import DiffusionPipeline
    if opener == "package":
        from ddpm_hf import DDPMImagePipeline as DiffusionPipeline
    remote = {"custom_pipeline": x, "trust_remote_code": True} if opener == "remote" else {}
    pipe = DiffusionPipeline.from_pretrained(x, **remote)
    print(type(pipe).__name__, *sorted(type(part).__name__ for part in pipe.components.values()))
    if opener != "stock":
        guided = {"class_labels": [1, 2], "classifier_scale": 3.0, "guidance_scale": 2.0}
        generator = torch.Generator().manual_seed(0)
        images = pipe(2, generator=generator, num_inference_steps=5, output_type="np", **guided).images
        np.save(out, images)
    if opener == "remote":
        pipe.save_pretrained(out + "_again")
        try:
            pipe.optimize(compile=False)
        except ImportError as error:
            print(error)
"""
PARTS = "DDPMImagePipeline DDPMUNet NoisyClassifier VariationalDDPMScheduler"


def images_of(pipeline):
    kwargs = dict(
        class_labels=[1, 2], classifier_scale=3.0, guidance_scale=2.0, num_inference_steps=5, output_type="np"
    )
    return pipeline(2, generator=torch.Generator().manual_seed(0), **kwargs).images


@pytest.mark.slow
def test_opened_in_a_new_process(trained, tmp_path):
    """With the package and as remote code: the same pixels, and the same folder saved again; by plain diffusers stock parts."""
    folder = trained / "classifier/pipeline"
    expected = images_of(DDPMImagePipeline.from_pretrained(folder))
    for opener in "package", "remote":
        output = run_elsewhere(
            OPEN, tmp_path, opener, folder, tmp_path / opener, package=opener == "package", offline=True
        )
        assert PARTS in output and ("optimize is brought by the package ddpm-hf: pip install" in output) == (
            opener == "remote"
        )
        np.testing.assert_allclose(np.load(tmp_path / f"{opener}.npy"), expected, rtol=0, atol=ROUNDING)
    names = "model_index.json", "classifier/config.json", "classifier/diffusion_pytorch_model.safetensors"
    assert all((tmp_path / "remote_again" / name).read_bytes() == (folder / name).read_bytes() for name in names)
    np.testing.assert_array_equal(images_of(DDPMImagePipeline.from_pretrained(tmp_path / "remote_again")), expected)
    output = run_elsewhere(OPEN, tmp_path, "stock", folder, tmp_path / "stock", package=False, offline=True)
    assert "DDPMPipeline DDPMScheduler UNet2DModel" in output
    assert (folder / "classifier/noisy_classifier.py").read_text().count("class NoisyClassifier(") == 1


SLOW = [pytest.param(opener, marks=pytest.mark.slow) for opener in ("package", "stock")]


@pytest.mark.parametrize("opener", ["remote", *SLOW])
def test_opened_from_the_hub(hub, trained, tmp_path, opener):
    folder = trained / "classifier/pipeline"
    push_folder(folder, "user/guided")
    output = run_elsewhere(OPEN, tmp_path, opener, "user/guided", tmp_path / "out", package=opener == "package")
    assert (PARTS if opener != "stock" else "DDPMPipeline DDPMScheduler UNet2DModel") in output
    if opener != "stock":
        expected = images_of(DDPMImagePipeline.from_pretrained(folder))
        np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, rtol=0, atol=ROUNDING)


def test_published_with_its_classifier_and_without(hub, trained, tmp_path):
    folder = trained / "classifier/pipeline"
    push_folder(folder, "user/with-classifier")
    names = {
        f"classifier/{name}" for name in ("config.json", "noisy_classifier.py", "diffusion_pytorch_model.safetensors")
    }
    assert names <= hub.files("user/with-classifier").keys()
    push_folder(trained / "base/pipeline", "user/with-classifier")
    assert not any(name.startswith("classifier/") for name in hub.files("user/with-classifier"))
    shutil.copytree(folder, tmp_path / "broken")
    (tmp_path / "broken/classifier/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="broken/classifier holds no weights"):
        push_folder(tmp_path / "broken", "user/broken")
    with pytest.raises(ValueError, match="broken/classifier has no safetensors"):
        DDPMImagePipeline.from_pretrained(tmp_path / "broken")


def test_samples_and_evaluation(trained, tmp_path):
    folder = trained / "classifier/pipeline"
    guided = ["--guidance_scale", "2", "--classifier_scale", "1"]
    script("sample.py", folder, "--count", "20", "--steps", "3", *guided, "--out", tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").width == 10 * (8 * 8 + 4)
    shutil.copytree(folder, tmp_path / "copy")
    arguments = ["--data", "digits", "--label_column", "label", "--images", "4", "--estimate", "8"]
    assert "bits/dim" in script("evaluate.py", tmp_path / "copy", *arguments).stdout


def test_going_on_is_as_not_having_stopped(trained, tmp_path):
    arguments = [*CLASSIFIER, "--lr_schedule", "constant", "--pipeline", trained / "base/pipeline"]
    script("train_classifier.py", *arguments, "--output_dir", tmp_path / "once", "--checkpoint_every", "3")
    for steps in "3", "6":
        script("train_classifier.py", *arguments, "--output_dir", tmp_path / "twice", "--steps", steps)
    once, twice = (
        load_file(tmp_path / name / "classifier/diffusion_pytorch_model.safetensors") for name in ("once", "twice")
    )
    assert once.keys() == twice.keys() and all(torch.equal(once[key], twice[key]) for key in once)
    assert len(list((tmp_path / "once/checkpoints").iterdir())) >= 1


def test_going_on_with_another_process_is_refused(trained, tmp_path):
    """Its pipeline has another one by now."""
    shutil.copytree(trained / "base/pipeline", tmp_path / "base")
    arguments = [
        *CLASSIFIER,
        "--pipeline",
        tmp_path / "base",
        "--output_dir",
        tmp_path / "run",
        "--lr_schedule",
        "constant",
    ]
    script("train_classifier.py", *arguments, "--steps", "2")
    DDPMScheduler(beta_schedule="linear").save_pretrained(tmp_path / "base/scheduler")
    result = script("train_classifier.py", *arguments, "--steps", "4", check=False)
    assert (
        result.returncode == 1
        and "was trained with" in result.stderr
        and "scheduler.beta_schedule='linear', but " in result.stderr
    )
    header, _error = result.stderr.strip().splitlines()
    assert header.startswith("train_classifier.py: preset digits, data='digits', ")


def test_labels_are_those_of_the_pipeline(trained, tmp_path):
    """By their names, in whatever order the data has them; other names are refused before anything is made."""
    rows, names = digits("train").select(range(40)), [str(digit) for digit in range(10)]
    for name, classes in (("reversed", names[::-1]), ("others", [f"digit {digit}" for digit in range(10)])):
        labels = [9 - label for label in rows["label"]]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)})
        data = datasets.Dataset.from_dict({"image": rows["image"], "label": labels}, features=features)
        data.to_parquet(tmp_path / f"{name}.parquet")
    arguments = [*CLASSIFIER, "--pipeline", trained / "base/pipeline", "--steps", 2, "--eval_every", 0]
    script("train_classifier.py", *arguments, "--data", tmp_path / "reversed.parquet", "--output_dir", tmp_path / "run")
    assert DDPMImagePipeline.from_pretrained(tmp_path / "run/pipeline").classifier.class_names == names
    config, *_ = load_config(
        ["--config", "digits", "--data", str(tmp_path / "reversed.parquet"), "--batch_size", "16"], ClassifierConfig
    )
    dataset = open_data(config, dataclasses.replace(open_images(config), class_names=names))
    assert dataset.tensors["class_labels"].tolist() == rows["label"]
    result = script(
        "train_classifier.py", *arguments, "--data", tmp_path / "others.parquet", "--output_dir", tmp_path / "no", check=False
    )  # fmt: skip
    assert result.returncode == 1 and "label_column='label' has the label 'digit 0'; known are 0, 1, 2" in result.stderr
    header, _error = result.stderr.splitlines()
    assert header.startswith("train_classifier.py: preset digits, data=") and not (tmp_path / "no").exists()


def test_preprocessing_is_that_of_the_pipeline(trained, tmp_path):
    shutil.copytree(trained / "base/pipeline", tmp_path / "base")
    unet = DDPMUNet.from_pretrained(tmp_path / "base", subfolder="unet")
    unet.preprocessing = {"background": "#123456", "crop": "none"}
    unet.save_config(tmp_path / "base/unet")
    config, *_ = load_config(["--pipeline", str(tmp_path / "base")], ClassifierConfig)
    config = resolve(config)
    assert guided_class_names(config) == [str(digit) for digit in range(10)]
    assert (config.background, config.crop) == ("#123456", "none")


def test_a_pipeline_that_cannot_be_guided_is_reported_at_once(trained, tmp_path):
    shutil.copytree(trained / "base/pipeline", tmp_path / "base")
    (tmp_path / "base/unet/diffusion_pytorch_model.safetensors").unlink()
    result = script(
        "train_classifier.py",
        *CLASSIFIER,
        "--pipeline",
        tmp_path / "base",
        "--output_dir",
        tmp_path / "run",
        check=False,
    )
    assert (
        result.returncode == 1 and "base/unet has no safetensors" in result.stderr and "Traceback" not in result.stderr
    )
    assert not (tmp_path / "run").exists()


def test_a_card_tells_what_the_index_names(trained, tmp_path):
    """Not what an older pipeline has left in the folder."""
    pipeline = DDPMImagePipeline.from_pretrained(trained / "classifier/pipeline")
    pipeline.save_pretrained(tmp_path)
    assert "classifier of noisy images" in write_model_card(tmp_path).read_text()
    DDPMImagePipeline(pipeline.unet, pipeline.scheduler).save_pretrained(tmp_path)
    assert "classifier of noisy images" not in write_model_card(tmp_path).read_text()


def test_fine_tuning_keeps_the_null_class(trained, tmp_path):
    arguments = [*BASE, "--label_column", "label", "--init_from", trained / "base/pipeline", "--steps", "2"]
    script("train.py", "--config", "digits", *arguments, "--label_dropout", "0.2", "--output_dir", tmp_path / "run")
    assert DDPMImagePipeline.from_pretrained(tmp_path / "run/pipeline").unet.null_class == 10
    result = script("train.py", "--config", "digits", *arguments, "--output_dir", tmp_path / "no", check=False)
    assert (
        result.returncode == 1 and "its network was trained with label dropout; give a share above 0" in result.stderr
    )


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--label_column", "null"], "a classifier needs label_column, and classifier.num_classes"),
        (["--classifier.block_out_channels", "32"], "classifier.block_out_channels=32 must be a list of integers"),
        (["--classifier.num_classes", "a"], "a classifier needs label_column, and classifier.num_classes"),
        (["--random_crop", "0"], r"random_crop=0 must be a number in \(0, 1\]"),
        (["--random_crop", "2"], "random_crop=2 must be"),
        (["--classifier.sample_size", "8"], "classifier.sample_size follows"),
        (["--unet.dropout", "0.1"], "only classifier and scheduler have keys of their own"),
        (["--ema_decay", "0.9"], "unknown key 'ema_decay'"),
        (["--config", "nope"], "presets: digits, mnist"),
    ],
)
def test_mistakes(argv, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as error:
        load_config(["--output_dir", str(tmp_path / "run"), *argv], ClassifierConfig)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--pipeline", "no/such/folder"], "pipeline='no/such/folder': "),
        (["--classifier.num_classes", "7"], "classifier.num_classes=7, but the network of"),
        (["--classifier.pool", "max"], "pool='max' is not known"),
        (["--classifier.depth", "3"], "unknown key 'classifier.depth'"),
        (["--scheduler.beta_schedule", "steep", "--pipeline", ""], "steep"),
    ],
)
def test_mistakes_before_anything_is_made(trained, argv, message, tmp_path):
    arguments = [*CLASSIFIER, "--pipeline", trained / "base/pipeline", *argv, "--output_dir", tmp_path / "run"]
    result = script("train_classifier.py", *arguments, check=False)
    assert result.returncode == 1 and message in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_random_crop():
    ramp = torch.linspace(-1, 1, 8).expand(500, 1, 8, 8)
    assert random_crop(ramp, 1.0) is ramp
    cut = random_crop(ramp, 0.8)
    assert cut.shape == ramp.shape and cut.min() >= -1 and cut.max() <= 1
    slope = (cut[:, 0, 4, 5] - cut[:, 0, 4, 2]) / (ramp[:, 0, 4, 5] - ramp[:, 0, 4, 2])
    assert slope.min() > 0.79 and slope.max() < 1.01 and slope.std() > 0.03
    assert (cut[:, 0, 4, 0] - cut[:, 0, 4, 0].mean()).abs().max() > 0.05  # at other places
