import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline

from ddpm_hf import (
    CascadePipeline,
    DDPMImagePipeline,
    DDPMSuperResolutionPipeline,
    VariationalDDPMScheduler,
)
from ddpm_hf.models.conditioning import Conditioned, condition_planes, downsample


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def run(pipeline, images, **kwargs):
    kwargs = {"num_inference_steps": 5, "output_type": "latent", "generator": seeded(), **kwargs}
    return pipeline(images, **kwargs).images


def test_shrunk_and_scaled_up():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert downsample(x, (2, 2)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    planes = condition_planes(torch.tensor([0.0, 1.0]).view(1, 1, 1, 2), (1, 4))
    assert planes.flatten().tolist() == [0.0, 0.25, 0.75, 1.0]


def test_conditioning_noise_keeps_the_variance_and_tells_its_level():
    images, level = torch.randn(4000, 1, 2, 2), torch.tensor([0.0, 0.6]).repeat(2000)
    planes = condition_planes(images, (2, 2), level, seeded(7))
    assert planes.shape == (4000, 2, 2, 2)
    assert torch.equal(planes[:, 1], level.view(-1, 1, 1).expand(-1, 2, 2))
    torch.testing.assert_close(planes[::2, :1], images[::2])
    assert planes[1::2, 0].var().item() == pytest.approx(1, abs=0.05)
    assert torch.corrcoef(torch.stack((planes[1::2, 0].flatten(), images[1::2].flatten())))[0, 1] == pytest.approx(
        0.8, abs=0.02
    )


def test_the_network_sees_the_planes_of_each_image():
    recorded, planes = [], torch.randn(2, 3, 4, 4)
    network = Conditioned(lambda x, t, **kwargs: recorded.append((x, t, kwargs)), planes)
    x = torch.randn(4, 1, 4, 4)  # guided: both images twice
    network(x, 5, class_labels=None)
    sample, t, kwargs = recorded[0]
    assert t == 5 and kwargs == {"class_labels": None}
    assert torch.equal(sample, torch.cat((x, torch.cat((planes, planes))), dim=1))


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("channels", [1, 3])
def test_steps_are_the_schedulers(make_upsampler, channels, noise, learned):
    pipeline, images = make_upsampler(channels, noise, learned), torch.rand(2, channels, 8, 8) * 2 - 1
    actual = run(pipeline, images)
    x = torch.randn(2, channels, 16, 16, generator=(generator := seeded()))
    planes = F.interpolate(images, (16, 16), mode="bilinear")
    planes = torch.cat((planes, torch.zeros(2, 1, 16, 16)), 1) if noise else planes
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(5)
    for t in scheduler.timesteps.tolist():
        output = pipeline.unet(torch.cat((x, planes), 1), t).sample
        x = scheduler.step(output, t, x, generator=generator).prev_sample
    torch.testing.assert_close(actual, x)
    *_, (_, _, x_start) = pipeline.progressive(images, seeded(), 5)
    torch.testing.assert_close(x_start, actual)


def test_kinds_of_images(make_upsampler):
    for channels in 1, 3:
        pipeline = make_upsampler(channels)
        array = np.random.default_rng(0).integers(0, 256, (2, 8, 8, channels)).astype(np.float32) / 255
        tensor = torch.from_numpy(array).permute(0, 3, 1, 2) * 2 - 1
        pictures = DDPMImagePipeline.numpy_to_pil(array)
        expected = run(pipeline, tensor)
        torch.testing.assert_close(run(pipeline, array), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(run(pipeline, pictures), expected, rtol=1e-3, atol=1e-3)
        assert run(pipeline, pictures[0]).shape == (1, channels, 16, 16)
        assert run(pipeline, tensor, output_type="pil")[0].size == (16, 16)


def test_the_image_matters_and_so_does_its_noise(make_upsampler):
    pipeline, images = make_upsampler(noise=0.5), torch.rand(2, 1, 8, 8) * 2 - 1
    plain = run(pipeline, images)
    assert (run(pipeline, -images) - plain).abs().max() > 1e-3
    assert (run(pipeline, images, noise_level=0.5) - plain).abs().max() > 1e-3
    separate = [run(pipeline, images[i : i + 1], generator=[seeded(i)], noise_level=0.3) for i in range(2)]
    both = run(pipeline, images, generator=[seeded(i) for i in range(2)], noise_level=0.3)
    torch.testing.assert_close(torch.cat(separate), both, rtol=0, atol=1e-4)


def test_optimized_and_guided(make_upsampler):
    pipeline = make_upsampler(num_class_embeds=4, _ddpm_hf={"null_class": 3})
    images, kwargs = torch.rand(2, 1, 8, 8) * 2 - 1, dict(class_labels=[0, 2], guidance_scale=3.0)
    expected = run(pipeline, images, **kwargs)
    assert (expected - run(pipeline, images, class_labels=[0, 2])).abs().max() > 1e-3
    pipeline.optimize(compile=False)
    torch.testing.assert_close(run(pipeline, images, **kwargs), expected, rtol=1e-4, atol=1e-4)


def test_saved_and_opened(make_upsampler, tmp_path):
    pipeline, images = make_upsampler(noise=0.5, low=(8, 4), size=(16, 8)), torch.rand(2, 1, 8, 4) * 2 - 1
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "DDPMSuperResolutionPipeline"] and index["unet"][1] == "UNet2DModel"
    reopened = DDPMSuperResolutionPipeline.from_pretrained(tmp_path)
    assert list(reopened.config.low_resolution) == [8, 4] and reopened.config.conditioning_noise == 0.5
    torch.testing.assert_close(run(reopened, images, noise_level=0.2), run(pipeline, images, noise_level=0.2))
    with pytest.raises(ValueError, match="holds a DDPMSuperResolutionPipeline; open it with that class"):
        DDPMImagePipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trust_remote_code"):  # no stock class would sample it
        DiffusionPipeline.from_pretrained(tmp_path)


def test_another_pipeline_is_none(make_pipeline, tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a DDPMPipeline; open it with that class"):
        DDPMSuperResolutionPipeline.from_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="holds a DDPMPipeline of scheduler, unet; this class opens pipelines of base, upsampler only"
    ):
        CascadePipeline.from_pretrained(tmp_path)


def test_mistakes(make_upsampler, make_pipeline):
    pipeline, images = make_upsampler(noise=0.5), torch.zeros(2, 1, 8, 8)
    for wrong, message in (
        (torch.zeros(2, 1, 4, 4), r"images have the shape \(2, 1, 4, 4\); this pipeline takes \(B, 1, 8, 8\)"),
        (torch.zeros(2, 3, 8, 8), "this pipeline takes"),
        (torch.zeros(1, 8, 8), "this pipeline takes"),
    ):
        with pytest.raises(ValueError, match=message):
            run(pipeline, wrong)
    for level in -0.1, 0.6, float("nan"):
        with pytest.raises(ValueError, match="noise_level=.* must be 0 to 0.5, what the network was trained with"):
            run(pipeline, images, noise_level=level)
    with pytest.raises(ValueError, match="list of 1 for batch_size=2"):
        run(pipeline, images, generator=[seeded()])
    with pytest.raises(ValueError, match="does not interpolate"):
        pipeline.interpolate(images, images, [0.5], 100)
    with pytest.raises(ValueError, match="the network takes 3 channels and gives 1; with .*=0.0 it must take"):
        DDPMSuperResolutionPipeline(pipeline.unet, pipeline.scheduler, low_resolution=8)
    for noise in -0.1, 1.0, "a":
        with pytest.raises(ValueError, match=r"conditioning_noise=.* must be a number in \[0, 1\)"):
            DDPMSuperResolutionPipeline(pipeline.unet, pipeline.scheduler, None, 8, noise)
    for low in [8], "8", None, 8.5, -3, [8, 0], [8, 8, 8]:
        with pytest.raises(ValueError, match="low_resolution"):
            DDPMSuperResolutionPipeline(pipeline.unet, pipeline.scheduler, None, low, 0.5)
    for wrong in np.zeros((2, 8, 8, 1), np.uint8), torch.zeros(2, 1, 8, 8, dtype=torch.uint8), [], "a", None:
        with pytest.raises(ValueError, match="images"):
            run(pipeline, wrong)
    with pytest.raises(ValueError, match="this network makes 16x16 images"):
        run(pipeline, images, latents=torch.randn(2, 1, 8, 8))
    with pytest.raises(ValueError, match="noise_level='a' must be"):
        run(pipeline, images, noise_level="a")
    with pytest.raises(ValueError, match="base draws images of 16x16, upsampler takes 8x8"):
        CascadePipeline(make_pipeline(sample_size=16), pipeline)
    with pytest.raises(ValueError, match="base draws images of 3 channels, upsampler takes 1"):
        CascadePipeline(make_pipeline(channels=3), pipeline)


def test_cascade(make_upsampler, make_pipeline, tmp_path):
    base, upsampler = make_pipeline(num_class_embeds=3), make_upsampler(noise=0.5)
    cascade = CascadePipeline(base, upsampler)
    kwargs = dict(num_inference_steps=4, class_labels=[0, 2], upsampler_steps=5, noise_level=0.3, output_type="latent")
    actual = cascade(2, seeded(), **kwargs).images
    generator = seeded()
    small = base(2, generator, 4, "latent", class_labels=[0, 2]).images.clamp(-1, 1)
    torch.testing.assert_close(actual, run(upsampler, small, generator=generator, noise_level=0.3))
    assert cascade(1, class_labels=1, num_inference_steps=2, upsampler_steps=2).images[0].size == (16, 16)
    cascade.save_pretrained(tmp_path)
    reopened = CascadePipeline.from_pretrained(tmp_path)
    for stage in reopened.base, reopened.upsampler:
        stage.set_progress_bar_config(disable=True)
    torch.testing.assert_close(reopened(2, seeded(), **kwargs).images, actual, rtol=0, atol=1e-4)
    assert reopened.folder == tmp_path and cascade.folder is None
    with_base = CascadePipeline.from_pretrained(tmp_path, base=base)
    assert with_base.base is base and with_base.upsampler is not upsampler and with_base.folder is None


def test_cascade_of_two_class_conditional_stages(make_upsampler, make_pipeline):
    base, upsampler = make_pipeline(num_class_embeds=3), make_upsampler(num_class_embeds=3)
    kwargs = dict(num_inference_steps=3, upsampler_steps=3, output_type="latent")
    a, b = (CascadePipeline(base, upsampler)(1, seeded(), class_labels=label, **kwargs).images for label in (0, 1))
    assert (a - b).abs().max() > 1e-3


def test_what_the_second_stage_cannot_use_is_reported_before_the_first(make_upsampler, make_pipeline):
    base, upsampler = make_pipeline(num_class_embeds=3), make_upsampler(noise=0.5)
    cascade, calls = CascadePipeline(base, upsampler), []
    base.unet.register_forward_hook(lambda *args: calls.append(1))
    for wrong, message in (
        (dict(output_type="foo"), "output_type='foo'"),
        (dict(noise_level=0.9), "noise_level=0.9"),
        (dict(upsampler_steps=2000), "2000"),
        (dict(upsampler_kwargs={"foo": 1}), "upsampler: .*'foo'"),
        (
            dict(upsampler_kwargs={"guidance_scale": 2.0}),
            "guidance_scale=2.0 needs a network trained with label dropout",
        ),
        (dict(upsampler_kwargs={"class_labels": 1}), "this network has no classes"),
    ):
        with pytest.raises(ValueError, match=message):
            cascade(2, seeded(), 3, **{"class_labels": 1, "upsampler_steps": 2} | wrong)
    assert not calls
    before = (generator := seeded()).get_state()
    upsampler.check(2, generator, 3)
    assert torch.equal(generator.get_state(), before)  # nothing is drawn


def test_labels_go_to_the_stages_that_know_classes(make_upsampler, make_pipeline):
    kwargs = dict(num_inference_steps=2, upsampler_steps=2, output_type="latent")
    cascade = CascadePipeline(make_pipeline(), make_upsampler(num_class_embeds=3))
    a, b = (cascade(1, seeded(), class_labels=label, **kwargs).images for label in (0, 1))
    assert (a - b).abs().max() > 1e-3
    with pytest.raises(ValueError, match="class_labels were given, but neither stage has classes"):
        CascadePipeline(make_pipeline(), make_upsampler())(1, class_labels=1, **kwargs)


def test_a_cascade_moves_with_both_stages(make_upsampler, make_pipeline):
    cascade = CascadePipeline(make_pipeline(), make_upsampler()).to(torch.float64)
    assert cascade.base.unet.dtype == cascade.upsampler.unet.dtype == cascade.dtype == torch.float64
    assert cascade(1, num_inference_steps=1, upsampler_steps=1, output_type="latent").images.dtype == torch.float64


def test_learned_variances(make_upsampler):
    unet = make_upsampler(learned=True).unet
    pipeline = DDPMSuperResolutionPipeline(unet, VariationalDDPMScheduler(variance_type="learned"), low_resolution=8)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.channels == 1 and run(pipeline, torch.zeros(1, 1, 8, 8)).isfinite().all()


def test_progressive_refuses_at_once(make_upsampler):
    with pytest.raises(ValueError, match="every=0"):
        make_upsampler().progressive(torch.zeros(1, 1, 8, 8), every=0)
