"""Every argument of our classes, every key of a run, with every kind of value: it works, or one line says what is allowed."""

import functools
import inspect
import math

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf import (
    ContinuousTimes,
    DDPMSuperResolutionPipeline,
    DDPMUNet,
    DiffusionObjective,
    LossSecondMomentTimesteps,
    NoisyClassifier,
    ScoreObjective,
    SubVPSDEScheduler,
    VariationalDDPMScheduler,
    VESDEScheduler,
    VPSDEScheduler,
)
from ddpm_hf.training.command_line import load_config
from ddpm_hf.training.config import ClassifierConfig, TrainConfig, keys_of
from ddpm_hf.training.diffusion import DiffusionTask
from ddpm_hf.training.loop import TASKS
from ddpm_hf.training.resolve import resolve

DEEP = []
for _ in range(5000):
    DEEP = [DEEP]
NUMBERS = [-1, 0, 1, 3, 1e30, 1e-30, 10**30, 10**400, 0.5, 1.5, math.nan, math.inf, 100_001]
OTHERS = [None, True, "never", "", "1e3", "x" * 1000, b"x", object(), 1 + 2j, {}, {"a": 1}, np.int64(3)]
LISTS = [[], [0], [4, 4], [1, 2, 3], [[1]], [10**30] * 2, [math.nan], [True], ["x"], np.ones(2), np.array("a"), DEEP]
VALUES = [*NUMBERS, *OTHERS, *LISTS, [8] * 100_000]

