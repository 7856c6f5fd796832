"""Runs that are interrupted, that diverge, and that cannot write."""

import contextlib
import copy
import json
import math
import os
import resource
import signal
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from ddpm_hf import DDPMUNet
from ddpm_hf.training import train
from ddpm_hf.training.command_line import load_config
from ddpm_hf.training.config import ConfigError
from ddpm_hf.training.environment import environment
from ddpm_hf.training.finite_steps import FiniteSteps
from ddpm_hf.training.interrupts import Interrupted, Interrupts, Stopped
from ddpm_hf.training.messages import warn_on_write_error
from ddpm_hf.training.resume import checkpoints_in
from support.scripts import script
from support.signals import Trigger

RUN = (
    "--steps 6 --batch_size 16 --sample_every 0 --sample_steps 3 --log_every 1 --lr_warmup_steps 0 --checkpoint_every 2 "
    "--lr_schedule constant --unet.block_out_channels [8,16] --unet.norm_num_groups 4 --unet.attention_head_dim 8"
)


def test_a_step_without_a_finite_gradient_changes_nothing():
    weights = torch.nn.Parameter(torch.ones(3))
    optimizer, finite = torch.optim.AdamW([weights], 0.1, fused=True), FiniteSteps(torch.device("cpu"), 3)
    before, rows = [], []
    for value in (1.0, 2.0, math.nan, math.inf, 1.0, math.nan):
        weights.grad = torch.tensor([0.5, value, 0.5])
        finite.check(weights.grad.norm(), optimizer)
        state = copy.deepcopy((weights.data, optimizer.state_dict()["state"]))
        optimizer.step()
        same = torch.equal(weights, state[0])
        before.append(same)
        if same:
            torch.testing.assert_close(optimizer.state_dict()["state"], state[1], rtol=0, atol=0)
        rows.append((int(finite.skipped), int(finite.in_a_row)))
    assert before == [False, False, True, True, False, True]
    assert rows == [(0, 0), (0, 0), (1, 1), (2, 2), (2, 0), (3, 1)]
    assert optimizer.state[weights]["step"] == 3
    other = FiniteSteps(torch.device("cpu"), 3)
    other.load_state_dict(finite.state_dict())
    assert (other.skipped, other.in_a_row) == (3, 1)


def test_a_run_that_is_lost_stops_and_says_where(tmp_path):
    result = script(
        "train.py", *RUN.split(), "--learning_rate", "1e30", "--steps", 40, "--max_steps_skipped", 5, "--checkpoint_every", 3,
        "--output_dir", tmp_path, check=False,
    )  # fmt: skip
    last = result.stderr.splitlines()[-1]
    assert result.returncode == 1 and last.startswith("train.py: 5 steps in a row had no finite gradient")
    assert "epoch 0, batch " in last and "gradient norm nan" in last and "losses that are not finite at t = " in last
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["steps_skipped"] == 5 and rows[-1]["gradient_norm"] is None and rows[-1]["loss"] is None
    assert [path.name for path in checkpoints_in(str(tmp_path))] == ["0000003"]


def test_a_machine_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    facts = environment(Accelerator(cpu=True))
    assert facts["commit"] is None and facts["processes"] == 1


