import importlib
import inspect
import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from diffusers.utils.torch_utils import randn_tensor

import ddpm_hf
from ddpm_hf import DDPMImagePipeline, DDPMUNet, VariationalDDPMScheduler
from ddpm_hf.hub.card import has_our_card, write_model_card
from support.elsewhere import ROUNDING, open_elsewhere


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def run(pipeline, batch_size=2, **kwargs):
    kwargs = {"num_inference_steps": 5, "output_type": "np", "generator": seeded(), **kwargs}
    return pipeline(batch_size, **kwargs).images


def test_same_images_as_the_stock_pipeline(make_pipeline):
    ours = make_pipeline(channels=3, scheduler=VariationalDDPMScheduler(variance_type="fixed_large"))
    theirs = DDPMPipeline(UNet2DModel(**stock_config(ours.unet)), DDPMScheduler(variance_type="fixed_large"))
    theirs.unet.load_state_dict(ours.unet.state_dict())
    theirs.set_progress_bar_config(disable=True)
    # "leading" ends at t = 0, where diffusers is right: everything but its float32 tables is the same
    np.testing.assert_allclose(run(ours, num_inference_steps=10), run(theirs, num_inference_steps=10), atol=1 / 255)


def stock_config(unet):
    return {key: value for key, value in unet.config.items() if key in inspect.signature(UNet2DModel).parameters}


@torch.no_grad()
def stock_images(unet, scheduler, class_labels=None, steps=5):
    """The images of `run`, drawn by diffusers' network and scheduler in the loop of its documentation."""
    network = UNet2DModel(**stock_config(unet)).eval()
    network.load_state_dict(unet.state_dict())
    generator = seeded()
    scheduler.set_timesteps(steps)
    x = randn_tensor((2, 1, 8, 8), generator=generator) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, t), t, class_labels).sample
        kwargs = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        x = scheduler.step(output, t, x, **kwargs).prev_sample
    return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("eta", [None, 0.0, 1.0])
def test_image_i_is_the_same_alone_or_in_a_batch(make_pipeline, eta):
    pipeline = make_pipeline()
    batch = run(pipeline, 3, generator=[seeded(i) for i in range(3)], eta=eta)
    for i in range(3):
        np.testing.assert_allclose(run(pipeline, 1, generator=[seeded(i)], eta=eta)[0], batch[i], atol=1e-4)
    assert np.abs(batch[0] - batch[1]).max() > 0.1
    np.testing.assert_array_equal(run(pipeline, 3, generator=tuple(seeded(i) for i in range(3)), eta=eta), batch)


def test_one_seed_one_result(make_pipeline):
    pipeline = make_pipeline()
    np.testing.assert_array_equal(run(pipeline), run(pipeline))
    assert np.abs(run(pipeline) - run(pipeline, generator=seeded(1))).max() > 0.1


def test_output_types(make_pipeline):
    grey, colour = make_pipeline(sample_size=(8, 12)), make_pipeline(channels=3)
    image = run(grey, output_type="pil")[0]
    assert image.mode == "L" and image.size == (12, 8)
    assert run(colour, output_type="pil")[0].mode == "RGB"
    array = run(grey)
    assert array.shape == (2, 8, 12, 1) and array.min() >= 0 and array.max() <= 1
    np.testing.assert_array_equal(np.asarray(image), (array[0, ..., 0] * 255).round().astype(np.uint8))
    tensor, latent = run(grey, output_type="pt"), run(grey, output_type="latent")
    assert tensor.shape == latent.shape == (2, 1, 8, 12)
    torch.testing.assert_close((latent / 2 + 0.5).clamp(0, 1), tensor)
    assert isinstance(grey(1, num_inference_steps=1, return_dict=False), tuple)


def test_all_steps_by_default(make_pipeline):
    recorded = []
    pipeline = make_pipeline(scheduler=VariationalDDPMScheduler(num_train_timesteps=7))
    pipeline(callback_on_step_end=lambda pipe, i, t, tensors: recorded.append((i, int(t))) or {})
    assert recorded == list(zip(range(7), range(6, -1, -1)))


def test_latents_are_used_and_set_the_size(make_pipeline):
    pipeline = make_pipeline()
    latents = torch.randn(3, 1, 16, 8)
    a = run(pipeline, 3, latents=latents, eta=0.0, generator=None)
    np.testing.assert_array_equal(a, run(pipeline, 3, latents=latents, eta=0.0, generator=seeded(5)))
    assert a.shape == (3, 16, 8, 1)
    assert run(pipeline, 1, latents=latents).shape[0] == 3


