"""One run for each output folder, and what it tells in it."""

import copy
import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from ddpm_hf.training.config import ClassifierConfig, ConfigError, TrainConfig
from ddpm_hf.training.log import Curves, Log
from ddpm_hf.training.output import OutputFolder
from ddpm_hf.training.plots import plot_curves
from ddpm_hf.training.resume import checkpoint_to_resume

HOLDER = """
import fcntl, json, os, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
json.dump({"process": os.getpid(), "host": "elsewhere.example", "started": time.time()}, file)
file.flush()
print("locked", flush=True)
time.sleep(60)
"""


@pytest.fixture
def config(tmp_path):
    return TrainConfig(output_dir=str(tmp_path / "run"), steps=10)


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def hold(path):
    """Another process with the lock."""
    path.parent.mkdir(exist_ok=True)
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    return process


def test_another_run_is_reported_and_a_killed_one_taken_over(tmp_path, config, accelerator):
    process = hold(tmp_path / "run/.lock")
    try:
        with pytest.raises(ConfigError) as caught, OutputFolder(config, accelerator):
            pass
        message = str(caught.value)
        assert message.startswith(
            f"output_dir={config.output_dir!r} is in use by process {process.pid} on elsewhere.example, "
        )
        assert "\n" not in message and message.endswith("; end it or wait, or take another output_dir")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with OutputFolder(config, accelerator):
        assert json.loads((tmp_path / "run/.lock").read_text())["process"] == os.getpid()
        with pytest.raises(subprocess.CalledProcessError):
            subprocess.run([sys.executable, "-c", HOLDER, tmp_path / "run/.lock"], check=True, capture_output=True)
    assert not (tmp_path / "run/.lock").exists()


def test_forked_processes_do_not_keep_the_lock(tmp_path, config, accelerator):
    """As those that read images, which outlive a killed run for a while."""
    with OutputFolder(config, accelerator) as folder:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writer, b"forked")  # what is done after a fork is done
            time.sleep(60)
            os._exit(0)
        assert os.read(reader, 6) == b"forked"
        os.close(reader), os.close(writer)
        (folder.path / "config.yaml").touch()
        (folder.path / ".lock").rename(folder.path / "kept")  # the same file for the next one
    try:
        hold(tmp_path / "run/kept").kill()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_without_locks_of_the_system_the_name_decides(tmp_path, config, accelerator, monkeypatch):
    monkeypatch.setattr("ddpm_hf.training.output.fcntl", None)
    path, here = tmp_path / "run/.lock", os.uname().nodename
    path.parent.mkdir()
    parent = psutil.Process(os.getppid())
    running = {"process": parent.pid, "host": here, "started": parent.create_time()}
    for owner, message in (
        (running, f"is in use by process {parent.pid} on {here}, .*; end it or wait"),
        (running | {"host": "elsewhere"}, f"on elsewhere, which began at .*; if that has ended, remove {path}"),
    ):
        path.write_text(json.dumps(owner))
        with pytest.raises(ConfigError, match=message), OutputFolder(config, accelerator):
            pass
    for stale in (
        json.dumps(running | {"started": 1e9}),
        json.dumps(running | {"process": -1}),
        "",
        "[]",
        '{"host": "\\u001b"}',
    ):
        path.write_text(stale)
        with OutputFolder(config, accelerator):
            assert json.loads(path.read_text())["process"] == os.getpid()


def test_nothing_is_left_where_nothing_was_written(tmp_path, config, accelerator):
    with OutputFolder(config, accelerator):
        assert (tmp_path / "run").is_dir()
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "run/.lock").symlink_to(victim)
    with pytest.raises(ConfigError, match="lock"), OutputFolder(config, accelerator):
        pass
    assert victim.read_text() == "mine"