BLOCKS = dict(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4)
NETWORK = dict(BLOCKS, sample_size=8, in_channels=1, out_channels=1)
NETWORK |= dict(down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))
TABLES = dict(NETWORK, time_embedding_type="learned", num_train_timesteps=10, num_class_embeds=3)
CLASSIFIER = dict(BLOCKS, sample_size=8, in_channels=1, num_classes=3)
CLASSIFIER |= dict(down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"))


def run_network(kind, arguments):
    """One call; of large networks none."""
    with torch.device("meta"):
        network = kind(**arguments)
    config = network.config
    if network.num_parameters() > 1e6 or config.sample_size not in (None, 8):
        return
    network = kind(**arguments).eval()
    network.reset_parameters("torch")
    x, t = torch.randn(2, config.in_channels, 8, 8), torch.tensor([0, 0])
    labels = {}
    if getattr(network, "class_embedding", None) is not None:
        labels = dict(class_labels=torch.tensor([0, 0]))
        if config.class_embed_type == "identity":
            labels = dict(class_labels=torch.randn(2, network.time_embedding.linear_2.out_features))
    if getattr(config, "time_embedding_type", None) == "fourier":
        t = torch.tensor([0.5, 3.0])
    with torch.no_grad():
        y = network(x, t, **labels)
    yield y if kind is NoisyClassifier else y.sample


def run_scheduler(kind, arguments):
    scheduler = kind(**arguments)
    scheduler.to_json_string()
    T = scheduler.config.num_train_timesteps
    x_start, noise = torch.rand(2, 1, 4, 4) * 2 - 1, torch.randn(2, 1, 4, 4)
    output = torch.randn(2, 1 + scheduler.variance_type.startswith("learned"), 4, 4)
    for steps in {T, max(1, T // 2)}:
        scheduler.set_timesteps(steps)
        for t in {scheduler.timesteps[i].item() for i in (0, steps // 2, -1)}:
            x_t = scheduler.q_sample(x_start, t, noise)
            yield scheduler.vlb_term(output, x_start, x_t, t)
            yield scheduler.reverse_step(output, t, x_t).prev_sample
            for eta in None, 0.0:
                yield from scheduler.step(output, t, x_t, eta=eta, return_dict=False)


def run_sde(kind, arguments):
    scheduler = kind(**arguments)
    scheduler.to_json_string()
    if scheduler.config.num_train_timesteps == 1:
        return  # has no two different times
    scheduler.set_timesteps(20)
    x = torch.randn(2, 1, 4, 4) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = torch.randn(2, 1, 4, 4)
        if scheduler.sde.prediction_type == "score":
            output /= scheduler.sde.std(scheduler.sde.times(t)).item()
        if scheduler.config.correct_steps:
            x = scheduler.step_correct(output, t, x)
        x, x_start = scheduler.step(output, t, x, return_dict=False)
        yield from (x, x_start)
    yield from ContinuousTimes(scheduler.sde, importance=True).sample(3)


def run_objective(kind, arguments):
    objective = kind(VariationalDDPMScheduler(5, variance_type="learned_range"), **arguments)
    yield objective(lambda x, t, **_: (torch.cat((x, x), 1),), torch.zeros(2, 1, 4, 4))


def run_timesteps(kind, arguments):
    timesteps = kind(VariationalDDPMScheduler(5), **arguments)
    timesteps.update(torch.tensor([0, 1]), torch.ones(2))
    yield from timesteps.sample(3)


@functools.cache
def parts_of_an_upsampler():
    return DDPMUNet(**NETWORK | dict(in_channels=3)), VariationalDDPMScheduler(2)


def run_upsampler(kind, arguments):
    kind(*parts_of_an_upsampler(), **arguments)
    yield torch.zeros(1)


def run_score(kind, arguments):
    kind(VPSDEScheduler().sde, **arguments)
    yield torch.zeros(1)


CASES = [
    (DDPMUNet, run_network, NETWORK, None),
    (DDPMUNet, run_network, TABLES, ("num_train_timesteps", "num_class_embeds", "class_embed_type")),
    (NoisyClassifier, run_network, CLASSIFIER, None),
    *((VariationalDDPMScheduler, run_scheduler, dict(num_train_timesteps=6, prediction_type=prediction_type), None)
      for prediction_type in ("epsilon", "previous")),
    *((kind, run_sde, {}, None) for kind in (VPSDEScheduler, SubVPSDEScheduler, VESDEScheduler)),
    (DiffusionObjective, run_objective, dict(loss="hybrid"), ("loss", "vlb_weight", "weighting")),
    (LossSecondMomentTimesteps, run_timesteps, {}, ("history_per_timestep", "uniform_probability")),
    (DDPMSuperResolutionPipeline, run_upsampler, dict(conditioning_noise=0.5), ("low_resolution", "conditioning_noise")),
    (ScoreObjective, run_score, {}, ("weighting",)),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "run", "base", "keys"), CASES, ids=[entry[0].__name__ for entry in CASES])
def test_every_argument(kind, run, base, keys):
    parameters = list(inspect.signature(kind.__init__).parameters)[1:]
    faults = []
    for key in keys or parameters:
        for value in VALUES:
            try:
                finite = all(torch.as_tensor(entry).isfinite().all() for entry in run(kind, {**base, key: value}))
            except ValueError as error:
                message = str(error)
                if key not in message or "\n" in message or len(message) > 400:
                    faults.append(f"{key}={type(value)}: {message[:400]}")
            else:
                if not finite:
                    faults.append(f"{key}={value} gives values that are not finite")
    assert not faults, "\n".join(faults)


KINDS = (DDPMUNet, NoisyClassifier, VariationalDDPMScheduler, VPSDEScheduler, VESDEScheduler)


@pytest.mark.parametrize("kind", KINDS, ids=[kind.__name__ for kind in KINDS])
def test_every_argument_has_a_type_and_every_number_a_range(kind):
    for name, parameter in list(inspect.signature(kind.__init__).parameters.items())[1:]:
        with pytest.raises(ValueError, match=f"^{name}=.* (must be|is not known)"):
            kind.__init__.check({name: object()})
        annotation = str(parameter.annotation)
        if ("int" in annotation or "float" in annotation) and name != "trained_betas":  # which names the timestep
            with pytest.raises(ValueError, match=rf"^{name}=.* in [\[(].*[\])]"):
                kind.__init__.check({name: 1e300})


TEXTS = ["null", "0", "-1", ".nan", "1" * 400, "[[1]]", "x" * 300]
RUN = """
data: digits
image_size: 8
steps: 2
{part}: {{block_out_channels: [4], layers_per_block: 1, norm_num_groups: 4, down_block_types: [DownBlock2D], {more}}}
scheduler: {{num_train_timesteps: 10, levels: 17}}
"""


@pytest.mark.parametrize(
    ("kind", "network", "process", "more"),
    [
        (
            TrainConfig,
            DDPMUNet,
            VariationalDDPMScheduler,
            "up_block_types: [UpBlock2D], attention_head_dim: 4",
        ),
        (ClassifierConfig, NoisyClassifier, None, "num_classes: 10, attention_head_dim: 4"),
    ],
)
def test_every_key_of_a_run(kind, network, process, more, tmp_path, hub):
    """Before anything slow, as --dry_run does."""
    base = tmp_path / "base.yaml"
    base.write_text(RUN.format(part=kind.NETWORK, more=more))
    keys = [field.name for field in keys_of(kind)]
    for part, cls in ((kind.NETWORK, network), ("scheduler", process)):
        keys += [f"{part}.{name}" for name in list(inspect.signature(cls.__init__).parameters)[1:]] if cls else []
    faults = []
    for key in keys:
        for text in TEXTS:
            argv = ["--config", str(base), "--output_dir", str(tmp_path / "run"), f"--{key}", text]
            try:
                with torch.device("meta"):
                    TASKS[kind](resolve(load_config(argv, kind)[0]))
            except ValueError as error:
                message = str(error)
                if key.rpartition(".")[2] not in message or "\n" in message or len(message) > 400:
                    faults.append(f"--{key} {text[:9]}: {message[:400]}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("text", ["-1", "[[1]]"])
def test_keys_of_a_network_that_is_to_fit_the_data(text, tmp_path):
    """The rest of it follows from the pictures: its keys are checked before."""
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        Image.new("L", (8, 8), i).save(tmp_path / f"pictures/{i}.png")
    for key in ("block_out_channels", "down_block_types", "up_block_types", "layers_per_block"):
        argv = ["--data", str(tmp_path / "pictures"), "--output_dir", str(tmp_path / "run"), f"--unet.{key}", text]
        with pytest.raises(ValueError, match=f"^unet.{key}=.* must be"), torch.device("meta"):
            DiffusionTask(resolve(load_config(argv)[0]))
