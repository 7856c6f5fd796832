"""Two stages, trained, put together, saved, opened and sampled as a user does it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import ddpm_hf
from ddpm_hf import CascadePipeline, DDPMImagePipeline, DDPMSuperResolutionPipeline
from ddpm_hf.data.pixels import image_transform
from ddpm_hf.data.sources import load_images
from ddpm_hf.hub.errors import HubError
from ddpm_hf.models.conditioning import downsample
from ddpm_hf.training.command_line import load_config
from ddpm_hf.training.config import ConfigError
from support.elsewhere import ROUNDING, run_elsewhere
from support.scripts import script

SMALL = [
    "--steps",
    "4",
    "--batch_size",
    "8",
    "--sample_every",
    "4",
    "--sample_count",
    "10",
    "--sample_steps",
    "3",
    "--log_every",
    "2",
]
SMALL += ["--unet.block_out_channels", "[8, 16]", "--unet.norm_num_groups", "4", "--unet.layers_per_block", "1"]
SMALL += ["--unet.attention_head_dim", "8", "--sample_raw", "0", "--log_every", "2"]
SECOND = ["--unet.down_block_types", "[DownBlock2D, DownBlock2D]", "--unet.up_block_types", "[UpBlock2D, UpBlock2D]"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    script("train.py", "--config", "mnist-8", *SMALL, "--output_dir", folder / "base")
    script("train.py", "--config", "mnist-8-32", *SMALL, *SECOND, "--output_dir", folder / "upsampler")
    cascade = CascadePipeline(
        DDPMImagePipeline.from_pretrained(folder / "base/pipeline"),
        DDPMSuperResolutionPipeline.from_pretrained(folder / "upsampler/pipeline"),
    )
    cascade.save_pretrained(folder / "cascade")
    return folder


def test_what_an_upsamplers_run_writes(trained):
    run = trained / "upsampler"
    assert Image.open(run / "samples/0000004-stages.png").width == 4 * (3 * 64 + 4)  # rows of four
    assert not (run / "samples/0000004-nearest.png").exists()
    assert np.asarray(Image.open(run / "samples/0000004.png")).std() > 0
    index = json.loads((run / "pipeline/model_index.json").read_text())
    assert index["low_resolution"] == [8, 8] and index["conditioning_noise"] == 0.5
    card = (run / "pipeline/README.md").read_text()
    assert "DDPMSuperResolutionPipeline" in card and "8x8" in card and "trust_remote_code=True" in card


def test_going_on_and_fine_tuning(trained, tmp_path):
    arguments = ["--config", "mnist-8-32", *SMALL, *SECOND, "--lr_schedule", "constant"]
    script("train.py", *arguments, "--steps", "2", "--output_dir", tmp_path / "run")
    script("train.py", *arguments, "--steps", "4", "--output_dir", tmp_path / "run")
    script("train.py", *arguments, "--output_dir", tmp_path / "once")
    a, b = (DDPMSuperResolutionPipeline.from_pretrained(tmp_path / name / "pipeline").unet for name in ("run", "once"))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    tuned = [
        "--init_from",
        trained / "upsampler/pipeline",
        "--learning_rate",
        "1e-12",
        "--output_dir",
        tmp_path / "tuned",
    ]
    script("train.py", *arguments, *tuned)
    a, b = (
        DDPMSuperResolutionPipeline.from_pretrained(path / "pipeline").unet
        for path in (trained / "upsampler", tmp_path / "tuned")
    )
    for p, q in zip(a.parameters(), b.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9)


OPEN = """
    import sys
    import numpy as np, torch
    opener, kind, x, out, small = sys.argv[1:]
    if opener == "remote":
        sys.modules["ddpm_hf"] = None
        import logging
        from diffusers import DiffusionPipeline
        warnings = []
        handler = logging.Handler()
        handler.emit = lambda record: warnings.append(record.getMessage())
        logging.getLogger("diffusers").addHandler(handler)
        pipe = DiffusionPipeline.from_pretrained(x, trust_remote_code=True)
        assert not [message for message in warnings if "Expected types" in message], warnings
    else:
        import ddpm_hf
        pipe = getattr(ddpm_hf, kind).from_pretrained(x)
    print(type(pipe).__name__, *(type(part).__name__ for part in pipe.components.values()))
    generator = torch.Generator().manual_seed(0)
    if kind == "CascadePipeline":
        kwargs = dict(num_inference_steps=3, upsampler_steps=3, class_labels=[1, 2], noise_level=0.2, output_type="np")
        images = pipe(2, generator, **kwargs).images
    else:
        images = pipe(torch.load(small), generator, 3, "np", class_labels=[1, 2], noise_level=0.2).images
    np.save(out, images)
