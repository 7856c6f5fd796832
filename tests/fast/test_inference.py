"""`InferenceUNet` and `pipe.optimize()`: the plain network's outputs, whatever is done to be faster."""

import copy
import gc
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from PIL import Image

from ddpm_hf import DDPMImagePipeline, DDPMUNet, InferenceUNet, VariationalDDPMScheduler, bits_per_dim
from ddpm_hf.fast.inference import FoldedUpsample, FusedAttention
from ddpm_hf.models.blocks import Upsample
from support.scripts import script
from support.unet_configs import ATTENTION, BASE, LEARNED, NCSNPP, PLAIN, levels

CONFIGS = {
    "base": BASE,
    "attention everywhere": BASE | ATTENTION,
    "no attention": BASE | PLAIN | {"add_attention": False},
    "one head": BASE | {"attention_head_dim": None},
    "three levels": BASE | levels((16, 32, 32)),
    "scale_shift": BASE | {"resnet_time_scale_shift": "scale_shift"},
    "resampling blocks": BASE | ATTENTION | {"downsample_type": "resnet", "upsample_type": "resnet"},
    "fourier": BASE | {"time_embedding_type": "fourier"},
    "ncsnpp": NCSNPP,
    "learned": BASE | LEARNED,
    "centered, scaled, no middle": BASE | {"center_input_sample": True, "mid_block_type": None},
    "middle scaled": BASE | {"mid_block_scale_factor": 2**0.5, "act_fn": "gelu", "dropout": 0.3},
    "classes": BASE | {"num_class_embeds": 5},
}


def network(config=BASE, dtype=torch.float32):
    unet = DDPMUNet(**config)
    unet.reset_parameters("torch")  # not the zero function
    return unet.to(dtype)


@pytest.mark.parametrize("timestep", ["one", "each"])
@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_are_the_networks(name, timestep):
    unet = network(CONFIGS[name], torch.float64)
    fast = InferenceUNet(unet, compile=False)
    labels = torch.tensor([0, 4, 2]) if name == "classes" else None
    for height, width in ((8, 8), (16, 8)):
        x = torch.randn(3, 3, height, width, dtype=torch.float64)
        t = torch.tensor(7.0 if name == "fourier" else 7) if timestep == "one" else torch.tensor([1, 30, 7])
        originals = x.clone(), t.clone()
        with torch.no_grad():
            expected = unet.eval()(x, t, labels).sample
        torch.testing.assert_close(fast(x, t, labels).sample, expected, atol=1e-11, rtol=1e-11)
        assert torch.equal(x, originals[0]) and torch.equal(t, originals[1])
    assert fast(x, t, labels, return_dict=False)[0].is_contiguous()


@pytest.mark.parametrize("shape", [(1, 6, 2, 2), (2, 6, 8, 8), (1, 6, 5, 9)])
def test_folded_upsampling(shape):
    upsample, x = Upsample(6).double(), torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(FoldedUpsample(upsample)(x, None), upsample(x, None), atol=1e-13, rtol=1e-13)


def test_nothing_is_left_as_it_was():
    fast = InferenceUNet(network(), compile=False)
    kinds = [type(module) for module in fast.modules()]
    assert kinds.count(FusedAttention) == 4 and kinds.count(FoldedUpsample) == 1
    assert fast.net.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert "8 time projections" in fast.report and "4 attention" in fast.report and "folded into 1" in fast.report


def test_announced_timesteps_and_others():
    unet = network().eval()
    fast, x = InferenceUNet(unet, compile=False), torch.randn(2, 3, 8, 8)
    calls, project = [], fast.project
    fast.project = lambda t, labels: calls.append(len(t)) or project(t, labels)
    call = fast.at_timesteps(torch.arange(999, -1, -1))
    for t in [*range(999, 899, -1), 3, 500]:
        torch.testing.assert_close(call(x, t).sample, unet(x, t).sample.detach(), atol=1e-5, rtol=1e-5)
    assert calls == [64, 64, 4, 64]  # not one by one


