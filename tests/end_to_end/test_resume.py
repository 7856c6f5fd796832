"""Runs that are killed and started again end as the one that was let alone."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
# 22 batches an epoch, dropout, flips, and a sampler of timesteps that has learned from the second step on
RUN = (
    "--steps 24 --batch_size 64 --learning_rate 0.001 --lr_warmup_steps 15 --ema_decay 0.9 --log_every 3 --sample_every 12 "
    "--sample_count 2 --sample_steps 2 --checkpoint_every 4 --random_flip true --loss vlb --timesteps loss_second_moment "
    "--lr_schedule constant_with_warmup --scheduler.num_train_timesteps 4 --unet.block_out_channels [8,16] "
    "--unet.norm_num_groups 4 --unet.attention_head_dim 8 --unet.dropout 0.1"
)


def start(folder, *extra, processes=1, script=ROOT / "training/train.py", run=RUN):
    if "fp16" in extra:
        script = ROOT / "tests/end_to_end/with_scaler.py"
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
        launcher += [f"--nproc_per_node={processes}"]
    command = [*launcher, str(script), *run.split(), *extra, "--output_dir", str(folder)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    # a session of its own, as a terminal gives it: Ctrl-C reaches all its processes
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment, start_new_session=True
    )


def finish(process):
    """Waits for a run that must succeed."""
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]


def is_there(path):
    """Also as a temporary name, or as the checkpoint that it becomes."""
    return (
        path.exists() or any(path.parent.glob(f"{path.name}.*.tmp")) or path.with_name(path.name.lstrip(".")).exists()
    )


def end_when(process, path, number=signal.SIGKILL):
    """Ends the run and all its processes when path is there; returns what it printed."""
    while not is_there(path):
        assert process.poll() is None, process.stderr.read()[-3000:]
        time.sleep(0.0005)
    if number == signal.SIGKILL:
        for running in (*psutil.Process(process.pid).children(recursive=True), process):
            running.kill()
    else:
        os.killpg(process.pid, number)
    _, errors = process.communicate()
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:  # launchers have a status of their own
        assert process.returncode != 0
        message = f"stopped by {signal.Signals(number).name} after step (\\d+); the same command resumes from there"
        step = int(re.search(message, errors)[1])
        assert (path.parents[0] / f"{step:07d}").is_dir() or (path.parents[0] / f"checkpoints/{step:07d}").is_dir()
    return errors


def results(folder, step=24):
    """All that a run ends with: weights, checkpoint and what it logged, but for its speed."""
    checkpoint = folder / f"checkpoints/{step:07d}"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        for key in ("images_per_second", "memory_gb"):
            row.pop(key, None)
    run, scaler = torch.load(checkpoint / "run.pt", weights_only=True), checkpoint / "scaler.pt"
    return {
        "log": rows,
        "weights": load_file(checkpoint / "model.safetensors"),
        "averaged weights": load_file(folder / "pipeline/unet/diffusion_pytorch_model.safetensors"),
        "optimizer": torch.load(checkpoint / "optimizer.bin", weights_only=True)["state"],
        "ema": run["ema"]["shadow_params"],
        "scaler": torch.load(scaler, weights_only=True) if scaler.exists() else None,
        "timesteps": run["timesteps"],
        "noise schedule": [run.get("noise_schedule"), run.get("noise_schedule_ema", {}).get("shadow_params")],
        "learning rate": run["lr_schedule"]["_last_lr"],
        "position": [process_state["at"] for process_state in run["own"]],
    }


# at the start, after a checkpoint, in the middle of writing one
STOPS = ["metrics.jsonl", "checkpoints/0000008", "checkpoints/.0000012", "checkpoints/0000016"]


LEARNED_IN_CONTINUOUS_TIME = (
    "--scheduler.beta_schedule learned --loss vlb_continuous --timesteps low_discrepancy --scheduler.num_train_timesteps 40 "
    "--gradient_accumulation_steps 2 --eval_every 8 --eval_images 4 --eval_evaluations 8"
)


@pytest.mark.parametrize(
    "processes, extra, stops",
    [
        (1, "--gradient_accumulation_steps 2", STOPS[2:3]),
        (1, "--scheduler.beta_schedule learned --eval_every 8 --eval_images 4", STOPS[2:3]),
        pytest.param(1, LEARNED_IN_CONTINUOUS_TIME, STOPS, marks=pytest.mark.slow),
        pytest.param(2, LEARNED_IN_CONTINUOUS_TIME + " --batch_size 32", STOPS, marks=pytest.mark.slow),
        pytest.param(1, "--timesteps low_discrepancy", STOPS[1:2], marks=pytest.mark.slow),
        pytest.param(1, "--num_workers 2", STOPS, marks=pytest.mark.slow),
        pytest.param(1, "--mixed_precision bf16", STOPS, marks=pytest.mark.slow),
        pytest.param(1, "--mixed_precision fp16", STOPS, marks=pytest.mark.slow),
        pytest.param(1, "--compile true", STOPS[2:3], marks=pytest.mark.slow),
        pytest.param(1, "--streaming true --shuffle_buffer 100", STOPS, marks=pytest.mark.slow),
        # parts of 356 to 362 images to each worker of two processes: their epochs end at different steps, within a step
        pytest.param(
            2,
            "--streaming true --num_workers 2 --batch_size 119 --gradient_accumulation_steps 2",
            STOPS,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            2,
            "--num_workers 2 --batch_size 32 --eval_every 6 --eval_images 5 --eval_evaluations 8",
            STOPS,
            marks=pytest.mark.slow,
        ),
        pytest.param(2, "--gradient_accumulation_steps 2 --batch_size 32", STOPS, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, processes, extra, stops):
    extra = extra.split()
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    finish(start(alone, *extra, processes=processes))
    if len(stops) > 1 and "--eval_every" not in extra:  # which ends with an evaluation
        finish(start(killed, *extra, "--steps", "3", processes=processes))  # done, but then it is to have more steps
    # two processes see a signal about once a second, and small batches are done by then
    if len(stops) > 1 and (processes == 1 or "--streaming" in extra):
        end_when(start(killed, *extra, processes=processes), killed / "checkpoints/.0000004", signal.SIGINT)
    for stop in stops:
        end_when(start(killed, *extra, processes=processes), killed / stop)
    finish(start(killed, *extra, processes=processes))
    one, other = results(alone), results(killed)
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert [row["step"] for row in one["log"] if "loss" in row] == list(range(3, 25, 3))
    states = (killed / "checkpoints/0000024").glob("random_states_*.pkl")
    assert len(list(states)) == processes  # there were as many
    assert (
        ("fp16" in extra) == (one["scaler"] is not None) == (max(row.get("steps_skipped", 0) for row in one["log"]) > 0)
    )
    if "low_discrepancy" not in extra:
        assert one["timesteps"]["count"].min() >= 10  # it had learned where to look
    assert (len({(at["epoch"], at["batch"]) for at in one["position"]}) > 1) == (
        processes > 1 and "--streaming" in extra
    )
    left = sorted(path.name for path in (killed / "checkpoints").iterdir())
    assert left[-2:] == ["0000020", "0000024"] and len(left) <= 2 + ("--eval_every" in extra)  # and the best


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_group_of_processes(tmp_path, number):
    """Also to those that read images, as a batch system sends it; and one of them that was killed before."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
    process = start(tmp_path, "--num_workers", "2", "--steps", "100000", "--log_every", "1")
    signal.signal(signal.SIGHUP, before)
    while not is_there(tmp_path / "checkpoints/0000004"):
        assert process.poll() is None, process.stderr.read()[-3000:]
        time.sleep(0.01)
    worker = psutil.Process(process.pid).children()[0]
    worker.kill()
    for line in process.stderr:
        if "was killed" in line:
            break
    assert line == (
        f"the process that reads images, {worker.pid}, was killed, most likely for want of memory (fewer num_workers need "
        "less); all are started again\n"
    )
    start_of_end = time.monotonic()
    lines = end_when(process, tmp_path / "checkpoints/0000004", number).splitlines()
    assert process.returncode == 128 + number and time.monotonic() - start_of_end < 30
    name = signal.Signals(number).name
    signal_name = "Ctrl-C" if number == signal.SIGINT else name
    assert f"{name}: stopping after this step; {signal_name} again stops immediately" in lines
    assert not any("Traceback" in line for line in lines) and lines[-1].startswith("train.py: stopped by SIG")


