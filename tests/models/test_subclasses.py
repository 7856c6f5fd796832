"""A bare subclass of a network works wherever its parent does, though its name and its module are others."""

import json

import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel

from ddpm_hf import DDPMImagePipeline, DDPMUNet, InferenceUNet, NoisyClassifier, VariationalDDPMScheduler, bits_per_dim
from support.networks import small_classifier, small_unet


class MyUNet(DDPMUNet):
    pass


class MyClassifier(NoisyClassifier):
    pass


@pytest.fixture
def unet():
    return small_unet(MyUNet)


@pytest.fixture
def inputs():
    return torch.randn(2, 1, 8, 8), torch.tensor([3, 700])


def same_weights(network, other):
    return network.state_dict().keys() == other.state_dict().keys() and all(
        torch.equal(value, other.state_dict()[name]) for name, value in network.state_dict().items()
    )


def test_saved_under_the_name_of_the_stock_class(unet, inputs, tmp_path):
    unet.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "UNet2DModel"
    for cls in (MyUNet, DDPMUNet, UNet2DModel):
        opened = cls.from_pretrained(tmp_path)
        assert type(opened) is cls and same_weights(opened, unet)
    assert same_weights(MyUNet.from_config(unet.config), unet) is False  # new weights
    torch.testing.assert_close(UNet2DModel.from_pretrained(tmp_path)(*inputs).sample, unet(*inputs).sample)


def test_errors_name_the_subclass():
    with pytest.raises(ValueError, match="'KDownBlock2D', not supported by MyUNet"):
        small_unet(MyUNet, down_block_types=("DownBlock2D", "KDownBlock2D"))


def test_optimized(unet, inputs):
    fast = InferenceUNet(unet, compile=False)
    torch.testing.assert_close(fast(*inputs).sample, unet(*inputs).sample, rtol=1e-4, atol=1e-4)
    assert fast.is_current(unet)


def test_in_a_pipeline(unet, tmp_path):
    pipeline = DDPMImagePipeline(unet, VariationalDDPMScheduler())
    pipeline.set_progress_bar_config(disable=True)

    def draw(pipeline):
        generator = torch.Generator().manual_seed(0)
        return pipeline(2, generator=generator, num_inference_steps=3, output_type="latent").images

    plain = small_unet()
    plain.load_state_dict(unet.state_dict())
    expected = draw(DDPMImagePipeline(plain, VariationalDDPMScheduler()))
    assert pipeline.unet is unet and torch.equal(draw(pipeline), expected)
    pipeline.save_pretrained(tmp_path)
    assert type(DDPMPipeline.from_pretrained(tmp_path).unet) is UNet2DModel
    opened = DDPMImagePipeline.from_pretrained(tmp_path)
    assert type(opened.unet) is DDPMUNet
    torch.testing.assert_close(draw(opened), expected, rtol=0, atol=1e-4)
    assert DDPMPipeline.from_pipe(pipeline).unet is unet
    pipeline.optimize(compile=False)
    torch.testing.assert_close(draw(pipeline), expected, rtol=0, atol=1e-4)


def test_likelihood(unet):
    plain, x_start = small_unet(), torch.randint(256, (2, 1, 8, 8)) / 127.5 - 1
    plain.load_state_dict(unet.state_dict())
    scheduler = VariationalDDPMScheduler(num_train_timesteps=5)
    totals = [
        bits_per_dim(net.eval(), scheduler, x_start, generator=torch.Generator().manual_seed(0)).total
        for net in (unet, plain)
    ]
    assert torch.equal(*totals)


def test_classifier(unet, inputs, tmp_path):
    scheduler = VariationalDDPMScheduler()
    classifier = small_classifier(MyClassifier, scheduler=dict(scheduler.config))
    classifier.save_pretrained(tmp_path / "alone")
    for cls in (MyClassifier, NoisyClassifier):
        opened = cls.from_pretrained(tmp_path / "alone")
        assert type(opened) is cls
        torch.testing.assert_close(opened(*inputs), classifier(*inputs), rtol=0, atol=0)
    pipeline = DDPMImagePipeline(unet, scheduler, classifier)
    pipeline.set_progress_bar_config(disable=True)

    def draw(pipeline):
        kwargs = dict(class_labels=1, classifier_scale=2.0, num_inference_steps=3, output_type="latent")
        return pipeline(2, generator=torch.Generator().manual_seed(0), **kwargs).images

    expected = draw(pipeline)
    pipeline.save_pretrained(tmp_path / "pipeline")
    opened = DDPMImagePipeline.from_pretrained(tmp_path / "pipeline")
    assert type(opened.classifier) is NoisyClassifier
    torch.testing.assert_close(draw(opened), expected, rtol=0, atol=1e-4)
