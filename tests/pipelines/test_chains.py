"""Chains of other schedulers and of one's own timesteps through the pipeline, with the exact network of Gaussian data."""

import copy
import logging
import math
import re
import threading

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler

from ddpm_hf import DDPMImagePipeline, DDPMUNet, VariationalDDPMScheduler, VPSDEScheduler
from ddpm_hf.pipelines.chain import prepared_scheduler, warn_once
from ddpm_hf.pipelines.options import SamplingOptions

MEAN, STD = 0.3, 0.2


class Exact(DDPMUNet):
    """The network of pixels N(0.3, 0.2^2), off by `error` of its output at most; also between two timesteps."""

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        abar = math.exp(np.interp(float(timestep), range(len(self.log_abar)), self.log_abar))
        x_start = MEAN + abar**0.5 * STD**2 / (abar * STD**2 + 1 - abar) * (sample - abar**0.5 * MEAN)
        return ((sample - abar**0.5 * x_start) / (1 - abar) ** 0.5 + self.error * torch.sin(5 * sample),)


def exact_pipeline(scheduler=None, error=0.0, **config):
    config = {
        "sample_size": 16,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8,),
        "norm_num_groups": 4,
    } | config
    unet = Exact(down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), **config).double()
    scheduler = scheduler or VariationalDDPMScheduler(clip_sample=False)
    unet.log_abar, unet.error = scheduler.alphas_cumprod.log().tolist(), error
    pipeline = DDPMImagePipeline(unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def scheduler_class(name):
    return getattr(diffusers, f"{name}Scheduler")


@pytest.fixture
def logged():
    records = []

    class Handler(logging.Handler):
        def emit(self, record):
            records.append(record.getMessage())

    handler = Handler(logging.WARNING)
    logging.getLogger("diffusers").addHandler(handler)
    logging.getLogger("ddpm_hf").addHandler(handler)
    yield records
    logging.getLogger("diffusers").removeHandler(handler)
    logging.getLogger("ddpm_hf").removeHandler(handler)


CLIPPING = ["DDPM", "DDIM", "DDPMParallel", "DDIMParallel"]
MULTISTEP = ["DPMSolverMultistep", "UniPCMultistep", "DEISMultistep", "SASolver"]
SIGMAS = [
    "EulerDiscrete",
    "EulerAncestralDiscrete",
    "HeunDiscrete",
    "KDPM2Discrete",
    "KDPM2AncestralDiscrete",
    "LMSDiscrete",
]
SPACED = [*CLIPPING, *MULTISTEP, *SIGMAS, "PNDM"]  # which follow `timestep_spacing`


# other schedulers, as a user of diffusers puts them in


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("name", SPACED)
def test_moments_by_every_scheduler_in_few_steps(name, schedule, tmp_path, logged):
    """Of a network that is off by 0.02, as a trained one; the first-order ones are furthest off in std, linear ones most."""
    ours = VariationalDDPMScheduler(beta_schedule=schedule, timestep_spacing="iddpm", clip_sample=False)
    pipeline = exact_pipeline(ours, error=0.02)
    ours.save_pretrained(tmp_path)
    stock = DDPMScheduler.from_pretrained(tmp_path)  # of a pipeline that diffusers opened
    pipeline.scheduler, other = (scheduler_class(name).from_config(configured.config) for configured in (ours, stock))
    for steps, factor in (10, 2.3), (20, 1.6), (50, 1.3):
        chains = []
        for scheduler in copy.deepcopy(pipeline.scheduler), other:
            scheduler.set_timesteps(steps)
            chains.append(scheduler.timesteps.tolist())
        assert chains[0] == chains[1]
        images = pipeline(4, seeded(), steps, "latent").images
        assert images.mean().item() == pytest.approx(MEAN, abs=0.05)
        assert 1 / factor < images.std().item() / STD < factor, steps
    assert not any("far outside" in message for message in logged)


@pytest.mark.parametrize("name", [*MULTISTEP, *SIGMAS, "PNDM"])
def test_default_steps_of_solvers(name):
    pipeline = exact_pipeline(
        VariationalDDPMScheduler(clip_sample=False, beta_schedule="cosine", timestep_spacing="iddpm")
    )
    pipeline.scheduler = scheduler_class(name).from_config(pipeline.scheduler.config)
    images = pipeline(8, seeded(), output_type="latent").images
    assert images.mean().item() == pytest.approx(MEAN, abs=0.02) and images.std().item() == pytest.approx(STD, rel=0.15)
    with_steps = pipeline(8, seeded(), 50, output_type="latent").images
    assert torch.equal(images, with_steps)


@pytest.mark.parametrize("name", ["TCD", "LCM"])
def test_default_steps_of_distilled_networks(name):
    pipeline = exact_pipeline()
    pipeline.scheduler = scheduler_class(name).from_config(pipeline.scheduler.config, original_inference_steps=20)
    pipeline(output_type="latent")
    assert pipeline.num_timesteps == 20


def test_default_steps_of_a_short_process():
    for T in 2, 7:
        scheduler = VariationalDDPMScheduler(T)
        pipeline = exact_pipeline(scheduler)
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(scheduler.config)
        assert pipeline(output_type="latent").images.isfinite().all()


def test_repeated_timesteps_are_refused():
    pipeline = exact_pipeline()
    for name in MULTISTEP:
        pipeline.scheduler = scheduler_class(name).from_config(pipeline.scheduler.config)
        with pytest.raises(ValueError, match=f"^{name}Scheduler visits timesteps twice in 1000 steps"):
            pipeline(1, num_inference_steps=1000)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", MULTISTEP)
@pytest.mark.parametrize(
    "schedule, sigmas, steps", [("linear", "exponential", 50), ("linear", "karras", 100), ("cosine", "karras", 50)]
)
def test_sigmas_whose_rounded_timesteps_are_equal(name, schedule, sigmas, steps):
    """Steps are between sigmas. Of the cosine the first timesteps are equal."""
    pipeline = exact_pipeline(VariationalDDPMScheduler(beta_schedule=schedule, clip_sample=False))
    pipeline.scheduler = scheduler_class(name).from_config(pipeline.scheduler.config, **{f"use_{sigmas}_sigmas": True})
    chain = prepared_scheduler(pipeline.scheduler, SamplingOptions(num_inference_steps=steps)).timesteps
    grey = torch.zeros(8, 1, 16, 16)
    assert len(chain.unique()) < len(chain)
    images = pipeline(8, seeded(), steps, "latent").images
    on_the_way = pipeline.interpolate(grey, grey, [0.5], 980, num_inference_steps=steps, output_type="latent").images
    for samples in images, on_the_way:
        assert samples.mean().item() == pytest.approx(MEAN, abs=0.03) and samples.std().item() == pytest.approx(
            STD, rel=0.3
        )


def test_samples_that_are_not_finite_are_no_pictures():
    pipeline = exact_pipeline()
    pipeline.unet.error = float("nan")
    for output_type in "pil", "np", "pt", "latent":
        with pytest.raises(
            ValueError, match="^2 of 2 samples are not finite .VariationalDDPMScheduler, 3 timesteps from 666"
        ):
            pipeline(2, num_inference_steps=3, output_type=output_type)
    with pytest.raises(ValueError, match="not finite"):
        list(pipeline.progressive(1, num_inference_steps=3))
    with pytest.raises(ValueError, match="not finite"):
        pipeline.interpolate(torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 16), [0.5], 500, num_inference_steps=3)