@pytest.mark.slow
def test_a_killed_reader_changes_nothing(tmp_path):
    extra = [
        "--num_workers",
        "2",
        "--batch_size",
        "16",
        "--steps",
        "300",
        "--sample_every",
        "0",
        "--checkpoint_every",
        "100",
    ]
    finish(start(tmp_path / "alone", *extra))
    process = start(tmp_path / "killed", *extra)
    while not is_there(tmp_path / "killed/checkpoints/0000100"):
        time.sleep(0.001)
    psutil.Process(process.pid).children()[-1].kill()
    finish(process)
    one, other = (results(tmp_path / name, 300) for name in ("alone", "killed"))
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.slow
def test_two_runs_in_one_folder(tmp_path):
    """The second is refused, all its processes too; after a kill the run resumes at once, though its readers still live."""
    extra = ["--num_workers", "2", "--steps", "100000"]
    first = start(tmp_path, *extra)
    while not is_there(tmp_path / "checkpoints/0000004"):
        assert first.poll() is None, first.stderr.read()[-3000:]
        time.sleep(0.01)
    for processes in (1, 2):
        second = start(tmp_path, *extra, processes=processes)
        _, errors = second.communicate()
        assert second.returncode != 0
        assert errors.count(f"train.py: output_dir='{tmp_path}' is in use by process {first.pid} on ") == processes
    assert first.poll() is None
    first.kill()
    first.wait()
    assert (tmp_path / ".lock").exists()
    step = int(max(path.name for path in (tmp_path / "checkpoints").glob("0*")))
    errors = end_when(start(tmp_path, *extra), tmp_path / f"checkpoints/{step + 4:07d}", signal.SIGTERM)
    assert f"resumed from step {step:,} (" in errors and not (tmp_path / ".lock").exists()