def test_what_a_killed_run_left_behind_is_removed(tmp_path, config, accelerator):
    run = tmp_path / "run"
    for name in (".pipeline.old/unet", "checkpoints/.0000012.0123456789abcdef.tmp", "checkpoints/0000010", "samples"):
        (run / name).mkdir(parents=True)
    for name in (
        ".curves.png.0123456789abcdef.tmp",
        "samples/.0000012.png.0123456789abcdef.tmp",
        "samples/0000010.png",
    ):
        (run / name).touch()
    with OutputFolder(config, accelerator) as folder:
        folder.begin()
    files = {str(path.relative_to(run)) for path in run.rglob("*")}
    assert files == {
        "pipeline", "pipeline/unet", "checkpoints", "checkpoints/0000010", "samples", "samples/0000010.png", "config.yaml",
        "environment.json",
    }  # fmt: skip


def test_both_folders_of_a_classifiers_run_are_brought_back(tmp_path, accelerator):
    config = ClassifierConfig(output_dir=str(tmp_path / "run"))
    for name in (".classifier.old", ".pipeline.old"):
        (tmp_path / "run" / name).mkdir(parents=True)
    with OutputFolder(config, accelerator) as folder:
        folder.begin()
    assert (tmp_path / "run/classifier").is_dir() and (tmp_path / "run/pipeline").is_dir()


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_folder_that_is_removed_while_the_run_goes_on(tmp_path, config, accelerator, capsys):
    run = tmp_path / "run"
    with OutputFolder(config, accelerator) as folder:
        folder.begin()
        log = Log(config, folder, accelerator, 1000)
        log.begin(0)
        for step in (1, 2):
            log.note(step, loss=step)
        run.rename(tmp_path / "moved")
        log.note(3, loss=3)
        log.note(4, loss=4)
        assert (
            capsys.readouterr().err.count(f"{run} was removed or moved; it is created again, and the run continues")
            == 1
        )
        assert rows(run / "metrics.jsonl") == [{"step": step, "loss": step} for step in (1, 2, 3, 4)]
        assert checkpoint_to_resume(config) is None  # the same command is not refused
        run.rename(tmp_path / "again")
        process = hold(run / ".lock")
        try:
            with pytest.raises(ConfigError, match=f"is in use by process {process.pid}"):
                log.note(5, loss=5)
        finally:
            process.kill()
            process.wait()


def test_a_full_disk_leaves_no_gap_in_the_metrics(tmp_path, config, accelerator, capsys):
    """What it has torn is cut off, and what could not be written is written later."""
    expected = [{"step": step, "loss": float(step)} for step in range(1, 13)]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with OutputFolder(config, accelerator) as folder:
        log, path = Log(config, folder, accelerator, 1000), folder.path / "metrics.jsonl"
        log.begin(0)
        try:
            for step in range(1, 13):
                limit = (110, before[1]) if 3 <= step <= 8 or step > 10 else before
                resource.setrlimit(resource.RLIMIT_FSIZE, limit)
                log.note(step, loss=step)
                if step == 8:
                    assert path.stat().st_size == 110 and not path.read_bytes().endswith(b"\n")
                if step == 10:
                    assert rows(path) == expected[:10]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert capsys.readouterr().err.count("metrics.jsonl could not be written") == 2
        assert rows(path) == expected[:10]
        state = log.state_dict()  # writes the rest, too
        assert rows(path) == expected
        # killed before that: the checkpoint has what the file has not
        path.write_text("".join(json.dumps(row) + "\n" for row in expected[:10]) + '{"step": 11, "lo')
        state["unwritten"] = [json.dumps(row) + "\n" for row in expected[9:]]
        other = Log(config, folder, accelerator, 1000)
        other.load_state_dict(state)
        other.begin(12, folder.path / "checkpoints/0000012")
        assert rows(path) == expected


def test_a_resumed_run_forgets_what_came_after_the_checkpoint(tmp_path, config, accelerator, capsys):
    with OutputFolder(config, accelerator) as folder:
        log, path = Log(config, folder, accelerator, 1000), folder.path / "metrics.jsonl"
        log.begin(0)
        for step in range(1, 5):
            log.note(step, loss=step)
        state = copy.deepcopy(log.state_dict())
        whole = path.read_text()
        for step in range(5, 9):
            log.note(step, loss=step)
        for damage, lines in ((None, 0), (whole[:-7], 1), ("", 1), ("[]\n", 1), ("{}\n" + whole, 1)):
            if damage is not None:
                path.write_text(damage)
            other = Log(config, folder, accelerator, 1000)
            other.load_state_dict(state)
            other.begin(4, folder.path / "checkpoints/0000004")
            assert path.read_text() == whole
            output = capsys.readouterr().err
            assert (
                output.count("of the 4 rows that were logged up to step 4") == lines and "resumed from step 4" in output
            )


