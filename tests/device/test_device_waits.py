"""How often the host waits for the device: never in a training step, and never in a sampling step.

The simulated accelerator counts: it sees every copy and every look at a value. What a longer run has more of than a shorter one
is compared, so that what happens once does not count.
"""

import os
from collections import Counter

import pytest
import torch

from ddpm_hf import DDPMImagePipeline, VariationalDDPMScheduler, VPSDEScheduler, bits_per_dim
from ddpm_hf.evaluation import animate
from ddpm_hf.schedulers.sde import VPSDE, ChainSDE
from ddpm_hf.training.losses import ContinuousBoundObjective, DiffusionObjective, ScoreObjective
from ddpm_hf.training.noise_schedule import LearnedNoiseSchedule
from ddpm_hf.training.timesteps import (
    ContinuousTimes,
    FractionalTimesteps,
    LossSecondMomentTimesteps,
    LowDiscrepancyTimesteps,
)
from support.networks import small_classifier
from support.scripts import script

pytestmark = pytest.mark.skipif(
    "SIMULATED_ACCELERATOR" not in os.environ, reason="counted by the simulated accelerator"
)


def waits(function) -> Counter:
    from support.simulated_accelerator import count_waits

    with count_waits() as counted:
        function()
    return Counter(counted)


def waits_of_more(run, few: int, many: int) -> dict:
    """Waits of run(many) that run(few) has not, by reason and line; what is made once is made before."""
    run(few)
    return dict(waits(lambda: run(many)) - waits(lambda: run(few)))