@pytest.mark.slow
def test_one_of_two_processes_is_interrupted_while_it_measures(tmp_path):
    """All leave the measurement, save a checkpoint, and measure again when resumed."""
    extra = [
        "--batch_size",
        "32",
        "--eval_every",
        "6",
        "--eval_images",
        "64",
        "--eval_evaluations",
        "8",
        "--sample_every",
        "0",
    ]
    extra += ["--steps", "12", "--scheduler.num_train_timesteps", "400", "--timesteps", "uniform"]
    finish(start(tmp_path / "alone", *extra, processes=2))
    process = start(tmp_path / "stopped", *extra, processes=2)
    for line in process.stderr:
        if line == "step 6: measuring 64 held-out images\n":
            break
    other = next(child for child in psutil.Process(process.pid).children() if child.environ()["RANK"] == "1")
    other.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert "stopped by SIGTERM after step 6; the same command resumes from there" in errors
    finish(start(tmp_path / "stopped", *extra, processes=2))
    one, other = (results(tmp_path / name, 12) for name in ("alone", "stopped"))
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.slow
def test_another_number_of_processes(tmp_path):
    finish(start(tmp_path, "--steps", "4"))
    process = start(tmp_path, "--steps", "6", processes=2)
    _, errors = process.communicate()
    assert process.returncode != 0 and "was written by 1 processes, this run has 2" in errors


@pytest.mark.slow
def test_two_processes_compute_what_one_does(tmp_path):
    """Of twice the batch, at once or accumulated: the same curve, weights, samples and bits/dim, to float32 rounding."""
    script = ROOT / "tests/end_to_end/same_noise.py"
    run = RUN.replace("--random_flip true", "").replace("dropout 0.1", "dropout 0")
    run = run.replace("--loss vlb --timesteps loss_second_moment", "")
    run += " --eval_every 12 --eval_images 6 --eval_evaluations 8"
    runs = {"one": (1, "--batch_size 32"), "two": (2, "--batch_size 16")}
    runs |= {"accumulated": (1, "--batch_size 16 --gradient_accumulation_steps 2")}
    for name, (processes, extra) in runs.items():
        finish(start(tmp_path / name, *extra.split(), processes=processes, script=script, run=run))
        assert json.loads((tmp_path / name / "environment.json").read_text())["processes"] == processes
    one = results(tmp_path / "one")
    assert len(one["log"]) == 12 and one["log"][-1]["bits_per_dim"] > 0
    for name in ("two", "accumulated"):
        other = results(tmp_path / name)
        for a, b in zip(one["log"], other["log"], strict=True):
            assert a.keys() == b.keys()
            for key in a:
                if "error" not in key:  # of few images, each process's with noise of its own
                    close = 0.1 if key == "bits_per_dim" else 1e-5
                    assert a[key] == pytest.approx(b[key], rel=close), (name, key)
        for key, value in one["averaged weights"].items():
            # the bias of a key changes no attention: its gradient is rounding alone, which Adam makes as large as any
            if not key.endswith("to_k.bias"):
                torch.testing.assert_close(other["averaged weights"][key], value, rtol=1e-4, atol=1e-6)
        for sheet in ("0000024.png", "0000024-denoising.png"):
            sheets = [
                np.asarray(Image.open(tmp_path / run_name / "samples" / sheet)).astype(int)
                for run_name in ("one", name)
            ]
            assert abs(sheets[0] - sheets[1]).max() <= 1
