"""What networks are told with `rescale_timesteps`: t * 1000 / T, at every call of a network in the package."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from ddpm_hf import DDPMImagePipeline, DDPMUNet, NoisyClassifier, VariationalDDPMScheduler, VPSDEScheduler
from ddpm_hf.likelihood import bits_per_dim, decode, encode, estimate_bits_per_dim, ode_bits_per_dim, progressive_coding
from ddpm_hf.schedulers import ChainSDE, SubVPSDEScheduler, conditioning_times
from ddpm_hf.training.classifier import ClassifierTask, held_out_accuracy
from ddpm_hf.training.losses import DiffusionObjective
from ddpm_hf.training.timesteps import UniformTimesteps
from support.networks import small_classifier, small_unet

T = 4000  # of IDDPM's published networks: they are told t / 4, which is exact


class RecordingUNet(DDPMUNet):
    def forward(self, sample, timestep, *args, **kwargs):
        self.told.append(torch.as_tensor(timestep))
        return super().forward(sample, 0 * timestep, *args, **kwargs)


class RecordingClassifier(NoisyClassifier):
    def forward(self, sample, timestep):
        self.told.append(torch.as_tensor(timestep))
        return super().forward(sample, 0 * timestep)


def process(rescale, **config):
    return VariationalDDPMScheduler(
        **{"num_train_timesteps": T, "beta_schedule": "cosine"} | config, rescale_timesteps=rescale
    )


def network(cls=RecordingUNet, make=small_unet, **config):
    torch.manual_seed(0)
    made = make(cls, **config)
    made.told = []
    return made


def generator():
    return torch.Generator().manual_seed(0)


def told_by(call, **config):
    """What a network that ignores it is told with rescaling and without, each concatenated, and the two results."""
    told, results = [], []
    for rescale in (True, False):
        torch.manual_seed(1)
        unet = network(out_channels=2 if "variance_type" in config else 1)
        results.append(call(unet, process(rescale, **config)))
        told.append(torch.cat([t.reshape(-1).double() for t in unet.told]))
    return *told, *results


X = torch.randint(0, 256, (2, 1, 8, 8), generator=torch.Generator().manual_seed(3)) / 127.5 - 1


def short(scheduler):
    scheduler.set_timesteps(timesteps=[3999, 3001, 2222, 1200, 707, 300, 101, 51, 20, 10, 3, 1])
    return scheduler


CALLS = {
    "bits_per_dim": lambda unet, s: bits_per_dim(unet, short(s), X, generator=generator()).total,
    "bits_per_dim in rows": lambda unet, s: bits_per_dim(unet, short(s), X, generator=generator(), batch_size=8).total,
    "progressive_coding": lambda unet, s: progressive_coding(unet, short(s), X, generator=generator()).total,
    "estimate": lambda unet, s: estimate_bits_per_dim(unet, s, X, num_evaluations=12, generator=generator()).total,
    "ode": lambda unet, s: ode_bits_per_dim(unet, s, X, generator=generator(), rtol=0.1, atol=0.1).total,
    "encode": lambda unet, s: encode(unet, s, X, rtol=0.1, atol=0.1).sample,
    "decode": lambda unet, s: decode(unet, s, X, rtol=0.1, atol=0.1).sample,
    "encode by DDIM": lambda unet, s: encode(unet, s, X, num_inference_steps=7).sample,
    "decode by DDIM": lambda unet, s: decode(unet, s, X, num_inference_steps=7).sample,
    "loss": lambda unet, s: DiffusionObjective(s)(unet, X, t=torch.tensor([3999, 1]), noise=0.3 * X),
    "vlb": lambda unet, s: DiffusionObjective(s, "vlb")(unet, X, t=torch.tensor([3998, 6]), noise=0.3 * X),
}


@pytest.mark.parametrize("name", CALLS)
def test_likelihoods_and_losses(name):
    told, plain, result, expected = told_by(CALLS[name])
    torch.testing.assert_close(told, plain / 4, rtol=1e-6, atol=1e-6)  # the ODE's are float32
    assert plain.max() > 3000 and told.max() < 1000 and len(told) > 1
    torch.testing.assert_close(result, expected, rtol=0, atol=0)  # nothing else differs


def test_hybrid_loss():
    call = lambda unet, s: DiffusionObjective(s, "hybrid")(unet, X, t=torch.tensor([77, 2]))  # noqa: E731
    told, plain, *_ = told_by(call, variance_type="learned_range")
    assert told.tolist() == [19.25, 0.5] and plain.tolist() == [77, 2]


def drawn(unet, scheduler, classifier=None, **kwargs):
    """Samples, and the timesteps of the scheduler."""
    pipe, timesteps = DDPMImagePipeline(unet, scheduler, classifier), []
    pipe.set_progress_bar_config(disable=True)

    def record(pipe, index, t, tensors):
        timesteps.append(t)
        return {}

    images = pipe(2, generator(), 6, "latent", callback_on_step_end=record, **kwargs).images
    return images, torch.stack(timesteps)


SAMPLERS = {
    "ancestral": (None, {}),
    "ddim": (None, {"eta": 0.0}),
    "diffusers' DDPM": (DDPMScheduler, {}),
    "diffusers' DDIM": (DDIMScheduler, {}),
    "dpm-solver++": (DPMSolverMultistepScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampling(name):
    cls, kwargs = SAMPLERS[name]
    images = {}
    for rescale in (True, False):
        unet, scheduler = network(), process(rescale)
        scheduler = scheduler if cls is None else cls.from_config(scheduler.config)
        assert scheduler.config["_ddpm_hf"].get("rescale_timesteps", False) == rescale
        images[rescale], timesteps = drawn(unet, scheduler, **kwargs)
        told, factor = torch.stack(unet.told), 0.25 if rescale else 1
        torch.testing.assert_close(told.double(), timesteps.double() * factor, rtol=0, atol=0)
        assert timesteps[0] > 3000 and (rescale or told.dtype == timesteps.dtype)
    torch.testing.assert_close(images[True], images[False], rtol=0, atol=0)


def test_the_optimized_network_is_told_the_same():
    unet, labeled = small_unet(), small_unet(num_class_embeds=3)
    for net, kwargs in ((unet, {}), (labeled, {"class_labels": [1, 2]})):
        pipe = DDPMImagePipeline(net, process(True))
        expected = drawn(net, pipe.scheduler, **kwargs)[0]
        pipe.optimize(compile=False)
        pipe.set_progress_bar_config(disable=True)
        images = pipe(2, generator(), 6, "latent", **kwargs).images
        torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-5)
        assert (drawn(net, process(False), **kwargs)[0] - expected).abs().max() > 1e-3


def test_other_ways_to_sample():
    unet = network()
    pipe = DDPMImagePipeline(unet, process(True))
    pipe.set_progress_bar_config(disable=True)
    ts = [t for t, *_ in pipe.progressive(1, generator(), 5)]
    assert [float(t) for t in unet.told] == [t / 4 for t in ts]
    unet.told.clear()
    pipe.interpolate(X, -X, [0.5], 2000, generator=generator(), num_inference_steps=5)
    assert [float(t) for t in unet.told] == [400.0, 200.0, 0.0]


@pytest.mark.parametrize("cls", [None, DPMSolverMultistepScheduler], ids=["ancestral", "dpm-solver++"])
def test_a_classifier_is_told_what_the_network_is(cls):
    for rescale, factor in ((True, 0.25), (False, 1)):
        scheduler = process(rescale)
        config = {"scheduler": dict(scheduler.config)}
        unet, classifier = network(), network(RecordingClassifier, small_classifier, **config)
        scheduler = scheduler if cls is None else cls.from_config(scheduler.config)
        _, timesteps = drawn(unet, scheduler, classifier, class_labels=1, classifier_scale=2.0)
        for told in (unet.told, classifier.told):
            assert [float(t) for t in told] == [float(t) * factor for t in timesteps]
        with pytest.raises(
            ValueError, match=f"was trained with rescale_timesteps={rescale}, the scheduler has {not rescale}"
        ):
            drawn(network(), process(not rescale), classifier, class_labels=1, classifier_scale=2.0)


def test_training_of_a_classifier():
    told, config = {}, SimpleNamespace(random_flip=False, random_crop=1, seed=0, batch_size=4)
    batch = {"pixels": torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "class_labels": torch.tensor([0, 1])}
    interrupts = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), run=lambda network, compute: [compute()])
    for rescale in (True, False):
        torch.manual_seed(0)
        classifier, scheduler = network(RecordingClassifier, small_classifier), process(rescale)
        task = SimpleNamespace(config=config, scheduler=scheduler, timesteps=UniformTimesteps(scheduler))
        ClassifierTask.loss(task, classifier, batch)
        held_out_accuracy(config, interrupts, classifier, scheduler, X, torch.tensor([0, 1]))
        told[rescale] = torch.cat([t.double() for t in classifier.told])
    torch.testing.assert_close(told[True], told[False] / 4, rtol=0, atol=0)
    assert len(told[True]) == 2 + 16 and told[False].max() > 2000


def test_in_continuous_time():
    """A scheduler of an SDE has the conditioning times as its timesteps, and its process inverts them."""
    linear = {"beta_schedule": "linear", "beta_end": 0.005}
    for cls, config in ((VPSDEScheduler, {}), (VPSDEScheduler, linear), (SubVPSDEScheduler, linear)):
        plain, rescaled = (cls.from_config(process(rescale, **config).config) for rescale in (False, True))
        unet = network()
        drawn(unet, rescaled)
        plain.set_timesteps(6), rescaled.set_timesteps(6)
        torch.testing.assert_close(rescaled.timesteps, plain.timesteps / 4)
        assert torch.equal(torch.stack(unet.told), rescaled.timesteps)
        assert (
            conditioning_times(rescaled, 5) == 5 and VPSDEScheduler.from_config(rescaled.config).sde.time_scale == 0.25
        )
        t = torch.linspace(0.1, 1, 9, dtype=torch.float64)
        torch.testing.assert_close(rescaled.sde.times(rescaled.sde.conditioning_times(t)), t)
        assert VariationalDDPMScheduler.from_config(rescaled.config).config["_ddpm_hf"]["rescale_timesteps"]
    sde = ChainSDE(process(True).alphas_cumprod, rescale_timesteps=True)
    k = torch.arange(T, dtype=torch.float64)
    torch.testing.assert_close(sde.conditioning_times((k + 1) / T), k / 4)


def test_one_number_many_and_none_to_wait_for():
    scheduler = process(True, num_train_timesteps=3000)
    assert conditioning_times(scheduler, 6) == 2 and conditioning_times(scheduler, torch.tensor(6)) == 2
    told = conditioning_times(scheduler, torch.tensor([0, 1, 2999]))
    torch.testing.assert_close(told, torch.tensor([0, 1, 2999]).float() * (1000.0 / 3000))  # IDDPM's words
    t = torch.tensor([3, 4])
    assert conditioning_times(process(False), t) is t and conditioning_times(DDPMScheduler(), t) is t
    with torch.device("meta"):  # reading a value would raise
        assert conditioning_times(scheduler, torch.zeros(2, dtype=torch.int64)).shape == (2,)


BETAS = {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3}


@pytest.mark.parametrize("config", [{}, {"beta_schedule": "linear"}, {"beta_schedule": "jsd"}, BETAS,
                                    {"rescale_betas_zero_snr": True, "timestep_spacing": "iddpm"}], ids=str)  # fmt: skip
def test_the_config_keeps_it(config, tmp_path):
    scheduler, plain = process(True, **config), process(False, **config)
    assert "rescale_timesteps" not in plain.config["_ddpm_hf"] and "rescale_timesteps" not in scheduler.config
    assert plain.to_json_string() == type(plain).from_config(scheduler.config, rescale_timesteps=False).to_json_string()
    scheduler.save_pretrained(tmp_path)
    for cls in (DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler):
        with pytest.raises(NotImplementedError, match="ddpm_hf.rescale_timesteps is not implemented for"):
            cls.from_pretrained(tmp_path)
        by_way = VariationalDDPMScheduler.from_config(cls.from_config(scheduler.config).config)
        torch.testing.assert_close(by_way.betas, scheduler.betas, rtol=1e-6, atol=0)
        assert by_way.config["_ddpm_hf"]["rescale_timesteps"] is True
    opened = VariationalDDPMScheduler.from_pretrained(tmp_path)
    assert torch.equal(opened.betas, scheduler.betas) and opened.to_json_string() == scheduler.to_json_string()
    assert opened.config["_ddpm_hf"] == scheduler.config["_ddpm_hf"]
