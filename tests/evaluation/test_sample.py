"""sample.py: its sheets with the names of the classes, what it writes, and what it refuses before it begins."""

import os

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf import CascadePipeline, DDPMImagePipeline, DDPMSuperResolutionPipeline, VariationalDDPMScheduler
from ddpm_hf.evaluation.sheets import as_sheet, captions_of
from support.scripts import script

NAMES = ["ant", "bee", "cat"]
TILE = 68  # of an 8x8 image: 8 times as large, and a gap
CAPTION = 15  # pixels of a row of names, about


@pytest.fixture
def folder(make_pipeline, tmp_path):
    pipeline = make_pipeline(num_class_embeds=3)
    pipeline.unet.class_names = NAMES
    pipeline.save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def sample(*argv, **kwargs):
    return script("sample.py", "--steps", 2, *argv, **kwargs)


def dark_pixels(image, columns):
    """How many there are above the first row of tiles, by column."""
    strip = np.asarray(image.convert("L"))[: image.height % TILE]
    return [(part < 128).sum() for part in np.split(strip, columns, axis=1)]


def test_names_stand_above_their_classes(folder, tmp_path):
    sample(folder, "--count", 6, "--out", tmp_path / "a.png")
    sheet = Image.open(tmp_path / "a.png")
    assert sheet.width == 3 * TILE and 2 * TILE < sheet.height < 2 * TILE + 2 * CAPTION
    assert all(count > 20 for count in dark_pixels(sheet, 3))
    sample(folder, "--count", 2, "--progressive", 2, "--out", tmp_path / "b.png")
    rows = Image.open(tmp_path / "b.png")
    assert rows.width == 2 * TILE and 2 * TILE + CAPTION < rows.height < 2 * TILE + 3 * CAPTION
    for label in ("bee", "1"):
        sample(folder, "--count", 1, "--class_label", label, "--out", tmp_path / f"{label}.png")
    assert (tmp_path / "bee.png").read_bytes() == (tmp_path / "1.png").read_bytes()


def test_logs_hold_no_progress_bars(folder, tmp_path):
    out = tmp_path / "a.png"
    for extra in ([], ["--progressive", 2]):
        result = sample(folder, "--count", 1, *extra, "--out", out)
        assert result.stderr == "" and result.stdout == f"wrote {out}\n"


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_the_steps_on_the_way_are_those_of_the_schedulers_chain(make_pipeline, tmp_path, name):
    """50 steps of Euler if none are asked for, and two calls in each of Heun's."""
    pipeline = make_pipeline()
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path / "pipeline")
    script("sample.py", tmp_path / "pipeline", "--count", 1, "--progressive", 12, "--out", tmp_path / "rows.png")
    assert Image.open(tmp_path / "rows.png").width == 12 * TILE


def test_captions():
    tiles = [Image.new("L", (8, 8))] * 6
    plain, same = as_sheet(tiles, 3), as_sheet(tiles, 3, ["a", "b", "c"] * 2)
    line = same.height - plain.height
    assert CAPTION - 5 < line < CAPTION + 5  # once, above the first row
    assert as_sheet(tiles, 3, list("abcabd")).height == plain.height + 2 * line
    assert as_sheet(tiles[:5], 3, list("abcab")).height == same.height
    wide = np.asarray(as_sheet(tiles, 3, ["a name of many words", "", "", "x", "", ""]))[:line]
    cut = np.asarray(as_sheet(tiles, 3, ["a name of many words", "b", "", "x", "", ""]))[:line]
    assert (wide[:, TILE : TILE + 30] < 128).any() and not (cut[:, TILE - 2 : TILE + 2] < 128).any()
    for mode in ("RGB", "RGBA"):
        assert as_sheet([Image.new(mode, (8, 8))] * 2, 2, ["a", "b"]).mode == mode


def test_names_that_cannot_be_drawn(make_pipeline):
    """Or are not known: the label stands for them."""
    unet = make_pipeline(num_class_embeds=5).unet
    assert captions_of(unet, torch.tensor([2, 0])) == ["2", "0"]
    unet.class_names = [
        "\N{CJK UNIFIED IDEOGRAPH-732B}",
        "\N{LATIN CAPITAL LETTER A WITH DIAERESIS}pfel",
        "a\n\tb",
        " ",
    ]
    assert captions_of(unet, torch.arange(5)) == ["0", unet.class_names[1], "a b", "3", "4"]
    assert captions_of(unet, None) is None