def test_garbage_is_warned_of(logged):
    """A solver that begins at the end of the cosine schedule, where 1 / sqrt(alpha_bar) is 20,000."""
    scheduler = VariationalDDPMScheduler(beta_schedule="cosine", timestep_spacing="linspace")
    pipeline = exact_pipeline(scheduler, error=0.02)
    for name in "DPMSolverMultistep", "DPMSolverSinglestep":
        pipeline.scheduler = scheduler_class(name).from_config(scheduler.config)
        logged.clear()
        warn_once.cache_clear()
        images = pipeline(4, seeded(), 20, "latent").images
        pipeline(4, torch.Generator().manual_seed(1), 20, "latent")  # once, also of other images
        assert images.abs().mean() > 2 and sum("far outside" in message for message in logged) == 1
        assert any(
            "far outside" in message and f"{name}Scheduler, 20 timesteps from 999" in message for message in logged
        )
        pipeline.scheduler = scheduler_class(name).from_config(
            scheduler.config, thresholding=True
        )  # as the warning advises
        logged.clear()
        images = pipeline(4, seeded(), 20, "latent").images
        assert images.std().item() == pytest.approx(STD, rel=0.5) and not any(
            "far outside" in message for message in logged
        )


def test_folders_saved_earlier_open_rightly():
    config = dict(VariationalDDPMScheduler(timestep_spacing="iddpm").config)
    assert config["timestep_spacing"] == "leading"
    for saved in "leading", "linspace":  # today's and the earlier ones
        reopened = VariationalDDPMScheduler.from_config(config | {"timestep_spacing": saved})
        assert reopened.timestep_spacing == "iddpm" and reopened.config.timestep_spacing == "leading"
    assert VariationalDDPMScheduler.from_config(config, timestep_spacing="trailing").timestep_spacing == "trailing"