ALONE = SimpleNamespace(num_processes=1, is_main_process=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_waits_for_the_end_of_a_step(number, capsys):
    before, received = signal.getsignal(number), []
    try:
        signal.signal(number, lambda number, frame: received.append(number))
        with Interrupts(ALONE) as interrupts:
            assert interrupts.stop(1) is None
            os.kill(os.getpid(), number)
            assert interrupts.stop(2) == number and not received
            name = signal.Signals(number).name
            signal_name = "Ctrl-C" if number == signal.SIGINT else name
            assert f"{name}: stopping after this step; {signal_name} again stops immediately" in capsys.readouterr().err
            os.kill(os.getpid(), number)
            if number != signal.SIGINT:
                assert not received  # passed on by a launcher
                interrupts.received_at -= 3
                os.kill(os.getpid(), number)
            assert received == [number]
        os.kill(os.getpid(), number)
        assert received == [number] * 2  # as before
    finally:
        signal.signal(number, before)


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts(ALONE) as interrupts:
            os.kill(os.getpid(), signal.SIGHUP)
            assert interrupts.stop(1) is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_ends_a_measurement():
    """At its next network call; in all processes, also where another one has received it."""
    network, calls, accelerator = torch.nn.Identity(), [], Accelerator(cpu=True)
    with Interrupts(accelerator) as interrupts:

        def compute(signal_at):
            for i in range(10):
                calls.append(int(network(torch.tensor(i))))
                if i == signal_at:
                    os.kill(os.getpid(), signal.SIGTERM)
            return sum(calls)

        assert interrupts.run(network, lambda: compute(None)) == [45]
        calls.clear()
        with pytest.raises(Interrupted) as caught:
            interrupts.run(network, lambda: compute(3))
        assert calls == [0, 1, 2, 3] and caught.value.status == 128 + signal.SIGTERM
        assert interrupts.stop(1) == signal.SIGTERM
        network(torch.tensor(0))  # as before


@pytest.mark.parametrize("rank", [0, 1])
def test_a_measurement_that_fails_in_one_process_is_left_out_in_all(rank, monkeypatch, capsys):
    monkeypatch.setattr(
        "ddpm_hf.training.interrupts.gather_object", lambda mine: [*mine, (None, None, "2 of 3 samples are not finite")]
    )
    interrupts = Interrupts(SimpleNamespace(num_processes=2, is_main_process=rank == 0))
    assert interrupts.run(torch.nn.Identity(), lambda: 7) is None
    message = "a sheet or measurement is left out (2 of 3 samples are not finite); the run continues\n"
    assert capsys.readouterr().err == (message if rank == 0 else "")
    monkeypatch.setattr("ddpm_hf.training.interrupts.gather_object", lambda mine: mine)
    assert interrupts.run(torch.nn.Identity(), lambda: torch.zeros(2).view(3)) is None


def test_values_that_are_not_finite_end_no_run(tmp_path, monkeypatch, capsys):
    """Of a sheet and of held-out images: its numbers are null, and the checkpoint is saved."""
    forward = DDPMUNet.forward

    def overflow(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        return output if self.training else tuple(tensor * math.nan for tensor in output)

    monkeypatch.setattr(DDPMUNet, "forward", overflow)
    monkeypatch.setattr("ddpm_hf.training.log.Log.plot", lambda log: None)  # which takes most of the time
    extra = "--sample_every 2 --sample_count 2 --eval_every 2 --eval_images 4 --eval_evaluations 8 --steps 2"
    whole = train(load_config([*RUN.split(), *extra.split(), "--output_dir", str(tmp_path)])[0])
    assert (whole / "model_index.json").is_file() and [path.name for path in checkpoints_in(tmp_path)] == ["0000002"]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][2:]
    assert [[key for key in row if row[key] is not None] for row in rows] == [["step"], ["step"]]
    assert "samples_mean_grey" in rows[0] and {"bits_per_dim", "loss_held_out", "loss_train"} <= rows[1].keys()
    printed = capsys.readouterr().err
    assert printed.count("left out (2 of 2 samples are not finite") == 2  # of the averaged and the raw weights
    assert printed.count("left out (the bound's term of image") == 1 and not (tmp_path / "samples").exists()


@pytest.mark.parametrize(
    "line",
    [
        pytest.param("step 4: sampling a sheet of 2 images", marks=pytest.mark.slow),
        "step 6: measuring 4 held-out images",
    ],
)
def test_a_run_interrupted_while_it_measures(tmp_path, line):
    """Measures after it is resumed, also after the last step: it ends as one that was not interrupted."""
    extra = "--sample_every 2 --sample_count 2 --eval_every 3 --eval_images 4 --eval_evaluations 8"
    arguments = [*RUN.split(), *extra.split(), "--output_dir"]
    whole, other = train(load_config([*arguments, str(tmp_path / "one")])[0]), tmp_path / "two"
    with contextlib.redirect_stderr(Trigger(line, signal.SIGTERM)), pytest.raises(Stopped) as stopped:
        train(load_config([*arguments, str(other)])[0])
    step = int(line.split()[1][0])
    assert f"stopped by SIGTERM after step {step}; the same command resumes from there" in str(stopped.value)
    assert stopped.value.status == 143
    assert (other / f"samples/000000{step}.png").exists() == ("measuring" in line)
    train(load_config([*arguments, str(other)])[0])
    rows = []
    for folder in (whole.parent, other):
        rows.append([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()])
        for row in rows[-1]:
            for key in ("images_per_second", "memory_gb"):
                row.pop(key, None)
    assert rows[0] == rows[1]
    for name in (
        "pipeline/unet/diffusion_pytorch_model.safetensors",
        "samples/0000004.png",
        "samples/0000006-denoising.png",
    ):
        assert (whole.parent / name).read_bytes() == (other / name).read_bytes()


def test_several_processes_ask_each_other_about_once_a_second(monkeypatch):
    """At each step where steps are slow: a launcher does not wait for ever."""
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    asked, other = [], [0.0]

    def gather(mine):
        asked.append(step)
        return torch.cat((mine, torch.tensor([[other[0], 0.0]])))

    interrupts = Interrupts(SimpleNamespace(num_processes=2, device=torch.device("cpu"), gather=gather))
    for step in range(501, 801):
        clock[0] += 0.02 if step < 701 else 5.0
        assert interrupts.stop(step) is None
    assert asked[:4] == [501, 502, 552, 602] and set(range(710, 801)) <= set(asked)
    other[0] = float(signal.SIGTERM)
    step = 801
    assert interrupts.stop(step) == signal.SIGTERM


def test_files_that_cannot_be_written_are_reported(capsys):
    with warn_on_write_error("the pipeline could not be written"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device")
    reason = "Error while serializing: I/O error: No space left on device"
    message = f"the pipeline could not be written ({reason}); the run continues"
    assert message in capsys.readouterr().err


def test_a_problem_that_stays_is_reported_once(capsys):
    reported = set()
    for full in (True, True, False, True):
        with warn_on_write_error("metrics.jsonl could not be written", reported):
            if full:
                raise OSError(28, "No space left on device")
    assert capsys.readouterr().err.count("No space left on device") == 2


def test_what_is_in_the_way_of_checkpoints(tmp_path):
    """Files that other programs leave there, and an old one that cannot be removed."""
    arguments, folder = [*RUN.split(), "--output_dir", str(tmp_path / "run")], tmp_path / "run/checkpoints"
    train(load_config([*arguments, "--steps", "2"])[0])
    (folder / ".DS_Store").write_text("")
    (folder / "0000002").rename(tmp_path / "elsewhere")
    (folder / "0000002").symlink_to(tmp_path / "elsewhere")
    result = script("train.py", *arguments)
    assert result.stderr.count("checkpoints/0000002 could not be removed (") == 1, result.stderr
    assert [path.name for path in checkpoints_in(tmp_path / "run")] == ["0000004", "0000006"]
    assert (tmp_path / "elsewhere/run.pt").is_file()


def test_interrupted_before_it_has_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "ddpm_hf.training.loop.open_images", mock.Mock(side_effect=KeyboardInterrupt)
    )  # as Ctrl-C raises it
    result = script("train.py", *RUN.split(), "--output_dir", tmp_path / "run", check=False)
    assert result.returncode == 130 and result.stderr.splitlines()[-1] == "train.py: interrupted"


def test_a_full_disk_ends_nothing(tmp_path):
    """Files of more than 100 kB cannot be written: the network's, and the optimizer's."""
    arguments = [*RUN.split(), "--output_dir", str(tmp_path)]
    train(load_config([*arguments, "--steps", "2"])[0])
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    try:
        result = script("train.py", *arguments, check=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    # the pipeline itself could not be written either
    assert result.returncode == 1 and result.stderr.splitlines()[-1].startswith("train.py: Error while serializing")
    assert result.stderr.count("a checkpoint could not be written") == 2
    assert f"the run continues, the last complete one is {tmp_path}/checkpoints/0000002" in result.stderr
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["0000002"]
    assert not list(tmp_path.glob(".*"))  # nothing half written takes up space
    train(load_config(arguments)[0])
    assert [path.name for path in checkpoints_in(str(tmp_path))] == ["0000004", "0000006"]


CUT = [
    pytest.param(name, marks=pytest.mark.slow) for name in ("random_states_0.pkl", "model.safetensors", "optimizer.bin")
]


@pytest.mark.parametrize("name", ["run.pt", *CUT])
def test_a_checkpoint_cut_short(tmp_path, capsys, name):
    arguments = [*RUN.split(), "--output_dir", str(tmp_path)]
    whole = train(load_config(arguments)[0])
    weights = (whole / "unet/diffusion_pytorch_model.safetensors").read_bytes()
    (tmp_path / "pipeline").rename(tmp_path / "before")
    path = tmp_path / "checkpoints/0000006" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    train(load_config(arguments)[0])
    assert f"{path.parent} cannot be read" in capsys.readouterr().err
    assert (whole / "unet/diffusion_pytorch_model.safetensors").read_bytes() == weights
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["0000004", "0000006", "0000006.unreadable"]
    path.write_bytes(path.read_bytes()[:10])
    (path.parent / "config.yaml").unlink()
    train(load_config(arguments)[0])  # and once more
    assert (whole / "unet/diffusion_pytorch_model.safetensors").read_bytes() == weights


def test_no_checkpoint_that_can_be_read(tmp_path):
    arguments = [*RUN.split(), "--output_dir", str(tmp_path)]
    train(load_config(arguments)[0])
    (tmp_path / "pipeline").rename(tmp_path / ".pipeline.old")  # as a run that is killed between two names
    for path in checkpoints_in(str(tmp_path)):
        (path / "run.pt").write_bytes(b"x")
    message = (
        rf"0000006 cannot be read \(run.pt is damaged\), nor can the one before it; start again in another output_dir, "
        rf"--init_from {tmp_path}/pipeline takes the weights from there"
    )
    with pytest.raises(ConfigError, match=message):
        train(load_config(arguments)[0])
    assert len(checkpoints_in(str(tmp_path))) == 2 and (tmp_path / "pipeline/model_index.json").is_file()