"""


@pytest.mark.parametrize("opener", ["remote", pytest.param("package", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "kind", [pytest.param("DDPMSuperResolutionPipeline", marks=pytest.mark.slow), "CascadePipeline"]
)  # a cascade has both
def test_opened_in_a_new_process(trained, tmp_path, opener, kind):
    """To the same pixels."""
    torch.save(small := torch.rand(2, 1, 8, 8) * 2 - 1, tmp_path / "small.pt")
    folder = trained / ("cascade" if kind == "CascadePipeline" else "upsampler/pipeline")
    output = run_elsewhere(
        OPEN,
        tmp_path,
        opener,
        kind,
        folder,
        tmp_path / "out.npy",
        tmp_path / "small.pt",
        package=opener == "package",
        offline=True,
    )
    generator = torch.Generator().manual_seed(0)
    if kind == "CascadePipeline":
        assert output.startswith("CascadePipeline DDPMImagePipeline DDPMSuperResolutionPipeline")
        kwargs = dict(num_inference_steps=3, upsampler_steps=3, class_labels=[1, 2], noise_level=0.2, output_type="np")
        expected = CascadePipeline.from_pretrained(folder)(2, generator, **kwargs).images
    else:
        assert output.startswith("DDPMSuperResolutionPipeline DDPMUNet VariationalDDPMScheduler")
        pipe = DDPMSuperResolutionPipeline.from_pretrained(folder)
        expected = pipe(small, generator, 3, "np", class_labels=[1, 2], noise_level=0.2).images
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, rtol=0, atol=ROUNDING)


def test_pictures_go_in_and_come_out(trained):
    pipe = DDPMSuperResolutionPipeline.from_pretrained(trained / "upsampler/pipeline")
    pictures = [image.resize((8, 8)) for image in load_images("mnist", "test")[:2]["image"]]
    assert pipe(pictures, num_inference_steps=2, class_labels=[0, 1]).images[0].size == (32, 32)
    x_start = torch.stack([image_transform((32, 32), 1)(image) for image in load_images("mnist", "test")[:2]["image"]])
    small = downsample(x_start, (8, 8))
    assert pipe(small, num_inference_steps=2, class_labels=0, output_type="pt").images.shape == (2, 1, 32, 32)


def test_sheets_of_both(trained, tmp_path):
    arguments = ["--count", "5", "--steps", "2", "--data", "mnist", "--noise_level", "0.1"]
    script("sample.py", trained / "upsampler/pipeline", *arguments, "--out", tmp_path / "a.png")
    sheet = Image.open(tmp_path / "a.png")
    assert sheet.width == 4 * (3 * 64 + 4) and 2 * 68 < sheet.height < 3 * 68  # and the names of classes
    script("sample.py", trained / "cascade", "--count", "10", "--steps", "2", "--out", tmp_path / "b.png")
    sheet = Image.open(tmp_path / "b.png")
    assert sheet.width == 10 * 68 and 68 < sheet.height < 2 * 68
    result = script("sample.py", trained / "cascade", "--progressive", "3", "--out", tmp_path / "c.png", check=False)
    assert result.returncode == 2 and "are not for a CascadePipeline" in result.stderr
    result = script("evaluate.py", trained / "upsampler/pipeline", "--data", "mnist", check=False)
    assert result.returncode == 1 and "holds a DDPMSuperResolutionPipeline; open it with that class" in result.stderr


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--low_resolution", "32"], "low_resolution=32 must be smaller than image_size=32"),
        (["--low_resolution", "0"], r"low_resolution=0 must be an integer or a list of integers in \[1, 65536\]"),
        (["--low_resolution", "[8, 8, 8]"], "must be smaller"),
        (["--conditioning_noise", "1"], r"conditioning_noise=1 must be a number in \[0, 1\)"),
        (["--low_resolution", "null"], "conditioning_noise=0.5 is for networks with low_resolution; leave it out"),
        (["--eval_every", "5"], "eval_every measures networks that start from noise alone"),
    ],
)
def test_mistakes(argv, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as error:
        load_config(["--config", "mnist-8-32", "--output_dir", str(tmp_path / "run"), *argv])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "kind", [pytest.param("DDPMSuperResolutionPipeline", marks=pytest.mark.slow), "CascadePipeline"]
)
def test_published(hub, trained, tmp_path, kind):
    cls, repo = getattr(ddpm_hf, kind), f"user/{kind.lower()}"
    cls.from_pretrained(trained / ("cascade" if kind == "CascadePipeline" else "upsampler/pipeline")).push_to_hub(repo)
    files = hub.files(repo)
    stages = ("base/", "upsampler/") if kind == "CascadePipeline" else ("",)
    for stage in stages:
        names = "model_index.json", "pipeline.py", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"
        assert {stage + name for name in names} <= files.keys()
    assert {"model_index.json", "pipeline.py", "README.md"} <= files.keys()
    assert f'{kind}.from_pretrained("{repo}")' in files["README.md"].decode()
    assert list(hub.repositories["model", repo]["branches"]) == ["main"]
    log = len(hub.repositories["model", repo]["log"])
    cls.from_pretrained(repo, cache_dir=tmp_path / "cache").push_to_hub(repo)
    assert hub.files(repo) == files and len(hub.repositories["model", repo]["log"]) == log  # nothing changed
    with pytest.raises(HubError, match="holds a .* already; choose another name"):
        DDPMImagePipeline.from_pretrained(trained / "base/pipeline").push_to_hub(repo)
    opened = run_elsewhere(OPEN_HUB, tmp_path, repo, package=False)
    assert opened.strip() == kind


OPEN_HUB = """
    import sys
    sys.modules["ddpm_hf"] = None
    from diffusers import DiffusionPipeline
    print(type(DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)).__name__)
"""
