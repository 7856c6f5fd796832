import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from ddpm_hf import DDPMImagePipeline, NoisyClassifier, VariationalDDPMScheduler
from ddpm_hf.pipelines.guidance import classifier_free, scales, shifted_output, sigma_at
from ddpm_hf.training.losses import drop_labels
from support.golden_data import (
    SEED_STEP,
    SEED_X,
    assert_fingerprint,
    case_id,
    case_scheduler,
    golden_cases,
    network,
    randn,
)
from support.networks import small_classifier
from support.versions import needs

GOLDEN = golden_cases("classifier_guidance")


def tolerance(dtype, f32, rtol=1e-8, atol=1e-9):
    return dict(rtol=rtol, atol=atol) if dtype == torch.float64 else dict(rtol=0, atol=5 * f32["max_abs"] + 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", GOLDEN, ids=case_id)
def test_golden_guided_steps(case, dtype):
    scheduler, x_t, noise = case_scheduler(case), randn(SEED_X, dtype), randn(SEED_STEP, dtype)
    t = torch.tensor(scheduler.chain)[case["t_index"]]
    output = network(x_t, t, case["mean_type"], case["var_type"])
    gradient = -0.5 * x_t
    if case["cond"] == "timed":
        gradient = gradient * torch.cos(0.003 * t.double()).view(-1, 1, 1, 1).to(dtype)
    step = partial(scheduler.step, output, t, x_t, gradient=gradient)
    mean = step(variance_noise=torch.zeros_like(x_t)).prev_sample
    assert mean.dtype == dtype
    assert_fingerprint(mean, case["conditioned_mean"], **tolerance(dtype, case["f32"]["conditioned_mean"]))
    ancestral = step(variance_noise=noise).prev_sample
    assert_fingerprint(ancestral, case["p_sample"], **tolerance(dtype, case["f32"]["p_sample"]))
    for eta in 0.0, 0.5:
        name, output = f"ddim_sample_eta{eta:g}", step(variance_noise=noise, eta=eta)
        assert_fingerprint(output.prev_sample, case[name], **tolerance(dtype, case["f32"][name]))
        x_start = "condition_score_pred_xstart"
        assert_fingerprint(output.pred_original_sample, case[x_start], **tolerance(dtype, case["f32"][x_start]))
    for i, timestep in enumerate(t.tolist()):  # as numbers, which go another way
        alone = [v[i : i + 1] for v in (output_of(case, x_t, t), x_t, gradient, noise)]
        for eta, expected in ((None, ancestral), (0.5, output.prev_sample)):
            actual = scheduler.step(alone[0], timestep, alone[1], gradient=alone[2], variance_noise=alone[3], eta=eta)
            torch.testing.assert_close(actual.prev_sample, expected[i : i + 1])


def output_of(case, x_t, t):
    return network(x_t, t, case["mean_type"], case["var_type"])


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("t", [0, 77, 999])
def test_the_shifted_output_is_the_shift_of_the_ddim_step(prediction_type, t):
    ours = VariationalDDPMScheduler(prediction_type=prediction_type, clip_sample=False)
    x_t, output, gradient = torch.randn(3, 2, 3, 8, 8, dtype=torch.float64)
    expected = ours.step(output, t, x_t, eta=0.0, gradient=gradient).prev_sample
    shifted = shifted_output(output, gradient, ours, t)
    actual = ours.step(shifted, t, x_t, eta=0.0).prev_sample
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_pure_noise_has_no_class(prediction_type):
    """With zero terminal SNR the first step, where nothing of x_0 is left, is not guided, and is finite."""
    kwargs = dict(rescale_betas_zero_snr=True, prediction_type=prediction_type, timestep_spacing="trailing")
    ours, stock = VariationalDDPMScheduler(**kwargs), DDIMScheduler(**kwargs)
    x_t, output, gradient = torch.randn(3, 2, 1, 4, 4)
    plain = ours.step(output, 999, x_t, eta=0.0).prev_sample
    torch.testing.assert_close(ours.step(output, 999, x_t, eta=0.0, gradient=gradient).prev_sample, plain)
    assert ours.step(output, 998, x_t, eta=0.0, gradient=gradient).prev_sample.isfinite().all()
    for scheduler in ours, stock:
        assert scheduler.alphas_cumprod[999] < 1e-12
        torch.testing.assert_close(shifted_output(output, gradient, scheduler, 999), output)


def test_sigma_between_two_timesteps():
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(7)
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas):
        assert sigma_at(scheduler, t) == pytest.approx(sigma.item(), rel=1e-4)


