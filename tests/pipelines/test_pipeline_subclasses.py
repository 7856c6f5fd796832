"""Bare subclasses of pipelines, networks and schedulers are saved, published and opened as their parents."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from ddpm_hf import (
    CascadePipeline,
    DDPMImagePipeline,
    DDPMSuperResolutionPipeline,
    DDPMUNet,
    VariationalDDPMScheduler,
    VPSDEScheduler,
)
from ddpm_hf.hub import saved
from ddpm_hf.hub.contents import published_files
from ddpm_hf.hub.upload import push_folder


class MyUNet(DDPMUNet):
    pass


class MyScheduler(VariationalDDPMScheduler):
    pass


class MyVPScheduler(VPSDEScheduler):
    pass


class MyPipeline(DDPMImagePipeline):
    pass


class MySuperResolutionPipeline(DDPMSuperResolutionPipeline):
    pass


class MyCascade(CascadePipeline):
    pass


def network(size=8, in_channels=1):
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = MyUNet(size, in_channels, 1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, **blocks)
    unet.reset_parameters("torch")
    return unet.eval()


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, *args, **kwargs):
    generator = torch.Generator().manual_seed(0)
    return quiet(pipeline)(*args, generator=generator, num_inference_steps=3, output_type="np", **kwargs).images


@pytest.mark.parametrize(
    "scheduler, parent", [(MyScheduler, VariationalDDPMScheduler), (MyVPScheduler, VPSDEScheduler)]
)
def test_pipeline(hub, tmp_path, scheduler, parent):
    pipeline = MyPipeline(network(), scheduler())
    pipeline.save_pretrained(tmp_path)
    expected = draw(pipeline, 2)
    for cls in MyPipeline, DDPMImagePipeline:
        opened = cls.from_pretrained(tmp_path)
        assert [type(part) for part in (opened, opened.unet, opened.scheduler)] == [cls, DDPMUNet, parent]
        np.testing.assert_allclose(draw(opened, 2), expected, atol=1e-5)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert "My" not in json.dumps(index) and index["unet"] == ["diffusers", "UNet2DModel"]
    assert "class MyUNet" not in (tmp_path / "pipeline.py").read_text()
    remote = DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline=str(tmp_path), trust_remote_code=True)
    np.testing.assert_allclose(draw(remote, 2), expected, atol=1e-5)
    push_folder(tmp_path, f"user/{scheduler.__name__}")
    assert hub.files(f"user/{scheduler.__name__}").keys() >= {"pipeline.py", "scheduler/scheduler_config.json"}


def test_super_resolution_and_cascade(hub, tmp_path):
    upsampler = MySuperResolutionPipeline(network(16, 2), MyScheduler(), low_resolution=8)
    upsampler.save_pretrained(tmp_path / "upsampler")
    images = torch.zeros(2, 1, 8, 8)
    opened = DDPMSuperResolutionPipeline.from_pretrained(tmp_path / "upsampler")
    np.testing.assert_allclose(draw(opened, images), draw(upsampler, images), atol=1e-5)
    MySuperResolutionPipeline.from_pretrained(tmp_path / "upsampler")
    with pytest.raises(ValueError, match="open it with that class, not with MyPipeline"):
        MyPipeline.from_pretrained(tmp_path / "upsampler")
    cascade = MyCascade(MyPipeline(network(), MyScheduler()), upsampler)
    cascade.save_pretrained(tmp_path / "cascade")
    for cls in MyCascade, CascadePipeline:
        reopened = cls.from_pretrained(tmp_path / "cascade")
        assert type(reopened) is cls and type(reopened.upsampler) is DDPMSuperResolutionPipeline
    assert "base/pipeline.py" in published_files(tmp_path / "cascade")
    cascade.push_to_hub("user/my-cascade")
    card = hub.files("user/my-cascade")["README.md"].decode()
    assert "the first draws images of 8x8\npixels, the second upsamples them to 16x16." in card
    assert "CascadePipeline.from_pretrained" in card and "ho2020denoising" in card and "nichol2021improved" not in card


def test_the_registry_is_what_the_classes_say():
    pipelines = {cls.__name__: cls for cls in (DDPMImagePipeline, DDPMSuperResolutionPipeline, CascadePipeline)}
    assert {kind.name: kind.stock_class for kind in saved.PIPELINES} == {
        name: cls.stock_class for name, cls in pipelines.items()
    }
    for kind in saved.PIPELINES:
        assert kind.index_names[0] == [pipelines[kind.name].source_name, kind.name]
    assert tuple(CascadePipeline.stage_classes) == saved.CASCADE.components
    for part, cls in saved.NETWORKS.items():
        assert all(saved.class_of_part(part, name) is cls for name in (cls.__name__, *cls.stands_for))