# starting on the way


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("name", [None, *CLIPPING, *MULTISTEP, "DPMSolverSinglestep", *SIGMAS])
def test_interpolation_by_every_scheduler(name, prepared):
    """At t = 980 nothing is left of the pictures: data of the network's own mean and std. At t = 100 much is left."""
    pipeline = exact_pipeline()
    if name is not None:
        pipeline.scheduler = scheduler_class(name).from_config(pipeline.scheduler.config)
    if prepared:
        pipeline.scheduler.set_timesteps(7)
    grey = torch.zeros(8, 1, 16, 16)
    images = pipeline.interpolate(
        grey, grey, [0.0, 1.0], 980, num_inference_steps=100, generator=seeded(), output_type="latent"
    ).images
    assert images.shape == (16, 1, 16, 16)
    assert images.mean().item() == pytest.approx(MEAN, abs=0.02) and images.std().item() == pytest.approx(STD, rel=0.2)
    data = MEAN + STD * torch.randn(8, 1, 16, 16, generator=seeded(1))
    near = pipeline.interpolate(
        data, data, [0.0], 100, num_inference_steps=100, generator=seeded(), output_type="latent"
    ).images
    # of x_0 and x_t, both with this std, the correlation is sqrt(alpha_bar) std / std(x_t) each way
    abar = VariationalDDPMScheduler().alphas_cumprod[100].item()
    assert near.std().item() == pytest.approx(STD, rel=0.2)
    share = abar * STD**2 / (abar * STD**2 + 1 - abar)
    bounds = share - 0.05, share**0.5 + 0.05  # an SDE's, an ODE's
    assert bounds[0] < torch.corrcoef(torch.stack((near.flatten(), data.double().flatten())))[0, 1] < bounds[1]


def test_schedulers_that_cannot_start_on_the_way():
    pipeline, grey = exact_pipeline(), torch.zeros(1, 1, 16, 16)
    for options in {}, {"skip_prk_steps": True}:
        pipeline.scheduler = diffusers.PNDMScheduler.from_config(pipeline.scheduler.config, **options)
        for timestep in 300, 980:
            with pytest.raises(ValueError, match="^PNDMScheduler visits its first timesteps twice"):
                pipeline.interpolate(grey, grey, [0.5], timestep, num_inference_steps=50)


@pytest.mark.parametrize("name", ["UniPCMultistep", "SASolver", "LMSDiscrete", "HeunDiscrete", "PNDM"])
def test_calls_do_not_share_a_solvers_memory(name):
    """Two chains in turn, and one after another was left on the way."""
    pipeline = exact_pipeline()
    pipeline.scheduler = scheduler_class(name).from_config(pipeline.scheduler.config)

    def chain(seed):
        sampling = pipeline._prepare(2, SamplingOptions(seeded(seed), 10))
        for step in pipeline._denoise(sampling, sampling.noise):
            yield step.sample

    alone = [list(chain(seed))[-1] for seed in (0, 1)]
    in_turn = list(zip(chain(0), chain(1)))[-1]
    assert torch.equal(in_turn[0], alone[0]) and torch.equal(in_turn[1], alone[1])
    assert pipeline.scheduler.timesteps is None or len(pipeline.scheduler.timesteps) != 10


# timesteps of one's own