def test_guided_sampling_of_a_gaussian_gives_the_posterior():
    """x_0 ~ N(0, s^2) by an exact network, y = x_0 + noise by an exact classifier: samples are those of p(x_0 | y)."""
    s2, noise2, y = 0.25, 0.25, 0.6  # p(x_0 | y) = N(0.3, 0.125)
    scheduler = VariationalDDPMScheduler(beta_schedule="cosine", variance_type="fixed_small", clip_sample=False)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(40000, 1, 1, 1, generator=generator, dtype=torch.float64)
    for eta, loosely in ((None, 0.01), (0.0, 0.01)):
        x = start
        for t in scheduler.timesteps.tolist():
            abar = scheduler.alphas_cumprod[t].item()
            marginal = abar * s2 + 1 - abar
            epsilon = math.sqrt(1 - abar) / marginal * x
            mean, variance = math.sqrt(abar) * s2 / marginal * x, s2 * (1 - abar) / marginal  # of x_0 given x_t
            gradient = (y - mean) / (variance + noise2) * math.sqrt(abar) * s2 / marginal
            x = scheduler.step(epsilon, t, x, eta=eta, gradient=gradient, generator=generator).prev_sample
        assert x.mean().item() == pytest.approx(0.3, abs=loosely), eta
        assert x.var().item() == pytest.approx(0.125, abs=loosely), eta


def test_half_precision():
    x_t, output, gradient = torch.randn(3, 2, 1, 4, 4)
    scheduler = VariationalDDPMScheduler(variance_type="fixed_small")
    for eta in None, 0.0:
        actual = scheduler.step(output.half(), 0, x_t.half(), eta=eta, gradient=gradient)
        assert actual.prev_sample.dtype == torch.float16
        assert scheduler.step(output, 0, x_t, eta=eta, gradient=gradient.half()).prev_sample.dtype == torch.float32


def test_classifier_free_formula():
    a, b = torch.randn(2, 2, 6, 4, 4)
    scale = scales("guidance_scale", torch.tensor([0.0, 3.0]), 2)
    actual = classifier_free(a, b, scale, 3)
    torch.testing.assert_close(actual[0, :3], b[0, :3])
    torch.testing.assert_close(actual[1, :3], b[1, :3] + 3 * (a[1, :3] - b[1, :3]))
    torch.testing.assert_close(actual[:, 3:], a[:, 3:])


def test_label_dropout():
    labels = torch.arange(10000) % 10
    dropped = drop_labels(labels, 10, 0.2)
    assert ((dropped == labels) | (dropped == 10)).all()
    assert (dropped == 10).float().mean().item() == pytest.approx(0.2, abs=0.02)  # 5 standard deviations
    assert torch.equal(drop_labels(labels, 10, 0.0), labels)


# the pipeline


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def run(pipeline, batch_size=2, **kwargs):
    kwargs = {"num_inference_steps": 5, "output_type": "latent", "generator": seeded(), **kwargs}
    return pipeline(batch_size, **kwargs).images


@pytest.fixture
def make_guided(make_pipeline):
    """A tiny pipeline with a classifier of its process, whose gradients are not small."""

    def make(classes=4, sample_size=8, scheduler=None, classifier=(), **unet):
        pipeline = make_pipeline(sample_size, scheduler=scheduler, **unet)
        config = dict(
            sample_size=sample_size,
            num_classes=classes,
            in_channels=pipeline.unet.config.in_channels,
            down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
            scheduler=json.loads(pipeline.scheduler.to_json_string()),
        )
        net = small_classifier(**config | dict(classifier))
        torch.nn.init.normal_(net.head.to_out.weight, std=3.0)
        pipeline = DDPMImagePipeline(pipeline.unet, pipeline.scheduler, net)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


NULL = dict(num_class_embeds=5, _ddpm_hf={"null_class": 4})