NETWORK = ["--unet.block_out_channels", "[8, 16]", "--unet.norm_num_groups", "4", "--unet.attention_head_dim", "8"]
CLASSIFIER = ["--classifier.block_out_channels", "[8, 16]", "--classifier.norm_num_groups", "4"]
CLASSIFIER += ["--classifier.attention_head_dim", "8", "--classifier.layers_per_block", "1"]
RUNS = {
    "ddpm": ("train.py", *NETWORK),
    "fp16": ("train.py", *NETWORK, "--mixed_precision", "fp16"),
    "classes": ("train.py", "--config", "digits-classes", *NETWORK),
    "importance": ("train.py", *NETWORK, "--loss", "vlb", "--timesteps", "loss_second_moment"),
    "continuous": ("train.py", "--config", "digits-vp", *NETWORK, "--timesteps", "importance"),
    "classifier": ("train_classifier.py", *CLASSIFIER),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_training_step_waits_for_nothing(device, tmp_path, fresh_accelerate, name):
    """But on Apple's GPUs for the batch, which torch cannot copy otherwise, and for the bound: float64 is on the CPU alone."""
    program, *arguments = RUNS[name]
    always = dict(batch_size=16, log_every=100, eval_every=0, checkpoint_every=0, random_flip="true")
    always |= {} if name == "classifier" else {"sample_every": 0}
    arguments += [word for key, value in always.items() for word in (f"--{key}", value)]

    def run(steps):
        fresh_accelerate()
        folder = tmp_path / f"{steps}-{len(list(tmp_path.iterdir()))}"
        script(program, *arguments, "--steps", steps, "--output_dir", folder)

    more = waits_of_more(run, 6, 9)
    copied = {"classes": 2, "classifier": 2, "importance": 6}.get(name, 1) if device.type == "mps" else 0
    assert sum(more.values()) == 3 * copied, more


@pytest.mark.parametrize(
    "kind", ["ddpm", "ddim", "learned", "guided", "classifier", "continuous", "optimized", "rescaled"]
)
def test_a_sampling_step_waits_for_nothing(device, unet, kind):
    variance_type = "learned_range" if kind == "learned" else "fixed_large"
    scheduler = VariationalDDPMScheduler(100, variance_type=variance_type, rescale_timesteps=kind == "rescaled")
    config, call, classifier = {}, {}, None
    if kind == "learned":
        config = dict(out_channels=2)
    elif kind == "guided":
        config = dict(num_class_embeds=5, _ddpm_hf={"null_class": 4})
        call = dict(class_labels=1, guidance_scale=2.0)
    elif kind == "classifier":
        classifier = small_classifier(attention_head_dim=4, scheduler=dict(scheduler.config))
        call = dict(class_labels=1, classifier_scale=2.0)
    elif kind == "ddim":
        call = dict(eta=0.0)
    elif kind == "continuous":
        scheduler = VPSDEScheduler(correct_steps=1)
    pipeline = DDPMImagePipeline(unet(**config), scheduler, classifier).to(device)
    pipeline.set_progress_bar_config(disable=True)
    if kind == "optimized":
        pipeline.optimize(compile=False)

    def run(steps, source=device):
        pipeline(2, torch.Generator(source).manual_seed(0), steps, "latent", **call)

    more = waits_of_more(run, 10, 20)
    assert not more, more
    if kind == "ddpm":  # noise of a generator of the CPU is copied, once a step
        assert sum(waits_of_more(lambda steps: run(steps, "cpu"), 10, 20).values()) == 10


def test_what_samplers_of_timesteps_and_losses_wait_for(device, unet):
    scheduler, network = VariationalDDPMScheduler(10), unet().to(device)
    x_start, losses = torch.zeros(4, 1, 8, 8, device=device), torch.ones(4, device=device)
    learned = LossSecondMomentTimesteps(scheduler, history_per_timestep=1)
    times = [ContinuousTimes(VPSDE(), importance) for importance in (False, True)]
    times += [ContinuousTimes(VPSDE(), low_discrepancy=True), LowDiscrepancyTimesteps(scheduler)]
    objectives = [ScoreObjective(sde) for sde in (VPSDE(), ChainSDE(scheduler.alphas_cumprod))]
    rescaled = DiffusionObjective(VariationalDDPMScheduler(10, rescale_timesteps=True))

    schedule = LearnedNoiseSchedule(10).to(device)
    bound = DiffusionObjective(VariationalDDPMScheduler(10), "vlb", noise_schedule=schedule)
    bounds = [(bound, LowDiscrepancyTimesteps(scheduler))]
    bounds.append((ContinuousBoundObjective(scheduler, schedule), FractionalTimesteps(scheduler, low_discrepancy=True)))
    if torch.device(device).type == "mps":  # the decoder's float64 is the CPU's
        bounds.clear()

    def step():
        t, _ = learned.sample(4, device)
        learned.update(t, losses)
        rescaled(network, x_start, t=t)
        for sampler in times:
            t, _ = sampler.sample(4, device)
        for objective in objectives:
            objective(network, x_start, t=t.clamp(min=0.1))
        for objective, sampler in bounds:
            t, _ = sampler.sample(4, device)
            objective(network, x_start, t=t).mean().backward()

    step()  # tables are moved once
    assert not waits(step), waits(step)


def test_the_bound_waits_seldom(device, unet):
    """Once in 50 terms it looks whether they are finite."""
    network, x_start = unet().to(device), -torch.ones(2, 1, 8, 8, device=device)

    def run(steps):
        scheduler = VariationalDDPMScheduler(steps)
        bits_per_dim(network, scheduler, x_start, generator=torch.Generator(device).manual_seed(0))

    more = waits_of_more(run, 200, 400)
    assert sum(more.values()) == 4, more


def test_an_animation_waits_for_the_frames_that_it_shows(device, unet):
    """Twice as many steps take the frames of one more thinning: half of them, with two pictures each."""
    pipeline = DDPMImagePipeline(unet(), VariationalDDPMScheduler()).to(device)
    pipeline.set_progress_bar_config(disable=True)
    more = waits_of_more(
        lambda steps: animate(pipeline.progressive(2, num_inference_steps=steps), None, max_frames=8), 28, 56
    )
    assert sum(more.values()) == 2 * 4, more
