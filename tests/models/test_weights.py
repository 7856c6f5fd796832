"""Weights that are not those of the network: refused in one line, before anything is computed with them."""

import json
import re

import pytest
import torch
from diffusers import DDPMPipeline, DiffusionPipeline, UNet2DModel
from safetensors.torch import load_file, save_file

from ddpm_hf import DDPMImagePipeline, DDPMUNet, NoisyClassifier
from support.networks import small_classifier

FILE = "diffusion_pytorch_model.safetensors"
LORA = {".to_q.": ".to_q.base_layer."}


def renamed(weights, names=None, prefix=""):
    for old, new in (names or {}).items():
        weights = {name.replace(old, new): weight for name, weight in weights.items()}
    return {prefix + name: weight for name, weight in weights.items()}


def without(weights, *names):
    return {name: weight for name, weight in weights.items() if name not in names}


REFUSED = [
    (lambda w: without(w, "conv_out.weight"), r"they lack 1 tensor \(conv_out.weight\); save it again"),
    (
        lambda w: without(w, "mid_block.resnets.0.conv1.weight", "conv_in.bias"),
        r"they lack 2 tensors \(conv_in.bias, mid_block",
    ),
    (
        lambda w: renamed(w, LORA),
        r"they lack \d+ tensors .*to_q.bias, .* and hold \d+ tensors .*base_layer.*merge the adapters",
    ),
    (
        lambda w: renamed(w, prefix="model.diffusion_model."),
        r"they lack \d+ tensors .* hold \d+ tensors \(model.diffusion",
    ),
    (lambda w: {**w, "ema\n": torch.ones(1)}, r"they are complete and hold 1 tensor \(ema\\n\) not of this network"),
    (lambda w: {**w, "module.conv_in.bias": torch.ones(8)}, "with and without prefixes, 1 tensor .module.conv_in.bias"),
    (lambda w: w | {"conv_in.bias": torch.ones(9)}, r"conv_in.bias has the shape \(9,\) and not \(8,\)"),
    (
        lambda w: w | {"conv_in.bias": torch.ones(8).long()},
        "conv_in.bias is of torch.int64; the weights must be of floating",
    ),
    (lambda w: {}, r"they lack \d+ tensors"),
]


HOW = ({"low_cpu_mem_usage": False}, {"device_map": "cpu"}, {"torch_dtype": torch.bfloat16}, {})


@pytest.mark.parametrize("change, message", REFUSED)
def test_weights_of_another_network(make_pipeline, tmp_path, change, message):
    make_pipeline().save_pretrained(tmp_path)
    file = tmp_path / "unet" / FILE
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    for kwargs in HOW if change is REFUSED[0][0] else HOW[-1:]:
        for opened, at in ((DDPMImagePipeline, tmp_path), (DDPMUNet, tmp_path / "unet")):
            with pytest.raises(ValueError, match=message) as caught:
                opened.from_pretrained(at, **kwargs)
            assert "\n" not in str(caught.value) and str(tmp_path / "unet") in str(caught.value)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("shards", [None, "20KB"])
def test_prefixes_of_wrappers_are_taken_off(make_pipeline, tmp_path, prefix, shards):
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path, max_shard_size=shards)
    for file in (tmp_path / "unet").glob("*.safetensors"):
        save_file(renamed(load_file(file), prefix=prefix), file, metadata={"format": "pt"})
    for file in (tmp_path / "unet").glob("*.index.json"):
        index = json.loads(file.read_text())
        file.write_text(json.dumps({**index, "weight_map": renamed(index["weight_map"], prefix=prefix)}))
    opened = DDPMImagePipeline.from_pretrained(tmp_path).unet.state_dict()
    expected = pipeline.unet.state_dict()
    assert opened.keys() == expected.keys() and all(torch.equal(opened[name], expected[name]) for name in expected)


def test_shards_that_lack_a_tensor(make_pipeline, tmp_path):
    """Whatever their index says."""
    make_pipeline().save_pretrained(tmp_path, max_shard_size="20KB")
    file = sorted((tmp_path / "unet").glob("*.safetensors"))[0]
    weights = load_file(file)
    save_file(without(weights, *list(weights)[:1]), file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="unet: its weights .* they lack 1 tensor"):
        DDPMImagePipeline.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises((OSError, ValueError), match=file.name):
        DDPMImagePipeline.from_pretrained(tmp_path)


def test_a_classifiers_weights(tmp_path):
    small_classifier().save_pretrained(tmp_path)
    weights = load_file(tmp_path / FILE)
    save_file(renamed(weights, prefix="module."), tmp_path / FILE)
    assert torch.equal(NoisyClassifier.from_pretrained(tmp_path).conv_in.weight, weights["conv_in.weight"])
    save_file(without(weights, "head.to_out.bias"), tmp_path / FILE)
    with pytest.raises(ValueError, match=r"they lack 1 tensor \(head.to_out.bias\)"):
        NoisyClassifier.from_pretrained(tmp_path)


def test_values_that_are_not_finite_are_warned_of(make_pipeline, tmp_path, caplog):
    pipeline = make_pipeline()
    pipeline.unet.conv_in.bias.data[0] = float("nan")
    pipeline.save_pretrained(tmp_path)
    DDPMImagePipeline.from_pretrained(tmp_path)
    assert re.search(r"NaN or infinite values in 1 tensor \(conv_in.bias\)", caplog.text)