@pytest.mark.parametrize(("ending", "kind"), [("jpg", "JPEG"), ("WEBP", "WEBP"), ("bmp", "BMP"), ("png", "PNG")])
def test_the_ending_says_the_format(folder, tmp_path, ending, kind):
    sample(folder, "--count", 3, "--out", tmp_path / f"sheet.{ending}")
    assert Image.open(tmp_path / f"sheet.{ending}").format == kind
    assert sorted(os.listdir(tmp_path)) == ["pipeline", f"sheet.{ending}"]


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["--out", "sheet.foo"], 1, "sheet.foo: pictures are written as .png, .jpg, .webp"),
        (["--out", "sheet"], 1, "sheet: pictures are written as .png"),
        (["--out", "."], 1, "--out . is a folder; give a file"),
        (["--out", "no/such/sheet.png"], 1, "--out no/such/sheet.png: there is no such folder"),
        (["--count", "0"], 2, "argument --count: 0 must be an integer, 1 or more"),
        (["--steps", "0"], 2, "argument --steps: 0 must be an integer, 1 or more"),
        (["--eta", "1.5"], 2, "argument --eta: 1.5 must be a number, 0 to 1"),
        (["--eta", "nan"], 2, "argument --eta: nan must be a number, 0 to 1"),
        (["--guidance_scale", "-1"], 2, "argument --guidance_scale: -1 must be a number, 0 or more"),
        (["--classifier_scale", "inf"], 2, "argument --classifier_scale: inf must be a number, 0 or more"),
        (["--noise_level", "2"], 2, "argument --noise_level: 2 must be a number, 0 to 1"),
        (["--progressive", "1"], 2, "argument --progressive: 1 must be an integer, 2 or more"),
        (["--interpolate", "-1"], 2, "argument --interpolate: -1 must be an integer, 0 or more"),
        (["--progressive", "2", "--interpolate", "5"], 2, "make two sheets; give one of them"),
        (["--device", "nowhere"], 1, "--device nowhere cannot be used"),
    ],
)
def test_mistakes_before_the_pipeline_is_opened(tmp_path, monkeypatch, argv, status, message):
    monkeypatch.chdir(tmp_path)
    result = sample("no/such/pipeline", *argv, check=False)
    assert result.returncode == status and message in result.stderr.splitlines()[-1], result.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--class_label", "Bees"], "--class_labels='Bees' is not the name of a class; did you mean 'bee'?"),
        (["--class_label", "zebra"], "--class_labels='zebra' is not the name of a class; known: ['ant', 'bee', 'cat']"),
        (["--class_label", "3"], "give integers from 0 to 2"),
        (["--class_label", "3"], ": --class_labels 3: give integers from 0 to 2, one for each image"),
        (["--steps", "2000"], ": --steps 2000 must be an integer, 1 to 1000"),
        (["--guidance_scale", "2"], ": --guidance_scale 2.0 needs a network trained with label dropout"),
        (["--classifier_scale", "2"], ": --classifier_scale 2.0 needs a classifier"),
        (["--noise_level", "0.5"], "--noise_level 0.5 is of an upsampler"),
    ],
)
def test_mistakes_before_anything_is_drawn(folder, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    result = sample(folder, *argv, check=False)
    assert result.returncode > 0 and message in result.stderr.splitlines()[-1], result.stderr
    assert os.listdir(tmp_path) == ["pipeline"]


@pytest.mark.parametrize("label", ["3", "ant"])
def test_a_class_of_a_pipeline_without_classes(make_pipeline, tmp_path, monkeypatch, label):
    monkeypatch.chdir(tmp_path)
    make_pipeline().save_pretrained(tmp_path / "pipeline")
    result = sample("pipeline", "--class_label", label, check=False)
    assert result.stderr.endswith(f": --class_labels {label}: this pipeline has no classes; leave it out\n")
    assert result.returncode == 2 and os.listdir(tmp_path) == ["pipeline"]


def test_the_option_of_a_scheduler_that_has_none(make_pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipeline = make_pipeline()
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path / "pipeline")
    result = sample("pipeline", "--eta", "0", check=False)
    assert (
        result.stderr
        == "sample.py: --eta 0.0: EulerDiscreteScheduler has none; leave it out or use another scheduler\n"
    )


def test_the_folder_of_a_run(make_pipeline, tmp_path):
    """The commands take its pipeline; from_pretrained names it."""
    make_pipeline().save_pretrained(tmp_path / "run/pipeline")
    for name in ("run", "run/pipeline"):
        sample(tmp_path / name, "--count", 1, "--out", tmp_path / f"{len(name)}.png")
    assert (tmp_path / "3.png").read_bytes() == (tmp_path / "12.png").read_bytes()
    for cls in (DDPMImagePipeline, CascadePipeline):
        with pytest.raises(OSError, match=r"run; did you mean .*/run/pipeline\?$"):
            cls.from_pretrained(tmp_path / "run")


def test_a_format_without_transparency(make_pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_pipeline(channels=4).save_pretrained(tmp_path / "pipeline")
    result = sample("pipeline", "--out", "sheet.jpg", check=False)
    assert result.returncode == 1 and "sheet.jpg: cannot write mode RGBA as JPEG; give a .png file" in result.stderr
    assert os.listdir(tmp_path) == ["pipeline"]


def test_images_of_the_data_are_of_all_classes(make_pipeline, tmp_path):
    """A folder sorted by class: an upsampler's sheet and interpolations show images from all over it."""
    for label, grey in zip(NAMES, (0, 120, 240)):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(8):
            Image.new("L", (16, 16), grey).save(tmp_path / f"images/{label}/{i}.png")
    unet = make_pipeline(sample_size=16, num_class_embeds=3, channels=2, out_channels=1).unet
    unet.class_names = NAMES
    DDPMSuperResolutionPipeline(unet, VariationalDDPMScheduler(), low_resolution=8).save_pretrained(tmp_path / "up")
    make_pipeline().save_pretrained(tmp_path / "plain")
    data = ["--data", tmp_path / "images", "--split", "train"]
    sample(tmp_path / "up", *data, "--count", 6, "--out", tmp_path / "up.png")
    sample(tmp_path / "plain", *data, "--interpolate", 500, "--count", 3, "--out", tmp_path / "mixed.png")
    for name in ("up", "mixed"):
        pixels = np.asarray(Image.open(tmp_path / f"{name}.png"))
        assert all((pixels == grey).sum() >= 64 * 64 for grey in (0, 120, 240)), name