def test_classifier_free_guidance(make_pipeline):
    pipeline = make_pipeline(**NULL)
    conditional = run(pipeline, class_labels=[1, 2])
    torch.testing.assert_close(run(pipeline, class_labels=[1, 2], guidance_scale=1), conditional, rtol=0, atol=0)
    none = run(pipeline)
    torch.testing.assert_close(run(pipeline, class_labels=[1, 2], guidance_scale=0.0), none)
    strong = run(pipeline, class_labels=[1, 2], guidance_scale=4.0)
    assert (strong - conditional).abs().max() > 1e-3
    per_image = run(pipeline, class_labels=[1, 2], guidance_scale=torch.tensor([1.0, 4.0]))
    torch.testing.assert_close(per_image, torch.stack((conditional[0], strong[1])), rtol=1e-5, atol=1e-5)
    x_t, t = torch.randn(2, 1, 8, 8), 500
    labels, null = torch.tensor([1, 2]), torch.tensor([4, 4])
    a, b = (pipeline.unet(x_t, t, y).sample for y in (labels, null))
    recorded = []
    pipeline(2, latents=x_t, class_labels=labels, guidance_scale=2.5, num_inference_steps=1, output_type="latent",
             callback_on_step_end=lambda pipe, i, t, tensors: recorded.append((int(t), tensors["model_output"])) or {},
             callback_on_step_end_tensor_inputs=("model_output",))  # fmt: skip
    a, b = (pipeline.unet(x_t, recorded[0][0], y).sample for y in (labels, null))
    torch.testing.assert_close(recorded[0][1], b + 2.5 * (a - b))


@pytest.mark.parametrize("eta", [None, 0.0, 0.7])
@pytest.mark.parametrize("learned", [False, True])
def test_classifier_guidance_follows_the_scheduler(make_guided, eta, learned):
    kwargs = dict(out_channels=2, scheduler=VariationalDDPMScheduler(variance_type="learned_range")) if learned else {}
    pipeline = make_guided(**kwargs)
    x, labels, scale = torch.randn(2, 1, 8, 8), torch.tensor([3, 1]), torch.tensor([2.0, 5.0])
    actual = run(pipeline, latents=x, class_labels=labels, classifier_scale=scale, eta=eta)
    generator = seeded()
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(5)
    for t in scheduler.timesteps.tolist():
        x_t = x.clone().requires_grad_()
        log_p = pipeline.classifier(x_t, t).log_softmax(-1)[torch.arange(2), labels]
        gradient = torch.autograd.grad((scale * log_p).sum(), x_t)[0]
        with torch.no_grad():
            x = scheduler.step(pipeline.unet(x, t).sample, t, x, eta=eta, generator=generator, gradient=gradient)
        x = x.prev_sample
    torch.testing.assert_close(actual, x, rtol=1e-5, atol=1e-5)


def test_no_guidance_is_none(make_guided):
    pipeline = make_guided()
    torch.testing.assert_close(run(pipeline, class_labels=1, classifier_scale=0), run(pipeline), rtol=0, atol=0)
    assert (run(pipeline, class_labels=1, classifier_scale=9.0) - run(pipeline)).abs().max() > 1e-3


def test_both_guidances_of_a_conditional_network(make_guided):
    pipeline = make_guided(**NULL)
    plain = run(pipeline, class_labels=[1, 2])
    by_classifier = run(pipeline, class_labels=[1, 2], classifier_scale=3.0)
    both = run(pipeline, class_labels=[1, 2], classifier_scale=3.0, guidance_scale=2.0)
    assert min((by_classifier - plain).abs().max(), (both - by_classifier).abs().max()) > 1e-3


@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler]
)
def test_guidance_by_other_schedulers(make_guided, scheduler):
    pipeline = make_guided(scheduler=VariationalDDPMScheduler(clip_sample=False))
    ours = run(pipeline, class_labels=2, classifier_scale=3.0, eta=0.0, num_inference_steps=20)
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    actual = run(pipeline, class_labels=2, classifier_scale=3.0, num_inference_steps=20)
    assert actual.isfinite().all() and (actual - run(pipeline, num_inference_steps=20)).abs().max() > 1e-3
    if scheduler is DDIMScheduler:  # the same chain, and no clipping in either
        torch.testing.assert_close(actual, ours, rtol=1e-3, atol=2e-3)


