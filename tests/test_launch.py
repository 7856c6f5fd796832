"""What a launcher asks for, and what this machine and this loop can follow."""

import pytest
import torch
from accelerate.state import AcceleratorState
from launch import channels_last, compiled, open_accelerator

from config import ConfigError, TrainConfig

pytestmark = pytest.mark.skipif(torch.accelerator.is_available(), reason="of a machine without a GPU")


@pytest.fixture(autouse=True)
def _new_process():
    """As far as accelerate knows: it keeps what it found of the first one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)


LAUNCHED = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "False", "ACCELERATE_DYNAMO_BACKEND": "NO"}


def launch(monkeypatch, config=TrainConfig(), **environment):  # noqa: B008
    for name in ("MASTER_ADDR", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return open_accelerator(config)


def test_what_accelerate_launches_here(monkeypatch, capsys):
    for environment in (
        {},
        {"CUDA_VISIBLE_DEVICES": "-1"},
        {"CUDA_VISIBLE_DEVICES": "NoDevFiles"},
        {"WORLD_SIZE": ""},
    ):
        assert launch(monkeypatch, **LAUNCHED | environment).device.type == "cpu"
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "asks for FSDP, which divides the network .* MULTI_GPU"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "asks for DEEPSPEED"),
        ({"CUDA_VISIBLE_DEVICES": "0"}, r"asks for GPUs \(0\), torch finds none; run `accelerate config` anew"),
        ({"WORLD_SIZE": "2"}, r"asks for GPUs \(all\), torch finds none"),
    ],
)
def test_what_is_not_there(monkeypatch, environment, message):
    with pytest.raises(ConfigError, match=message) as caught:
        launch(monkeypatch, **LAUNCHED | environment)
    assert "\n" not in str(caught.value)


def test_fewer_processes_than_asked_for(monkeypatch, capsys):
    """As `accelerate launch --cpu --num_processes 2` starts one."""
    launch(monkeypatch, **LAUNCHED | {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"})
    assert "several processes were asked for, one was started; on the CPU it is torchrun" in capsys.readouterr().err


def test_the_config_decides_the_precision(monkeypatch, capsys):
    accelerator = launch(monkeypatch, **LAUNCHED | {"ACCELERATE_MIXED_PRECISION": "bf16"})
    assert accelerator.mixed_precision == "no" and "--mixed_precision bf16 to have that" in capsys.readouterr().err

    AcceleratorState._reset_state(reset_partial_state=True)
    assert launch(monkeypatch, TrainConfig(mixed_precision="bf16")).mixed_precision == "bf16"
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ConfigError, match="mixed_precision='fp16' is not for the cpu; take bf16 or no"):
        launch(monkeypatch, TrainConfig(mixed_precision="fp16"))


def test_who_compiles(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "")
    assert not compiled(TrainConfig())
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    assert not compiled(TrainConfig()) and compiled(TrainConfig(compile=True))
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    assert compiled(TrainConfig())


def test_the_layout(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "")
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert not channels_last(TrainConfig(), cpu) and channels_last(TrainConfig(compile=True), cpu)
    assert not channels_last(TrainConfig(compile=True), gpu) and channels_last(TrainConfig(mixed_precision="bf16"), gpu)
    assert channels_last(TrainConfig(channels_last="true"), cpu)
    assert not channels_last(TrainConfig(channels_last="false", compile=True), cpu)
