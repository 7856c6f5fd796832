"""Runs that are told to end, that diverge, and that cannot write."""

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
from scripts import script
from stops import FiniteSteps, Signals, going_on
from watch import environment

from config import ConfigError, checkpoints_in, load_config
from train import train

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
    told = environment(Accelerator(cpu=True))
    assert told["commit"] is None and told["processes"] == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_waits_for_the_end_of_a_step(number):
    before = signal.getsignal(number)
    with Signals(SimpleNamespace(num_processes=1)) as signals:
        assert signals.stop(1) is None
        os.kill(os.getpid(), number)
        assert signals.stop(2) == number
        assert signal.getsignal(number) == before  # the next one ends it
    assert signal.getsignal(number) == before


def test_several_processes_ask_each_other_about_once_a_second(monkeypatch):
    """At each step where steps are slow: a launcher does not wait for ever."""
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    asked, other = [], [0.0]

    def gather(mine):
        asked.append(step)
        return torch.cat((mine, torch.tensor([[other[0], 0.0]])))

    signals = Signals(SimpleNamespace(num_processes=2, device=torch.device("cpu"), gather=gather))
    for step in range(501, 801):
        clock[0] += 0.02 if step < 701 else 5.0
        assert signals.stop(step) is None
    assert asked[:4] == [501, 502, 552, 602] and set(range(710, 801)) <= set(asked)
    other[0] = float(signal.SIGTERM)
    step = 801
    assert signals.stop(step) == signal.SIGTERM


def test_files_that_cannot_be_written_are_told(capsys):
    with going_on("the pipeline could not be written"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device")
    told = "the pipeline could not be written (Error while serializing: I/O error: No space left on device); the run goes on"
    assert told in capsys.readouterr().err


def test_what_is_in_the_way_of_checkpoints(tmp_path):
    """Files that other programs leave there, and an old one that cannot be removed."""
    arguments = [*RUN.split(), "--output_dir", str(tmp_path)]
    train(load_config([*arguments, "--steps", "2"])[0])
    for name in (".DS_Store", ".0000002"):
        (tmp_path / "checkpoints" / name).write_text("")
    result = script("train.py", *arguments)
    assert result.stderr.count("checkpoints/0000002 could not be removed (") == 1, result.stderr
    assert [path.name for path in checkpoints_in(str(tmp_path))] == ["0000002", "0000004", "0000006"]


def test_interrupted_before_it_has_begun(tmp_path, monkeypatch):
    monkeypatch.setattr("inputs.open_images", mock.Mock(side_effect=KeyboardInterrupt))  # as Ctrl-C raises it
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
    assert f"the run goes on, the last whole one is {tmp_path}/checkpoints/0000002" in result.stderr
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["0000002"]
    assert not list(tmp_path.glob(".*"))  # nothing half written takes up space
    train(load_config(arguments)[0])
    assert [path.name for path in checkpoints_in(str(tmp_path))] == ["0000004", "0000006"]


@pytest.mark.parametrize("name", ["random_states_0.pkl", "run.pt", "model.safetensors", "optimizer.bin"])
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
    with pytest.raises(ConfigError, match="0000006 cannot be read .*, nor one before it; remove"):
        train(load_config(arguments)[0])
    assert len(checkpoints_in(str(tmp_path))) == 2 and (tmp_path / "pipeline/model_index.json").is_file()