def test_image_i_is_the_same_alone_or_in_a_batch(make_guided):
    pipeline = make_guided(**NULL)
    kwargs = dict(class_labels=[0, 1, 3], guidance_scale=torch.tensor([1.0, 2.0, 3.0]))
    kwargs["classifier_scale"] = torch.tensor([0.0, 1.0, 5.0])
    batch = run(pipeline, 3, generator=[seeded(i) for i in range(3)], **kwargs)
    for i in range(3):
        alone = {key: values[i : i + 1] for key, values in kwargs.items()}
        torch.testing.assert_close(run(pipeline, 1, generator=[seeded(i)], **alone)[0], batch[i], rtol=0, atol=1e-4)


def test_guidance_on_the_way_and_between(make_guided):
    pipeline = make_guided(**NULL)
    kwargs = dict(class_labels=[0, 1], guidance_scale=[2.0, 3.0], classifier_scale=4.0)
    *_, (_, _, x_start) = pipeline.progressive(2, generator=seeded(), num_inference_steps=5, **kwargs)
    torch.testing.assert_close(x_start, run(pipeline, **kwargs))
    a, b = torch.rand(2, 2, 1, 8, 8) * 2 - 1
    between = partial(pipeline.interpolate, a, b, [0.0, 0.5, 1.0], 700, num_inference_steps=5, output_type="latent")
    actual = between(generator=seeded(), **kwargs).images
    assert actual.shape == (6, 1, 8, 8)
    assert (actual - between(generator=seeded(), class_labels=[0, 1]).images).abs().max() > 1e-3


def test_guidance_leaves_no_graph_and_no_gradients(make_guided):
    pipeline = make_guided()
    images = run(pipeline, class_labels=2, classifier_scale=3.0)
    assert not images.requires_grad and images.grad_fn is None
    assert all(p.grad is None for net in (pipeline.unet, pipeline.classifier) for p in net.parameters())


def test_the_optimized_network_is_guided_too(make_guided):
    pipeline = make_guided(**NULL)
    kwargs = dict(class_labels=[0, 1], guidance_scale=2.0, classifier_scale=3.0)
    expected = run(pipeline, **kwargs)
    pipeline.optimize(compile=False)
    torch.testing.assert_close(run(pipeline, **kwargs), expected, rtol=1e-4, atol=1e-4)


@needs("torch", "2.13", "its random numbers in bfloat16 are others than in float32")
def test_half_precision_pipelines_have_gradients_in_float32(make_guided):
    pipeline = make_guided()
    expected = run(pipeline, class_labels=2, classifier_scale=3.0)
    recorded = []
    gradient = NoisyClassifier.gradient

    def noted(self, x_t, *args):
        recorded.append((self.dtype, gradient(self, x_t, *args).dtype))
        return gradient(self, x_t, *args)

    pipeline.to(torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NoisyClassifier, "gradient", noted)
        actual = run(pipeline, class_labels=2, classifier_scale=3.0)
    assert set(recorded) == {(torch.float32, torch.float32)} and pipeline.classifier.dtype == torch.bfloat16
    assert actual.dtype == torch.bfloat16 and (actual.float() - expected).abs().mean() < 0.1


BAD = [
    (dict(class_labels=4, classifier_scale=1.0), r"class_labels=\[4, 4\]: give integers from 0 to 3"),
    (dict(class_labels=-1, classifier_scale=1.0), "give integers from 0 to 3"),
    (dict(class_labels=1.5, classifier_scale=1.0), "give integers from 0 to 3"),
    (dict(classifier_scale=1.0), "classifier_scale=1.0 needs class_labels"),
    (dict(class_labels=1, classifier_scale=-1.0), r"classifier_scale=-1.0 must be 0 or more"),
    (dict(class_labels=1, classifier_scale=math.nan), "classifier_scale=nan must be 0 or more, and finite"),
    (dict(class_labels=1, classifier_scale=math.inf), "must be 0 or more, and finite"),
    (dict(class_labels=1, classifier_scale="much"), "classifier_scale='much' must be a number"),
    (dict(class_labels=1, classifier_scale=[1.0, 2.0, 3.0]), r"classifier_scale has shape \(3,\) for batch_size=2"),
    (dict(class_labels=1, guidance_scale=2.0), r"guidance_scale=2.0 needs a network trained with label dropout"),
    (dict(class_labels=[1], classifier_scale=1.0), "class_labels has 1 entries for batch_size=2"),
]


