"""Networks and schedulers that diffusers' classes would sample wrongly are saved under our names, with their source."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler

from ddpm_hf import (
    CascadePipeline,
    DDPMImagePipeline,
    DDPMSuperResolutionPipeline,
    VariationalDDPMScheduler,
    VESDEScheduler,
)
from ddpm_hf.hub.card import card_text
from ddpm_hf.hub.contents import published_files
from ddpm_hf.schedulers import conditioning_times
from support.elsewhere import ROUNDING, open_elsewhere, run_elsewhere
from support.networks import small_unet

OWN_NETWORK = dict(
    attention_head_dim=None,
    num_attention_heads=2,
    up_attention="last",
    block_scale_factor=2**0.5,
    fourier_features=(0, 1),
)


def rescaled(**config):
    return VariationalDDPMScheduler(4000, beta_schedule="cosine", rescale_timesteps=True, **config)


def pipeline(own, cls=DDPMImagePipeline, **kwargs):
    """A pipeline whose parts in `own` are such that no class of diffusers samples them rightly."""
    unet = small_unet(**(OWN_NETWORK if "unet" in own else {}), **kwargs.pop("network", {}))
    pipe = cls(unet, rescaled() if "scheduler" in own else VariationalDDPMScheduler(), **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images_of(pipe):
    return pipe(2, torch.Generator().manual_seed(0), 4, "np").images


def index_of(folder):
    return json.loads((folder / "model_index.json").read_text())


PARTS = {"unet": ["ddpm_unet", "DDPMUNet"], "scheduler": ["ddpm_scheduler", "VariationalDDPMScheduler"]}
STOCK = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}
OWN = [("unet",), ("scheduler",), ("unet", "scheduler")]


@pytest.mark.parametrize("own", OWN, ids="-".join)
def test_who_opens_it(own, tmp_path):
    pipe, folder = pipeline(own), tmp_path / "saved"
    here = images_of(pipe)
    pipe.save_pretrained(folder)
    expected = STOCK | {name: PARTS[name] for name in own} | {"_class_name": ["pipeline", "DDPMImagePipeline"]}
    assert expected.items() <= index_of(folder).items()
    for name, file in (("unet", "config.json"), ("scheduler", "scheduler_config.json")):
        assert json.loads((folder / name / file).read_text())["_class_name"] == expected[name][1]
        assert (folder / name / f"{PARTS[name][0]}.py").is_file() == (name in own)
    opened = DDPMImagePipeline.from_pretrained(folder)
    opened.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(images_of(opened), here, atol=ROUNDING)
    with pytest.raises(ValueError, match="contains custom code in pipeline.py"):
        DiffusionPipeline.from_pretrained(folder)
    output = open_elsewhere("remote", folder, tmp_path / "remote", tmp_path / "home", steps=4)
    assert "DDPMImagePipeline DDPMUNet VariationalDDPMScheduler 256\nmessages: []" in output
    np.testing.assert_allclose(np.load(tmp_path / "remote.npy"), here, atol=ROUNDING)
    again = Path(f"{tmp_path / 'remote'}_again")  # what is saved there is the same
    files = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    assert files == {path.relative_to(again) for path in again.rglob("*") if path.is_file()}
    assert all((folder / file).read_bytes() == (again / file).read_bytes() for file in files)


@pytest.mark.parametrize("cls", [DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler])
def test_a_scheduler_by_itself_is_refused(cls, tmp_path):
    pipeline(("scheduler",)).save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match="^ddpm_hf.rescale_timesteps is not implemented for"):
        cls.from_pretrained(tmp_path, subfolder="scheduler")


def test_a_scheduler_of_diffusers_keeps_the_setting(tmp_path):
    """Then it is the pipeline that plain diffusers must not open: its own would tell the network t."""
    pipe = pipeline(("scheduler",))
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    here = images_of(pipe)
    pipe.save_pretrained(tmp_path / "saved")
    index = index_of(tmp_path / "saved")
    assert index["scheduler"] == ["diffusers", "DPMSolverMultistepScheduler"] and index["unet"] == STOCK["unet"]
    assert index["_class_name"] == ["pipeline", "DDPMImagePipeline"]
    assert json.loads(published_files(tmp_path / "saved")["model_index.json"])["_class_name"] == index["_class_name"]
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(tmp_path / "saved")
    opened = DDPMImagePipeline.from_pretrained(tmp_path / "saved")
    assert conditioning_times(opened.scheduler, 8) == 2
    output = open_elsewhere("remote", tmp_path / "saved", tmp_path / "remote", tmp_path / "home", steps=4)
    assert "DDPMImagePipeline DDPMUNet DPMSolverMultistepScheduler" in output
    np.testing.assert_allclose(np.load(tmp_path / "remote.npy"), here, atol=ROUNDING)


def test_what_is_pushed(hub, tmp_path):
    pipe = pipeline(("unet", "scheduler"))
    pipe.push_to_hub("user/own-parts")
    files = hub.files("user/own-parts")
    assert {"unet/ddpm_unet.py", "scheduler/ddpm_scheduler.py", "pipeline.py"} <= files.keys()
    card = files["README.md"].decode()
    assert "Plain diffusers cannot sample a network with settings that only ddpm-hf has and stops with an error" in card
    here = images_of(pipe)
    for extra in ({}, {"custom_pipeline": "user/own-parts"}, {"revision": "remote-code"}):
        opened = DiffusionPipeline.from_pretrained("user/own-parts", trust_remote_code=True, **extra)
        opened.set_progress_bar_config(disable=True)
        np.testing.assert_allclose(images_of(opened), here, atol=ROUNDING)
    np.testing.assert_allclose(images_of(DDPMImagePipeline.from_pretrained("user/own-parts")), here, atol=ROUNDING)
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained("user/own-parts")
    pipeline(()).push_to_hub("user/own-parts")  # the sources of parts that it does not have any more are removed
    assert not [name for name in hub.files("user/own-parts") if name.endswith(".py") and "/" in name]
    assert type(DiffusionPipeline.from_pretrained("user/own-parts")).__name__ == "DDPMPipeline"


def test_discrete_noise_levels(tmp_path):
    """The network divides by the noise level that its scheduler tells it the index of (ve/cifar10_ncsnpp)."""
    unet = small_unet(sigma_table=(0.01, 50.0, 20))
    pipe = DDPMImagePipeline(unet, VESDEScheduler(20, conditioning="level_index"))
    pipe.set_progress_bar_config(disable=True)
    sde, x, index = pipe.scheduler.sde, torch.randn(1, 1, 8, 8), torch.tensor([7])
    plain = small_unet()
    plain.load_state_dict(unet.state_dict())
    torch.testing.assert_close(unet(x, index).sample * sde.std(sde.times(7)), plain(x, index).sample)
    here = images_of(pipe)
    pipe.save_pretrained(tmp_path / "saved")
    assert index_of(tmp_path / "saved")["unet"] == PARTS["unet"]
    output = open_elsewhere("remote", tmp_path / "saved", tmp_path / "remote", tmp_path / "home", steps=4)
    assert "DDPMImagePipeline DDPMUNet VESDEScheduler 256\nmessages: []" in output
    np.testing.assert_allclose(np.load(tmp_path / "remote.npy"), here, atol=ROUNDING)


def test_a_missing_source_is_not_pushed(tmp_path):
    pipeline(("unet",)).save_pretrained(tmp_path)
    (tmp_path / "unet/ddpm_unet.py").unlink()
    with pytest.raises(ValueError, match="unet has no ddpm_unet.py, but model_index.json names it; save the pipeline"):
        published_files(tmp_path)


def test_the_card_says_why(tmp_path):
    pipeline(("scheduler",)).save_pretrained(tmp_path)
    card = card_text(tmp_path)
    assert (
        "Plain diffusers cannot sample a network that is given t * 1000 / T in place of t and stops with an error"
        in card
    )
    assert '4000 timesteps, schedule "cosine"' in card


OPEN_CASCADE = """
    import sys
    sys.modules["ddpm_hf"] = None
    import diffusers, numpy, torch
    folder, out = sys.argv[1:]
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    numpy.save(out, pipe(2, torch.Generator().manual_seed(0), 4, "np", upsampler_steps=4).images)
"""


def test_stages_and_super_resolution(tmp_path):
    wide = dict(sample_size=16, in_channels=2)
    upsampler = pipeline(("unet", "scheduler"), DDPMSuperResolutionPipeline, low_resolution=8, network=wide)
    upsampler.save_pretrained(tmp_path / "upsampler")
    assert PARTS.items() <= index_of(tmp_path / "upsampler").items()
    pipe = CascadePipeline(pipeline(("scheduler",)), upsampler)
    pipe.save_pretrained(tmp_path / "cascade")
    sources = {
        "base/scheduler/ddpm_scheduler.py",
        "upsampler/scheduler/ddpm_scheduler.py",
        "upsampler/unet/ddpm_unet.py",
    }
    files = published_files(tmp_path / "cascade")
    assert {name for name in files if name.endswith(".py") and name.count("/") == 2} == sources
    here = pipe(2, torch.Generator().manual_seed(0), 4, "np", upsampler_steps=4).images
    opened = CascadePipeline.from_pretrained(tmp_path / "cascade")
    np.testing.assert_allclose(
        opened(2, torch.Generator().manual_seed(0), 4, "np", upsampler_steps=4).images, here, atol=ROUNDING
    )
    argv = tmp_path / "home", tmp_path / "cascade", tmp_path / "out.npy"
    run_elsewhere(OPEN_CASCADE, *argv, package=False, offline=True)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), here, atol=ROUNDING)