def visited(pipeline, **kwargs):
    recorded = []
    pipeline(
        1, output_type="latent", callback_on_step_end=lambda pipe, i, t, tensors: recorded.append(t.item()), **kwargs
    )
    return recorded


QUADRATIC = [999, 800, 500, 90, 3]


@pytest.mark.parametrize("timesteps", [QUADRATIC, tuple(QUADRATIC), np.array(QUADRATIC), torch.tensor(QUADRATIC)])
def test_own_timesteps(make_pipeline, timesteps):
    pipeline = make_pipeline()
    assert visited(pipeline, timesteps=timesteps, eta=0.0) == QUADRATIC
    assert [t for t, *_ in pipeline.progressive(timesteps=timesteps)] == QUADRATIC
    pipeline.scheduler.set_timesteps(timesteps=[700, 20])
    assert visited(pipeline, num_inference_steps=4) == [750, 500, 250, 0]  # never the scheduler's own
    assert pipeline.scheduler.chain == [20, 700]
    a = torch.zeros(1, 1, 8, 8)
    from_500 = pipeline.interpolate(
        a, a, [0.5], 600, timesteps=timesteps, generator=seeded(), output_type="latent"
    ).images
    other = pipeline.interpolate(
        a, a, [0.5], 600, timesteps=[500, 90, 3], generator=seeded(), output_type="latent"
    ).images
    assert torch.equal(from_500, other)


def test_own_timesteps_and_sigmas_of_other_schedulers():
    pipeline = exact_pipeline()
    for name in "DPMSolverMultistep", "EulerDiscrete", "HeunDiscrete", "DDPM":
        pipeline.scheduler = scheduler_class(name).from_config(pipeline.scheduler.config)
        expected = [999, 800, 800, 500, 500, 90, 90, 3, 3] if name == "HeunDiscrete" else QUADRATIC
        assert visited(pipeline, timesteps=QUADRATIC) == expected
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    abar = VariationalDDPMScheduler().alphas_cumprod[QUADRATIC]
    sigmas = [*((1 - abar) / abar).sqrt().tolist(), 0.0]
    assert visited(pipeline, sigmas=sigmas) == pytest.approx(QUADRATIC, abs=1e-2)


@pytest.mark.parametrize(
    ("scheduler", "kwargs", "message"),
    [
        ("DDIM", {"timesteps": [5, 3]}, "^timesteps: DDIMScheduler takes none; give num_inference_steps"),
        ("DDIM", {"sigmas": [5.0, 3.0]}, "^sigmas: DDIMScheduler takes none"),
        (None, {"sigmas": [5.0, 3.0]}, "^sigmas: VariationalDDPMScheduler takes none"),
        (None, {"timesteps": [5, 3], "num_inference_steps": 2}, "^num_inference_steps and timesteps were given"),
        (None, {"timesteps": [3, 5]}, r"^timesteps=\[3, 5\] must be strictly descending"),
        (None, {"timesteps": []}, "^timesteps"),
        (None, {"timesteps": 7}, "^timesteps=7"),
        (None, {"timesteps": "all"}, "^timesteps='all'"),
        (None, {"timesteps": [1000, 5]}, r"^timesteps makes the chain \[1000, 5\]"),
        ("EulerDiscrete", {"timesteps": [5, 5]}, "strictly descending"),
        *(
            (
                name,
                {"timesteps": chain},
                f"^timesteps={re.escape(str(chain))} must be strictly descending numbers, 999 to 0$",
            )
            for name in ("DPMSolverMultistep", "EulerDiscrete", "HeunDiscrete")
            for chain in ([5000, 10], [-5, -6], [999.5, 3])
        ),
        (
            "EulerDiscrete",
            {"sigmas": [1.0, -1.0]},
            r"^sigmas=\[1.0, -1.0\] must be strictly descending numbers, 0 or more$",
        ),
        ("DPMSolverMultistep", {"num_inference_steps": 2.0}, "^num_inference_steps=2.0 must be an integer, 1 or more"),
        ("DPMSolverMultistep", {"num_inference_steps": 0}, "^num_inference_steps=0"),
    ],
)
def test_refused_chains(make_pipeline, scheduler, kwargs, message):
    pipeline = make_pipeline()
    if scheduler is not None:
        pipeline.scheduler = scheduler_class(scheduler).from_config(pipeline.scheduler.config)
    with pytest.raises(ValueError, match=message):
        pipeline(**kwargs)