def test_callback_sees_changes_and_interrupts(make_pipeline):
    pipeline, recorded = make_pipeline(), []

    def callback(pipe, i, t, tensors):
        assert set(tensors) == {"sample", "model_output"}
        recorded.append(i)
        pipe._interrupt = i == 2
        return {"sample": torch.zeros_like(tensors["sample"])}

    names = ("sample", "model_output")
    images = run(
        pipeline,
        output_type="latent",
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=names,
    )
    assert recorded == [0, 1, 2] and not images.any()
    assert run(pipeline, output_type="latent").any()  # the next call starts afresh


@pytest.mark.parametrize(
    ("labels", "per_image"),
    [(3, [3, 3]), ([3, 1], [3, 1]), (torch.tensor([3, 1]), [3, 1])],
    ids=["int", "list", "tensor"],
)
def test_class_labels(make_pipeline, labels, per_image):
    """Image i is of label i: the images of the stock network that is called with these labels."""
    pipeline = make_pipeline(num_class_embeds=4, scheduler=VariationalDDPMScheduler(variance_type="fixed_large"))
    images = run(pipeline, class_labels=labels)
    stock = DDPMScheduler(variance_type="fixed_large")
    expected = stock_images(pipeline.unet, stock, torch.tensor(per_image))
    np.testing.assert_allclose(images, expected, atol=1 / 255)
    others = stock_images(pipeline.unet, stock, torch.tensor([0, 2]))
    np.testing.assert_allclose(run(pipeline, class_labels=[0, 2]), others, atol=1 / 255)
    assert np.abs(expected - others).max() > 3 / 255


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        UniPCMultistepScheduler,
        EulerDiscreteScheduler,
        HeunDiscreteScheduler,
    ],
)
@pytest.mark.parametrize("schedule", ["linear", "cosine", "quad"])
def test_other_schedulers_swap_in(make_pipeline, scheduler, schedule):
    pipeline = make_pipeline(scheduler=VariationalDDPMScheduler(beta_schedule=schedule, timestep_spacing="iddpm"))
    config = pipeline.scheduler.config
    pipeline.scheduler = scheduler.from_config(config)
    images = run(pipeline)
    np.testing.assert_allclose(images, stock_images(pipeline.unet, scheduler.from_config(config)), atol=1e-5)
    betas, schedule = pipeline.scheduler.betas.double(), VariationalDDPMScheduler.from_config(config).betas.double()
    torch.testing.assert_close(betas, schedule, rtol=1e-6, atol=1e-9)  # the chain that was trained


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_learned_variance_with_a_scheduler_that_has_no_use_for_it(make_pipeline, variance_type):
    pipeline = make_pipeline(out_channels=2, scheduler=VariationalDDPMScheduler(variance_type=variance_type))
    assert run(pipeline).shape == (2, 8, 8, 1)
    for scheduler in DDIMScheduler, DDPMScheduler:
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
        assert run(pipeline).shape == (2, 8, 8, 1)


def test_ddim_equals_diffusers_ddim_without_clipping(make_pipeline):
    pipeline = make_pipeline(scheduler=VariationalDDPMScheduler(clip_sample=False))
    ours = run(pipeline, eta=0.0, output_type="latent")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, set_alpha_to_one=True)
    torch.testing.assert_close(run(pipeline, output_type="latent"), ours, rtol=1e-3, atol=2e-3)


def test_half_precision(make_pipeline):
    pipeline = make_pipeline().to(torch.bfloat16)
    assert run(pipeline, output_type="latent").dtype == torch.bfloat16
    assert run(pipeline).dtype == np.float32