@pytest.mark.parametrize("arguments, message", BAD)
def test_bad_arguments_of_an_unconditional_network(make_guided, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        run(make_guided(), **arguments)
    assert "\n" not in str(error.value)


def test_bad_arguments_of_others(make_guided, make_pipeline):
    with pytest.raises(ValueError, match="class_labels were given, but this network has no classes"):
        run(make_pipeline(), class_labels=1)
    with pytest.raises(ValueError, match="classifier_scale=1.0 needs a classifier"):
        run(make_pipeline(num_class_embeds=4), class_labels=1, classifier_scale=1.0)
    pipeline = make_pipeline(**NULL)
    with pytest.raises(ValueError, match="give integers from 0 to 3"):  # 4 is none
        run(pipeline, class_labels=4)
    with pytest.raises(ValueError, match="guidance_scale=2.0 needs class_labels"):
        run(pipeline, guidance_scale=2.0)
    with pytest.raises(ValueError, match="class_labels are missing"):
        run(make_pipeline(num_class_embeds=4))


@pytest.mark.parametrize(
    "classifier, message",
    [
        (dict(num_classes=3), "the classifier has 3 classes, the network 4"),
        (dict(in_channels=3), "the classifier has 3 channels, the network 1"),
        (dict(sample_size=16), "the classifier is of 16x16 images, the network of 8x8"),
        (dict(scheduler=None), "does not say of which process"),
        (dict(scheduler=dict(num_train_timesteps=100)), "trained with T=100, the scheduler has T=1000"),
        (dict(scheduler=dict(beta_schedule="quad")), "another schedule: at t=.* its alphas_cumprod is"),
    ],
)
def test_a_classifier_of_something_else(make_guided, classifier, message):
    with pytest.raises(ValueError, match=message) as error:
        run(make_guided(num_class_embeds=4, classifier=classifier), class_labels=1, classifier_scale=1.0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "quad"])
def test_the_same_process_of_another_class_is_the_same(make_guided, schedule):
    pipeline = make_guided(scheduler=VariationalDDPMScheduler(beta_schedule=schedule))
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)  # float32 tables
    run(pipeline, class_labels=1, classifier_scale=1.0)
    np.testing.assert_allclose(pipeline.scheduler.alphas_cumprod.numpy()[0], 1, atol=0.01)


@pytest.mark.parametrize("labels", [torch.tensor([1, 2], dtype=torch.uint8), np.array([1, 2]), (1, 2), range(1, 3)])
def test_kinds_of_labels(make_guided, labels):
    for pipeline in make_guided(), make_guided(**NULL):
        expected = run(pipeline, class_labels=[1, 2], classifier_scale=2.0)
        torch.testing.assert_close(run(pipeline, class_labels=labels, classifier_scale=2.0), expected, rtol=0, atol=0)


@pytest.mark.parametrize("labels", [[True, False], "3", ["a", "b"], {1, 2}, torch.tensor([[1], [2]]), [], [1 + 1j, 2]])
def test_what_is_no_label(make_guided, labels):
    for pipeline in make_guided(), make_guided(**NULL):
        with pytest.raises(ValueError, match="class_labels") as error:
            run(pipeline, class_labels=labels, classifier_scale=2.0)
        assert "\n" not in str(error.value)


def test_guidance_in_inference_mode(make_guided):
    pipeline = make_guided(**NULL)
    kwargs = dict(class_labels=torch.tensor([1, 2]), classifier_scale=2.0, guidance_scale=2.0)
    expected = run(pipeline, **kwargs)
    with torch.inference_mode():
        torch.testing.assert_close(run(pipeline, **kwargs), expected)
        kwargs["class_labels"] = torch.tensor([1, 2])
        torch.testing.assert_close(run(pipeline, **kwargs), expected)


def test_half_precision_by_other_schedulers(make_guided):
    scheduler = VariationalDDPMScheduler(prediction_type="sample", beta_schedule="cosine")
    pipeline = make_guided(scheduler=scheduler)
    pipeline.scheduler = DDIMScheduler.from_config(scheduler.config)
    output, gradient = torch.randn(2, 1, 1, 4, 4).half()
    assert shifted_output(output, gradient.float(), pipeline.scheduler, 999).dtype == torch.float16