def test_integers_of_every_kind(make_pipeline):
    pipeline = make_pipeline()
    for two in np.int64(2), np.uint8(2), torch.tensor(2):
        images = pipeline(two, num_inference_steps=two, output_type="latent").images
        assert len(images) == 2
        assert len(list(pipeline.progressive(two, num_inference_steps=two, every=two))) == 2
        a = torch.zeros(1, 1, 8, 8)
        pipeline.interpolate(a, a, [0.5], two, num_inference_steps=np.int64(1000), output_type="latent")
    for wrong in 2.0, "2", None, -1, [2]:
        with pytest.raises(ValueError, match="^batch_size=.* must be an integer, 1 or more"):
            pipeline(wrong)


def test_long_chains_are_shown_short():
    with pytest.raises(ValueError) as error:
        VariationalDDPMScheduler().set_timesteps(timesteps=list(range(1000, 0, -1)))
    assert str(error.value) == (
        "timesteps makes the chain [1000, 999, 998, ..., 3, 2, 1] of 1000 timesteps; timesteps must be strictly descending "
        "within 999 to 0"
    )


@pytest.mark.parametrize(
    ("generator", "message"),
    [
        (0, r"^generator=0 must be a torch.Generator or a list of them; use torch.Generator\(\).manual_seed\(0\)"),
        ([3, 4], r"manual_seed\(3\)"),
        ("seed", "^generator='seed' must be"),
        (np.random.default_rng(0), "must be a torch.Generator"),
    ],
)
def test_wrong_generators(make_pipeline, generator, message):
    pipeline, a = make_pipeline(), torch.zeros(1, 1, 8, 8)
    for call in (
        lambda: pipeline(2, generator),
        lambda: pipeline.progressive(2, generator),
        lambda: pipeline.interpolate(a, a, [0.5], 10, generator=generator),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("scheduler", "kwargs", "signal"),
    [
        ({"num_train_timesteps": 100, "beta_end": 0.2}, {"num_inference_steps": 60}, 0.15),  # leading: 59, 58, ...
        ({}, {"timesteps": [500, 250, 0]}, 0.28),
        ({"beta_schedule": "cosine"}, {"num_inference_steps": 10}, 0.15),
        (
            {"num_train_timesteps": 100, "beta_end": 0.2, "timestep_spacing": "trailing"},
            {"num_inference_steps": 60},
            None,
        ),
        ({"beta_schedule": "cosine"}, {"num_inference_steps": 20}, None),
        ({}, {"num_inference_steps": 10}, None),
        ({}, {"timesteps": [500, 250, 0], "latents": torch.zeros(1, 1, 8, 8)}, None),  # which may be of t = 500
        ({"num_train_timesteps": 100}, {}, None),  # which ends at 0.6 by itself
    ],
)
def test_noise_in_the_middle_of_the_process_is_warned_of(make_pipeline, logged, scheduler, kwargs, signal):
    warn_once.cache_clear()
    pipeline = make_pipeline(scheduler=VariationalDDPMScheduler(**scheduler))
    for _ in range(2):
        pipeline(**kwargs)
    warnings = [message for message in logged if "from noise alone" in message]
    assert len(warnings) == (signal is not None)
    if signal is not None:
        assert f"still holds {signal:.2f} of the image" in warnings[0]


# the network


