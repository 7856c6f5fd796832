"""What a launcher asks for, and what this machine and this loop can follow; what compiling changes, and what not."""

import copy
import multiprocessing
import os
import signal
import time

import pytest
import torch
from accelerate.state import AcceleratorState

from ddpm_hf import DDPMUNet, DiffusionObjective, VariationalDDPMScheduler
from ddpm_hf.fast.dropout import FastDropout
from ddpm_hf.fast.winograd import WinogradConv2d
from ddpm_hf.training.config import ConfigError, TrainConfig
from ddpm_hf.training.devices import channels_last, compile_network, is_compiled, open_accelerator
from ddpm_hf.training.interrupts import Stopped, ignore_interrupts
from ddpm_hf.training.launch import run

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
        ({"CUDA_VISIBLE_DEVICES": "0"}, r"asks for GPUs \(0\), torch finds none; run `accelerate config` again"),
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
    assert not is_compiled(TrainConfig())
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    assert not is_compiled(TrainConfig()) and is_compiled(TrainConfig(compile=True))
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    assert is_compiled(TrainConfig())


def test_the_layout(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "")
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert not channels_last(TrainConfig(), cpu) and channels_last(TrainConfig(compile=True), cpu)
    assert not channels_last(TrainConfig(compile=True), gpu) and channels_last(TrainConfig(mixed_precision="bf16"), gpu)
    assert channels_last(TrainConfig(channels_last="true"), cpu)
    assert not channels_last(TrainConfig(channels_last="false", compile=True), cpu)


@pytest.mark.parametrize("error", [Stopped("that is all"), ConfigError("no"), KeyboardInterrupt()])
def test_readers_end_with_the_run(error):
    """Also one that waits for something, and ignores the signals of its group of processes."""
    receive, send = multiprocessing.Pipe(duplex=False)

    def read():
        ignore_interrupts(0)
        send.send("ready")
        time.sleep(60)

    def train(config):
        reader.start()
        receive.recv()
        os.kill(reader.pid, signal.SIGTERM)
        reader.join(0.2)
        assert reader.is_alive()
        raise error

    reader = multiprocessing.get_context("fork").Process(target=read, daemon=True)
    with pytest.raises(SystemExit):
        run(train, TrainConfig())
    reader.join(5)
    assert reader.exitcode == -signal.SIGKILL


# the compiled network


def gradients(unet, channels_last=False):
    """Losses and gradients of a batch."""
    if channels_last:
        unet.to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(0)
    x_start, noise = (torch.randn(4, 1, 16, 16, generator=generator) for _ in range(2))
    losses = DiffusionObjective(VariationalDDPMScheduler())(unet, x_start, None, torch.tensor([0, 3, 500, 999]), noise)
    losses.mean().backward()
    return losses.detach(), torch.cat([p.grad.flatten() for p in unet.parameters()])


@pytest.mark.slow
def test_a_compiled_network_keeps_losses_and_gradients():
    torch.compiler.reset()
    config = TrainConfig(compile=True)
    torch.manual_seed(0)
    one = dict(
        down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"], block_out_channels=[128], layers_per_block=1
    )
    unet = DDPMUNet(16, 1, 1, **one, mid_block_type=None, norm_num_groups=8)
    unet.reset_parameters("torch")
    fast = copy.deepcopy(unet)
    compile_network(fast, config, torch.device("cpu"))
    assert list(fast.state_dict()) == list(unet.state_dict())
    assert any(type(module) is WinogradConv2d for module in fast.modules())
    expected, actual = gradients(unet), gradients(fast, channels_last(config, torch.device("cpu")))
    torch.testing.assert_close(actual[0], expected[0], atol=1e-5, rtol=1e-5)
    assert (actual[1] - expected[1]).norm() < 1e-5 * expected[1].norm()


@pytest.mark.slow
@pytest.mark.parametrize("channels, checkpointing", [(16, True), (128, False)])
def test_dropout_compiled(channels, checkpointing):
    """The masks of the way back are those of the way there."""
    torch.manual_seed(0)
    one = dict(
        down_block_types=["DownBlock2D"],
        up_block_types=["UpBlock2D"],
        block_out_channels=[channels],
        layers_per_block=1,
    )
    unet = DDPMUNet(16, 1, 1, **one, mid_block_type=None, norm_num_groups=8, dropout=0.5)
    unet.reset_parameters("torch")
    if checkpointing:
        unet.enable_gradient_checkpointing()
    compile_network(unet, TrainConfig(compile=True), torch.device("cpu"))
    torch.manual_seed(1)
    _, gradient = gradients(unet)
    step, ends = 0.02 * gradient / gradient.norm(), []
    weights = torch.nn.utils.parameters_to_vector(unet.parameters()).detach()
    for sign in (1, -1):
        torch.nn.utils.vector_to_parameters(weights + sign * step, unet.parameters())
        unet.zero_grad()
        torch.manual_seed(1)
        ends.append(gradients(unet)[0].double().mean())
    slope = (ends[0] - ends[1]) / 0.04
    torch.testing.assert_close(slope, gradient.norm().double(), rtol=0.02, atol=0)


def test_tiles_are_for_float32():
    unet = DDPMUNet(16, 1, 1, block_out_channels=(128,) * 4, norm_num_groups=8, layers_per_block=1)
    compile_network(unet, TrainConfig(mixed_precision="bf16"), torch.device("cpu"))
    assert not any(isinstance(module, WinogradConv2d) for module in unet.modules())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dropout_of_a_compiled_network(layout):
    dropout, x = FastDropout(0.1), torch.rand(7, 3, 41, 53).add(1).to(memory_format=layout).requires_grad_()
    y = dropout(x)
    y.sum().backward()
    kept, count = (y != 0), x.numel()
    p = round(0.1 * 2**16) / 2**16
    torch.testing.assert_close(y, torch.where(kept, x / (1 - p), 0.0))
    torch.testing.assert_close(x.grad, kept / (1 - p))
    assert abs(kept.double().mean() - (1 - p)) < 5 * (p * (1 - p) / count) ** 0.5
    # neighbours are independent, also the four that come of one draw
    flat = kept.detach().permute(0, 2, 3, 1).flatten() if layout is torch.channels_last else kept.flatten()
    for distance in (1, 2, 3, 4):
        both = (flat[distance:] & flat[:-distance]).double().mean()
        assert abs(both - (1 - p) ** 2) < 6 * (p * (1 - p) / count) ** 0.5
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(dropout(x))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


def test_dropout_at_its_ends():
    x = torch.randn(3, 5)[:, ::2]
    assert torch.equal(FastDropout(0.0)(x), x) and torch.equal(FastDropout(1.0)(x), torch.zeros_like(x))
    assert torch.equal(FastDropout(0.5).eval()(x), x) and FastDropout(0.5)(x).shape == x.shape
    half = FastDropout(0.5)(torch.ones(1000, 9)[:, :5])
    assert set(half.flatten().tolist()) == {0.0, 2.0} and 0.4 < (half == 0).float().mean() < 0.6