def test_curves_are_bounded_and_are_means():
    curves, values = Curves(), torch.randn(10_007, dtype=torch.float64).tolist()
    for step, value in enumerate(values, 1):
        curves.add({"step": step, "loss": value, "none": None, "half": value if step % 2 else None})
        if step % 1000 == 0:
            curves.add({"step": step, "bits_per_dim": step / 1000})
    loss_rows = [row for row in curves.rows() if "loss" in row]
    assert len(loss_rows) == 10_007 // 16 + 1  # 1,000 of one, of two, of four, of eight rows became 500
    for i, row in enumerate(loss_rows):
        rows = values[16 * i : 16 * i + 16]
        assert row["step"] == min(16 * i + 16, 10_007) and row["none"] is None
        assert row["loss"] == pytest.approx(sum(rows) / len(rows), abs=1e-12)
    assert [row["bits_per_dim"] for row in curves.rows() if "bits_per_dim" in row] == list(range(1, 11))
    steps = [row["step"] for row in curves.rows()]
    assert steps == sorted(steps)


def test_lines_where_there_is_no_terminal(config, accelerator, capsys):
    config = dataclasses.replace(config, log_every=2, batch_size=4)
    with OutputFolder(config, accelerator) as folder:
        log = Log(config, folder, accelerator, 1000)
        log.begin(4)
        for step in (5, 6):
            log.add(torch.zeros(4, 1, 2, 2), torch.zeros(4, dtype=torch.long), torch.full((4,), 0.25), torch.ones(4))
            log.step(step, torch.tensor(1.0), steps_skipped=0)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("step 6/10: loss 0.2500, ") and lines[0].endswith(" left")
    assert " images/s, 00:00 left" in lines[0]


def test_the_error_bar_is_the_standard_error_that_is_printed(tmp_path, monkeypatch):
    """And legends stand above the panels, where they hide no points."""
    panels = []
    monkeypatch.setattr("ddpm_hf.training.plots.save_figure", lambda figure, path: panels.extend(figure.axes))
    errors = dict(bits_per_dim_sampling_error=0.06, bits_per_dim_standard_error=0.11)
    rows = [{"step": step, "loss": 1.0, "bits_per_dim": 3.0, **errors} for step in (1, 2)]
    plot_curves([*rows, {"step": 2, "samples_mean_grey": 0.5, "samples_std_grey": 0.5}], ["grey"], tmp_path / "x.png")
    (panel,) = [panel for panel in panels if panel.get_ylabel() == "bits/dim of held-out images"]
    (bars,) = panel.containers
    assert bars.get_label() == "mean and its standard error"
    (segments,) = [lines.get_segments() for lines in bars[2]]
    assert segments[0][:, 1].tolist() == pytest.approx([2.89, 3.11])
    legends = [panel for panel in panels if panel.get_legend()]
    assert len(legends) == 3
    for panel in legends:
        panel.figure.canvas.draw()
        assert panel.get_legend().get_window_extent().y0 >= panel.get_window_extent().y1
        assert panel.get_legend().get_window_extent().y1 <= panel.figure.bbox.y1


def test_a_single_point_can_be_seen_in_the_curves(tmp_path):
    row = {"step": 1, "loss": 1.0, **{f"loss_t_quarter_{i}": 0.3 * i for i in range(1, 5)}}
    plot_curves([row], ["grey"], tmp_path / "curves.png")
    pixels = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB"))
    panel = pixels[:, : pixels.shape[1] // 2]
    assert (panel == (31, 119, 180)).all(-1).sum() > 20  # matplotlib's first color