@pytest.mark.parametrize("name", ["DDPMParallel", "DDPM"])
@pytest.mark.parametrize("variance_type", ["learned_range", "fixed_small"])
def test_learned_variances_go_to_schedulers_that_use_them(make_pipeline, name, variance_type):
    """Stock pipelines hand the doubled channels to these; the others get the mean alone."""
    ours = VariationalDDPMScheduler(variance_type="learned_range")
    pipeline = make_pipeline(out_channels=2, scheduler=ours)
    scheduler = scheduler_class(name).from_config(ours.config, variance_type=variance_type)
    if name == "DDPM":  # as a pipeline's constructor does not leave it
        pipeline.register_modules(scheduler=scheduler)
        if variance_type == "fixed_small":
            return  # test_scheduler_diffusers: it refuses doubled channels
    else:
        pipeline.scheduler = scheduler
    images = pipeline(2, seeded(), 10, "latent").images
    if variance_type == "learned_range":
        pipeline.scheduler = ours
        torch.testing.assert_close(images, pipeline(2, seeded(), 10, "latent").images, atol=2e-3, rtol=0)
    else:
        pipeline.unet.forward = lambda *args, forward=pipeline.unet.forward, **kwargs: (
            forward(*args, **kwargs)[0][:, :1],
        )
        pipeline.scheduler = VariationalDDPMScheduler(variance_type="fixed_small")
        torch.testing.assert_close(images, pipeline(2, seeded(), 10, "latent").images, atol=2e-3, rtol=0)


def modes(module):
    return [part.training for part in module.modules()]


def test_sampling_is_in_evaluation_mode(make_pipeline):
    pipeline = make_pipeline(dropout=0.5)
    expected = pipeline(2, seeded(), 4, "latent").images
    pipeline.unet.train()
    pipeline.unet.mid_block.eval()  # frozen by its user
    before, recorded = modes(pipeline.unet), []
    assert len({*before}) == 2

    def callback(pipe, i, t, tensors):
        recorded.append(any(modes(pipe.unet)))

    assert torch.equal(pipeline(2, seeded(), 4, "latent", callback_on_step_end=callback).images, expected)
    assert modes(pipeline.unet) == before and not any(recorded)
    a = torch.zeros(2, 1, 8, 8)
    pipeline.interpolate(a, a, [0.5], 500, num_inference_steps=4)
    assert modes(pipeline.unet) == before

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline(2, num_inference_steps=4, callback_on_step_end=stop)
    assert modes(pipeline.unet) == before
    predictions = []
    for _, _, x_start in pipeline.progressive(2, seeded(), 4):
        assert modes(pipeline.unet) == before  # the caller's between two steps: the generator may never be exhausted
        predictions.append(x_start)
    assert torch.equal(predictions[-1], expected)


def test_threads_restore_the_mode_once_all_have_ended(make_pipeline):
    pipeline = make_pipeline(dropout=0.5)
    expected = pipeline(2, seeded(), 5, "latent").images
    pipeline.unet.train()
    first_may_end, second_began = threading.Event(), threading.Event()
    images = {}

    def wait(pipe, i, t, tensors):
        second_began.set()
        first_may_end.wait(30)

    def second():
        images["second"] = pipeline(2, seeded(), 5, "latent", callback_on_step_end=wait).images

    thread = threading.Thread(target=second)
    thread.start()
    second_began.wait(30)
    images["first"] = pipeline(2, seeded(), 5, "latent").images  # ends while the second is at its first step
    assert not any(modes(pipeline.unet))
    first_may_end.set()
    thread.join()
    assert all(modes(pipeline.unet))
    assert torch.equal(images["first"], expected) and torch.equal(images["second"], expected)


# outputs


def test_numpy_and_latents_as_diffusers_calls_them(make_pipeline):
    pipeline = make_pipeline()
    np.testing.assert_array_equal(
        pipeline(2, seeded(), 4, "numpy").images, pipeline(2, seeded(), 4, output_type="np").images
    )
    for name in "latents", "sample":

        def callback(pipe, i, t, tensors, name=name):
            assert [*tensors] == [name]
            return {name: torch.zeros_like(tensors[name])}

        images = pipeline(
            2,
            num_inference_steps=3,
            output_type="latent",
            callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=[name],
        ).images
        assert not images.any()

        def in_place_of_one(pipe, i, t, tensors, name=name):
            assert {*tensors} == {"sample", "latents"}  # by default
            tensors[name] = torch.zeros_like(tensors[name])
            return tensors

        images = pipeline(2, num_inference_steps=3, output_type="latent", callback_on_step_end=in_place_of_one).images
        assert not images.any()


def test_continuous_time_keeps_its_own_steps():
    scheduler = VPSDEScheduler(num_train_timesteps=20)
    pipeline = exact_pipeline()
    pipeline.scheduler = scheduler
    assert len(visited(pipeline)) == 20