def test_stock_parts_become_ours_and_share_their_weights(make_pipeline):
    unet = UNet2DModel(**stock_config(make_pipeline().unet))
    unet.conv_in.weight.requires_grad_(False)
    pipeline = DDPMImagePipeline(unet, DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="fixed_large"))
    assert type(pipeline.unet) is DDPMUNet and type(pipeline.scheduler) is VariationalDDPMScheduler
    assert pipeline.scheduler.config.beta_schedule == "squaredcos_cap_v2"
    theirs = dict(unet.named_parameters())
    for name, parameter in pipeline.unet.named_parameters():
        assert parameter.data_ptr() == theirs[name].data_ptr(), name
    other = DDIMScheduler()
    assert DDPMImagePipeline(unet, other).scheduler is other


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"output_type": "jpg"}, "output_type='jpg'"),
        ({"batch_size": 2, "generator": [torch.Generator()]}, "list of 1 for batch_size=2"),
        ({"latents": torch.zeros(1, 3, 8, 8)}, r"latents has shape \(1, 3, 8, 8\)"),
        ({"latents": torch.zeros(1, 1, 7, 8)}, "multiples of 2"),
        ({"num_inference_steps": 1001}, "1001"),
        ({"eta": 2.0}, "eta=2.0"),
        ({"class_labels": 1}, "this network has no classes"),
        ({"callback_on_step_end_tensor_inputs": ("x",)}, "'x'"),
        (
            {"callback_on_step_end_tensor_inputs": None},
            "^callback_on_step_end_tensor_inputs=None must be a list of names",
        ),
        ({"latents": [1]}, r"^latents=\[1\] must be a tensor \(B, 1, H, W\)"),
        ({"latents": torch.tensor(1.0)}, r"latents has shape \(\)"),
        (
            {"callback_on_step_end": lambda *args: {"latents": None}},
            "^callback_on_step_end returned {'latents': None}; return",
        ),
        ({"callback_on_step_end": lambda *args: [1]}, r"^callback_on_step_end returned \[1\]; return a dict"),
    ],
)
def test_wrong_arguments(make_pipeline, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline()(**{"num_inference_steps": 2, **kwargs})


@pytest.mark.parametrize("answer", [None, False, 0, [], {}])
def test_callbacks_that_return_nothing(make_pipeline, answer):
    pipeline = make_pipeline()
    images = [run(pipeline, callback_on_step_end=callback) for callback in (None, lambda *args: answer)]
    np.testing.assert_array_equal(*images)


def test_wrong_arguments_of_interpolation(make_pipeline):
    pipeline, image = make_pipeline(), torch.zeros(1, 1, 8, 8)
    for a, b, weights, message in (
        (image, image.numpy(), [0.5], "^images_a and images_b must be tensors"),
        (image, image, 0.5, "^weights=0.5 must be numbers in"),
        (image, image, ["a"], r"^weights=\['a'\] must be numbers in"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline.interpolate(a, b, weights, 500)


def test_wrong_labels_and_channels(make_pipeline):
    pipeline = make_pipeline(num_class_embeds=4)
    for labels, message in ((None, "missing"), (4, "0 to 3"), ([1, 2, 3], "3 entries"), ([0.5, 1.0], "integers")):
        with pytest.raises(ValueError, match=message):
            run(pipeline, class_labels=labels)
    with pytest.raises(ValueError, match="this network has 2"):
        make_pipeline(channels=2)()
    assert run(make_pipeline(channels=2)).shape == (2, 8, 8, 2)
    pipeline = make_pipeline()
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    with pytest.raises(ValueError, match="DPMSolverMultistepScheduler"):
        run(pipeline, eta=0.0)


# the saved folder


@pytest.mark.slow
def test_a_saved_folder_opens_three_ways_in_a_new_process(make_pipeline, tmp_path):
    scheduler = VariationalDDPMScheduler(
        beta_schedule="cosine", variance_type="fixed_large_log", timestep_spacing="iddpm", levels=17
    )
    folder = tmp_path / "saved"
    pipeline = make_pipeline(scheduler=scheduler)
    pipeline.save_pretrained(folder)
    here = run(pipeline, num_inference_steps=10)

    output = open_elsewhere("package", folder, tmp_path / "package", tmp_path / "cache", steps=10)
    assert "DDPMImagePipeline DDPMUNet VariationalDDPMScheduler 17" in output
    np.testing.assert_allclose(np.load(tmp_path / "package.npy"), here, atol=ROUNDING)

    output = open_elsewhere("remote", folder, tmp_path / "remote", tmp_path / "cache", steps=10)
    assert "DDPMImagePipeline DDPMUNet VariationalDDPMScheduler 17" in output
    np.testing.assert_allclose(np.load(tmp_path / "remote.npy"), here, atol=ROUNDING)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    resaved = Path(f"{tmp_path / 'remote'}_again")
    assert files == sorted(path.relative_to(resaved) for path in resaved.rglob("*") if path.is_file())
    for name in files:
        assert (folder / name).read_bytes() == (resaved / name).read_bytes(), name

    output = open_elsewhere("stock", folder, tmp_path / "stock", tmp_path / "cache", steps=10)
    assert "DDPMPipeline UNet2DModel DDPMScheduler None" in output and "messages: []" in output
    leading = run(pipeline, num_inference_steps=None, timesteps=range(900, -1, -100))  # as stock classes read "iddpm"
    np.testing.assert_allclose(np.load(tmp_path / "stock.npy"), leading, atol=1 / 255)


def test_the_saved_folder_is_in_stock_terms(make_pipeline, tmp_path):
    scheduler = VariationalDDPMScheduler(prediction_type="previous", timestep_spacing="iddpm", levels=2)
    make_pipeline(scheduler=scheduler).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "DDPMPipeline"
    assert index["unet"] == ["diffusers", "UNet2DModel"] and index["scheduler"] == ["diffusers", "DDPMScheduler"]
    config = json.loads((tmp_path / "scheduler/scheduler_config.json").read_text())
    assert config["_ddpm_hf"] == {"levels": 2, "timestep_spacing": "iddpm"} and "levels" not in config
    reloaded = DDPMImagePipeline.from_pretrained(tmp_path).scheduler
    assert (reloaded.levels, reloaded.timestep_spacing, reloaded.prediction_type) == (2, "iddpm", "previous")
    with pytest.raises(ValueError, match="previous"):  # stock classes refuse what they would sample wrongly
        diffusers.DiffusionPipeline.from_pretrained(tmp_path)(num_inference_steps=2)


def test_learned_variance_fails_loudly_in_stock_classes(make_pipeline, tmp_path):
    make_pipeline(
        channels=3, out_channels=6, scheduler=VariationalDDPMScheduler(variance_type="learned")
    ).save_pretrained(tmp_path)
    assert DDPMImagePipeline.from_pretrained(tmp_path).scheduler.variance_type == "learned"
    with pytest.raises(RuntimeError):
        diffusers.DiffusionPipeline.from_pretrained(tmp_path)(num_inference_steps=2)


def test_stock_classes_sample_with_the_variance_of_iddpm(make_pipeline, tmp_path):
    pipe = make_pipeline(
        channels=3,
        out_channels=6,
        scheduler=VariationalDDPMScheduler(num_train_timesteps=20, variance_type="learned_range"),
    )
    pipe.save_pretrained(tmp_path)
    stock = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(stock) is diffusers.DDPMPipeline
    draw = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 20, "output_type": "np"}
    theirs = stock(2, **draw).images
    draw["generator"].manual_seed(0)
    np.testing.assert_allclose(theirs, pipe(2, **draw).images, atol=1e-4)


def test_modules_are_attributes_of_the_package():
    """Also before they are imported, when the package is asked for them."""
    for name in ddpm_hf.PACKAGES:
        assert ddpm_hf.__getattr__(name) is importlib.import_module(f"ddpm_hf.{name}")


def test_a_pipeline_knows_the_folder_that_it_was_opened_from(make_pipeline, tmp_path, monkeypatch):
    assert make_pipeline().folder is None
    make_pipeline().save_pretrained(tmp_path / "a")
    pipeline = DDPMImagePipeline.from_pretrained(tmp_path / "a")
    assert pipeline.folder == tmp_path / "a"
    monkeypatch.chdir(tmp_path)
    relative = DDPMImagePipeline.from_pretrained("a")
    monkeypatch.chdir("/")
    assert relative.folder == tmp_path / "a"
    pipeline.save_pretrained(tmp_path / "b")
    assert not any(str(tmp_path) in path.read_text() for path in (tmp_path / "b").rglob("*.json"))


def test_a_swapped_scheduler_is_saved_as_it_is(make_pipeline, tmp_path):
    pipeline = make_pipeline()
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path)
    assert type(DDPMImagePipeline.from_pretrained(tmp_path).scheduler) is DDIMScheduler


@pytest.mark.parametrize(("size", "shown"), [(8, "8x8 images"), ((8, 12), "8x12 images"), (None, "images of any size")])
def test_the_card_counts_the_network_however_it_is_stored(make_pipeline, tmp_path, size, shown):
    pipeline = make_pipeline(sample_size=size)
    pipeline.save_pretrained(tmp_path, safe_serialization=False)
    card = write_model_card(tmp_path).read_text()
    assert shown in card and f"{pipeline.unet.num_parameters():,} parameters" in card


@pytest.mark.parametrize("eta", [None, 0.0])
def test_progressive_is_the_same_sampling_seen_on_the_way(make_pipeline, eta):
    pipeline = make_pipeline()
    final = run(pipeline, 2, generator=seeded(), eta=eta, output_type="latent", num_inference_steps=7)
    recorded = list(pipeline.progressive(2, seeded(), 7, every=3, eta=eta))
    pipeline.scheduler.set_timesteps(7)
    steps = pipeline.scheduler.timesteps.tolist()
    assert [t for t, *_ in recorded] == [steps[0], steps[3], steps[6]]
    assert torch.equal(recorded[-1][2], final)
    start = torch.randn(2, *final.shape[1:], generator=seeded())
    assert torch.equal(recorded[0][1], start) and not any(
        tensor.requires_grad for _, *two in recorded for tensor in two
    )
    for t, x_t, x_start in recorded:
        output = pipeline.unet(x_t, t).sample
        torch.testing.assert_close(pipeline.scheduler.p_mean_variance(output, x_t, t).pred_original_sample, x_start)


def test_progressive_refuses_at_once(make_pipeline):
    with pytest.raises(ValueError, match="every=0"):
        make_pipeline().progressive(every=0)
    with pytest.raises(ValueError, match="batch_size=0"):
        make_pipeline().progressive(0)
    stock = DPMSolverMultistepScheduler.from_config(make_pipeline().scheduler.config)
    with pytest.raises(ValueError, match="DPMSolverMultistepScheduler predict no x_0"):
        next(DDPMImagePipeline(make_pipeline().unet, stock).progressive(num_inference_steps=3))


def test_interpolation(make_pipeline):
    pipeline = make_pipeline()
    a, b = (torch.rand(2, 1, 8, 8, generator=seeded(i)) * 2 - 1 for i in (1, 2))

    def mixed(weights, timestep, a=a, b=b, **kwargs):
        kwargs = {"num_inference_steps": 50, "output_type": "latent", "generator": seeded(), "eta": 0.0} | kwargs
        return pipeline.interpolate(a, b, weights, timestep, **kwargs).images

    images = mixed([0.0, 0.5, 1.0], 500)
    assert images.shape == (6, 1, 8, 8)
    # the ends are the pair itself, whatever is mixed with it; both ends of a pair share their noise
    for end, alone in ((0, mixed([0.0], 500, b=a)), (2, mixed([1.0], 500, a=b))):
        torch.testing.assert_close(images[[end, end + 3]], alone)
    # little is lost at the first step; what it is mixed from is lost in noise at the last
    torch.testing.assert_close(mixed([0.0], 0), a, atol=0.1, rtol=0)
    torch.testing.assert_close(mixed([0.5], 0), (a + b) / 2, atol=0.1, rtol=0)
    far = mixed([0.0, 1.0], 999)
    assert (far[::2] - far[1::2]).abs().mean() < 0.2 * (a - b).abs().mean()
    assert pipeline.interpolate(a, b, [0.3], 100, num_inference_steps=20).images[0].mode == "L"
    for weights, other, timestep, message in (
        ([1.2], b, 5, "weights"), ([], b, 5, "weights"), ([0.5], b[:1], 5, "images_b"), ([0.5], b, -1, "timestep=-1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            mixed(weights, timestep, b=other)


def test_two_progressive_at_once(make_pipeline):
    pipeline = make_pipeline()
    chains = []
    for n in (10, 4):
        pipeline.scheduler.set_timesteps(n)
        chains.append(pipeline.scheduler.timesteps.tolist())
    first, second = (pipeline.progressive(num_inference_steps=n) for n in (10, 4))
    recorded = [next(first)[0]]
    assert [t for t, *_ in second] == chains[1]
    assert recorded + [t for t, *_ in first] == chains[0]


def test_refused_eta(make_pipeline):
    pipeline = make_pipeline()
    for eta in 2.0, "1":
        with pytest.raises(ValueError, match="eta="):
            pipeline(eta=eta)


def test_sampling_leaves_the_schedulers_chain_alone(make_pipeline):
    pipeline = make_pipeline()
    everything = pipeline.scheduler.chain
    run(pipeline, num_inference_steps=3)
    a = torch.zeros(1, 1, 8, 8)
    pipeline.interpolate(a, a, [0.5], 500, num_inference_steps=4)
    list(pipeline.progressive(num_inference_steps=5))
    assert pipeline.scheduler.chain == everything and pipeline.scheduler.num_inference_steps is None
    pipeline.scheduler.set_timesteps(timesteps=[700, 20])
    run(pipeline, num_inference_steps=3)
    assert pipeline.scheduler.chain == [20, 700]
    with pytest.raises(ValueError, match="timestep=1000 is beyond the process"):
        pipeline.interpolate(a, a, [0.5], 1000)


def test_a_card_changed_by_hand_differs_from_ours(make_pipeline, tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    (tmp_path / "README.md").unlink(missing_ok=True)
    assert not has_our_card(tmp_path)
    card = write_model_card(tmp_path)
    assert has_our_card(tmp_path)
    card.write_text(card.read_text() + "Mine.\n")
    assert not has_our_card(tmp_path)