def test_stock_networks_without_weights(make_pipeline, tmp_path):
    """diffusers leaves what a file lacks without values; a pipeline of that network would draw from whatever lies there."""
    make_pipeline().save_pretrained(tmp_path)
    file = tmp_path / "unet" / FILE
    save_file(without(load_file(file), "conv_out.weight"), file, metadata={"format": "pt"})
    stock = DDPMPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the network has no values for 1 of its tensors, conv_out.weight"):
        DDPMImagePipeline(stock.unet, stock.scheduler)
    with pytest.raises(ValueError, match="the network has no values for 1 of its tensors, conv_out.weight"):
        DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline=str(tmp_path), trust_remote_code=True)


class Adapter(torch.nn.Module):
    """As peft puts a LoRA into a network."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer, self.lora_A = layer, torch.nn.Linear(2, 2)


def test_adapters_are_not_saved_inside(make_pipeline, tmp_path):
    pipeline = make_pipeline()
    attention = pipeline.unet.mid_block.attentions[0]
    attention.to_q = Adapter(attention.to_q)
    for save in (pipeline.save_pretrained, pipeline.unet.save_pretrained):
        with pytest.raises(
            ValueError, match=r"differ by 4 tensors \(mid_block.attentions.0.to_q.base_layer.bias, .*merge"
        ):
            save(tmp_path / "adapted")
        assert not list(tmp_path.rglob("*.safetensors"))
    attention.to_q = attention.to_q.base_layer
    pipeline.save_pretrained(tmp_path / "adapted")


def test_a_compiled_network_is_saved_as_itself(make_pipeline, tmp_path):
    pipeline = make_pipeline()
    pipeline.unet = torch.compile(pipeline.unet)
    pipeline.save_pretrained(tmp_path)
    opened = DDPMImagePipeline.from_pretrained(tmp_path).unet
    assert type(opened) is DDPMUNet and torch.equal(opened.conv_in.weight, pipeline.unet.conv_in.weight)


@pytest.mark.parametrize("shards", [None, "20KB"])
def test_variants_are_named(make_pipeline, tmp_path, shards):
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path, variant="fp16", max_shard_size=shards)
    for opened, at in ((DDPMImagePipeline, tmp_path), (DDPMUNet, tmp_path / "unet")):
        with pytest.raises(
            ValueError, match="unet holds weights of the variant 'fp16' only; open it with variant='fp16'"
        ):
            opened.from_pretrained(at)
        with pytest.raises(ValueError, match="unet has no weights of variant='ema'; it holds 'fp16'"):
            opened.from_pretrained(at, variant="ema")
        opened.from_pretrained(at, variant="fp16")
    if shards is None:  # else diffusers removes them
        pipeline.save_pretrained(tmp_path)
        usual = r"it holds the usual weights \(leave variant out\), 'fp16'"
        with pytest.raises(ValueError, match=usual):
            DDPMImagePipeline.from_pretrained(tmp_path, variant="ema")


def images_of(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(2, torch.Generator().manual_seed(0), num_inference_steps=5, output_type="np").images


def test_from_pipe_both_ways(make_pipeline, tmp_path):
    ours = make_pipeline(channels=3)
    ours.save_pretrained(tmp_path)
    stock = DDPMPipeline.from_pretrained(tmp_path)
    assert type(stock.unet) is UNet2DModel
    converted = DDPMImagePipeline.from_pipe(stock)
    assert type(converted.unet) is DDPMUNet and abs(images_of(converted) - images_of(ours)).max() < 1e-5
    assert converted.unet.conv_in.weight.data_ptr() == stock.unet.conv_in.weight.data_ptr()
    theirs = DDPMPipeline.from_pipe(ours)
    assert type(theirs) is DDPMPipeline and theirs.unet is ours.unet
    assert abs(images_of(theirs) - images_of(stock)).max() < 1 / 255
    assert type(DDPMImagePipeline.from_pipe(ours).unet) is DDPMUNet


def test_dtype_device_map_and_own_components(make_pipeline, tmp_path):
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path)
    for kwargs in ({"torch_dtype": torch.float16}, {"dtype": torch.float16}, {"torch_dtype": {"unet": torch.float16}}):
        assert DDPMImagePipeline.from_pretrained(tmp_path, **kwargs).unet.dtype == torch.float16
    assert DDPMImagePipeline.from_pretrained(tmp_path, device_map="cpu", low_cpu_mem_usage=True).device.type == "cpu"
    assert DDPMImagePipeline.from_pretrained(tmp_path, unet=pipeline.unet).unet is pipeline.unet
    assert DDPMImagePipeline.from_pretrained(tmp_path).config._name_or_path == str(tmp_path)


def test_the_oldest_folders_have_all_files_at_the_top(make_pipeline, tmp_path):
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path)
    for part in ("unet", "scheduler"):
        for file in (tmp_path / part).iterdir():
            file.rename(tmp_path / file.name)
        (tmp_path / part).rmdir()
    opened = DDPMImagePipeline.from_pretrained(tmp_path)
    assert torch.equal(opened.unet.conv_in.weight, pipeline.unet.conv_in.weight)
    assert type(opened.scheduler) is type(pipeline.scheduler)