def test_the_dtype_of_activations():
    unet, x = network().eval(), torch.randn(4, 3, 16, 16)
    fast = InferenceUNet(unet, dtype=torch.bfloat16, compile=False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        autocast = unet(x, 5).sample.float()
    expected = unet(x, 5).sample.detach()
    output = fast(x, 5).sample
    assert output.dtype == torch.float32 and unet.dtype == torch.float32
    assert 0 < (output - expected).square().mean() < 2 * (autocast - expected).square().mean()


@pytest.mark.slow
def test_compiled_attention():
    unet, x = network(BASE | PLAIN | {"block_out_channels": (16, 16)}).eval(), torch.randn(2, 3, 8, 8)
    fast = InferenceUNet(unet)
    call = fast.at_timesteps([10, 9, 8])
    for t in (10, 9, 8):
        torch.testing.assert_close(call(x, t).sample, unet(x, t).sample.detach(), atol=1e-5, rtol=1e-5)
    assert list(fast.paths.values()) == [fast.compiled] and "compiled" in fast.report


def with_an_adapter(unet):
    unet.conv_in = Adapter(unet.conv_in)
    return unet


class Adapter(torch.nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base


def with_a_hook(unet):
    unet.mid_block.register_forward_hook(lambda *_: None)
    return unet


@pytest.mark.parametrize(
    "make, message",
    [
        (with_an_adapter, "conv_in is a Adapter"),
        (with_a_hook, "mid_block has hooks"),
        (lambda unet: torch.nn.Conv2d(3, 3, 1), "unet is a Conv2d"),
        (lambda unet: UNet2DModel(**BASE), "unet is a UNet2DModel"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        InferenceUNet(make(network()))


def test_it_is_never_in_training_mode():
    fast = InferenceUNet(network(BASE | {"dropout": 0.5}).train(), compile=False).train()
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(fast(x, 5).sample, fast(x, 5).sample) and not any(module.training for module in fast.modules())


def test_the_networks_errors():
    fast = InferenceUNet(network(), compile=False)
    with pytest.raises(ValueError, match="multiples of 2"):
        fast(torch.randn(1, 3, 7, 8), 5)
    with pytest.raises(ValueError, match="class_labels were given"):
        fast(torch.randn(1, 3, 8, 8), 5, torch.tensor([1]))


def images(pipeline, **kwargs):
    return pipeline(2, generator=torch.Generator().manual_seed(0), output_type="latent", **kwargs).images


@pytest.mark.parametrize("scheduler", [VariationalDDPMScheduler, DDIMScheduler])
def test_the_pipelines_images(make_pipeline, scheduler, tmp_path):
    pipeline = make_pipeline(scheduler=scheduler()).to(torch.float64)
    plain = images(pipeline, num_inference_steps=20)
    saved = copy.deepcopy(pipeline.unet.state_dict())
    report = pipeline.optimize(compile=False)
    assert report.startswith("network for inference in float64")
    torch.testing.assert_close(images(pipeline, num_inference_steps=20), plain, atol=1e-9, rtol=1e-9)
    assert type(pipeline.unet) is DDPMUNet
    torch.testing.assert_close(pipeline.unet.state_dict(), saved, atol=0, rtol=0)
    pipeline.save_pretrained(tmp_path)
    reopened = DDPMImagePipeline.from_pretrained(tmp_path)
    reopened.to(torch.float64).scheduler = pipeline.scheduler
    reopened.set_progress_bar_config(disable=True)
    assert torch.equal(images(reopened, num_inference_steps=20), plain)


@torch.no_grad()
def scaled(unet):
    for parameter in unet.parameters():
        parameter.mul_(1.1)
    return unet


def averaged(unet):
    ema = EMAModel([p * 1.1 for p in unet.parameters()])
    ema.copy_to(unet.parameters())


def trained(unet):
    optimizer = torch.optim.AdamW(unet.parameters(), lr=0.02, fused=True)
    for parameter in unet.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def beside_autograd(unet):
    for parameter in unet.parameters():
        parameter.data.neg_()


@pytest.mark.parametrize("change", [scaled, averaged, trained, beside_autograd])
def test_weights_that_change_are_seen(make_pipeline, change):
    pipeline = make_pipeline()
    pipeline.optimize(compile=False)
    first, network = images(pipeline, num_inference_steps=5), pipeline._inference
    assert torch.equal(images(pipeline, num_inference_steps=5), first) and pipeline._inference is network
    with torch.no_grad():
        change(pipeline.unet)
    changed = images(pipeline, num_inference_steps=5)
    assert (changed - first).abs().max() > 1e-2
    pipeline._inference = None
    torch.testing.assert_close(changed, images(pipeline, num_inference_steps=5), atol=1e-4, rtol=1e-4)


def networks():
    gc.collect()
    return [instance for instance in gc.get_objects() if type(instance) is InferenceUNet]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_weights_that_change_often_are_kept_once(dtype):
    """Of every form that weights are kept in: where they are, exactly as a new network has them."""
    unet = network(BASE | levels((16, 256))).eval()
    x, before = torch.randn(2, 3, 8, 8), len(networks())
    fast = InferenceUNet(unet, dtype, compile=False)
    assert dtype or "by Winograd" in fast.report
    places = [weight.data_ptr() for weight in (*fast.parameters(), *fast.buffers())]
    for _ in range(3):
        scaled(unet)
        fast = fast.updated(unet)
        assert torch.equal(fast(x, 5).sample, InferenceUNet(unet, dtype, compile=False)(x, 5).sample)
        assert places == [weight.data_ptr() for weight in (*fast.parameters(), *fast.buffers())]
    assert len(networks()) == before + 1
    other = scaled(copy.deepcopy(unet))
    assert fast.updated(other) is fast and fast.updated(other) is fast  # of the same config: its weights are taken
    assert torch.equal(fast(x, 5).sample, InferenceUNet(other, dtype, compile=False)(x, 5).sample)
    assert fast.updated(network(BASE | {"norm_eps": 1e-3})) is not fast and fast.updated(other.double()) is not fast


def test_packed_weights_are_let_go():
    """The compiler keeps what it has packed: once weights change they are copied, and no graph is left behind each time."""
    unet = network().eval()
    packed = InferenceUNet(unet, torch.bfloat16)
    fast = packed.updated(scaled(unet))
    assert packed.packs and fast is not packed and not fast.packs and "packed" not in fast.report
    assert fast.compiled is not None and fast.updated(scaled(unet)) is fast


def test_a_compiled_network_takes_new_weights():
    unet, x = network(BASE | PLAIN | {"block_out_channels": (16, 16)}).eval(), torch.randn(2, 3, 8, 8)
    fast = InferenceUNet(unet)
    for _ in range(2):
        scaled(unet)
        updated = fast.updated(unet)
        torch.testing.assert_close(updated(x, 5).sample, unet(x, 5).sample.detach(), atol=1e-5, rtol=1e-5)
        assert updated is fast and list(fast.paths.values()) == [fast.compiled]


def test_threads_share_an_optimized_pipeline(make_pipeline):
    """Of chains of other timesteps, whose projections are computed for one caller each."""
    pipeline = make_pipeline()
    pipeline.optimize(compile=False)
    steps = [3, 7, 130, 200]
    expected = {n: images(pipeline, num_inference_steps=n) for n in steps}
    with ThreadPoolExecutor(4) as pool:
        for n, actual in zip(steps * 4, pool.map(lambda n: images(pipeline, num_inference_steps=n), steps * 4)):
            assert torch.equal(actual, expected[n])


def test_another_dtype_is_seen(make_pipeline):
    pipeline = make_pipeline()
    pipeline.optimize(compile=False)
    pipeline.to(torch.float64)
    assert images(pipeline, num_inference_steps=5).dtype == torch.float64


def test_hooks_that_come_later(make_pipeline):
    pipeline = make_pipeline()
    pipeline.optimize(compile=False)
    pipeline.unet.conv_in.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="conv_in has hooks"):
        images(pipeline, num_inference_steps=5)


def test_autocast_is_passed_over():
    unet, x = network().eval(), torch.randn(2, 3, 8, 8)
    fast = InferenceUNet(unet, compile=False)
    with torch.autocast("cpu", torch.bfloat16):
        within = fast(x, 5).sample
    assert torch.equal(within, fast(x, 5).sample)


def test_two_compiled_networks():
    """Each has its graph, also where their shapes are the same."""
    x, config = torch.randn(2, 3, 8, 8), BASE | PLAIN | {"block_out_channels": (16,), "add_attention": False}
    config |= {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    for act_fn in ("silu", "relu"):
        unet = network(config | {"act_fn": act_fn}).eval()
        fast = InferenceUNet(unet)
        call = fast.at_timesteps([10, 9, 8])
        for t in (10, 9, 8):
            torch.testing.assert_close(call(x, t).sample, unet(x, t).sample.detach(), atol=1e-5, rtol=1e-5)
        assert list(fast.paths.values()) == [fast.compiled] and "compiled" in fast.report


@pytest.mark.slow
def test_two_compiled_networks_with_packed_weights():
    x, outputs = torch.randn(2, 3, 8, 8), []
    for _ in range(2):
        unet = network(BASE | PLAIN | {"block_out_channels": (16, 16)}).eval()
        outputs.append(InferenceUNet(unet, torch.bfloat16)(x, 5).sample - unet(x, 5).sample.detach())
    assert max(error.abs().max() for error in outputs) < 0.1


def test_bits_per_dim(make_pipeline):
    pipeline = make_pipeline(channels=3)
    scheduler, unet = pipeline.scheduler, pipeline.unet
    scheduler.set_timesteps(10)
    x = torch.randint(0, 256, (3, 3, 8, 8)) / 127.5 - 1
    results = [
        bits_per_dim(net, scheduler, x, generator=torch.Generator().manual_seed(0), batch_size=7)
        for net in (unet, InferenceUNet(unet, compile=False))
    ]
    torch.testing.assert_close(results[0].terms, results[1].terms, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_the_scripts_switch(make_pipeline, tmp_path):
    pipeline = make_pipeline(scheduler=VariationalDDPMScheduler(levels=17))
    pipeline.save_pretrained(tmp_path)
    sheets = []
    for extra in ([], ["--optimize"]):
        script("sample.py", tmp_path, "--count", 4, "--steps", 5, "--out", tmp_path / "sheet.png", *extra)
        sheets.append(np.asarray(Image.open(tmp_path / "sheet.png"), dtype=int))
        script("evaluate.py", tmp_path, "--images", 4, "--steps", 5, "--out", tmp_path, *extra)
        sheets.append(json.loads((tmp_path / "evaluation.json").read_text())["total"])
    assert abs(sheets[0] - sheets[2]).max() <= 1
    assert sheets[1] == pytest.approx(sheets[3], rel=1e-5)


def test_no_compiler():
    unet, x = network(BASE | PLAIN).eval(), torch.randn(1, 3, 8, 8)
    fast = InferenceUNet(unet)
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        for _ in range(2):
            torch.testing.assert_close(fast(x, 3).sample, unet(x, 3).sample.detach(), atol=1e-5, rtol=1e-5)
    assert list(fast.paths.values()) == [fast._denoise]
