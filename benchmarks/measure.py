"""Helpers of all benchmarks: timing calls in turns, measuring the machine's peak rate, recording results as JSON and table."""

import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import diffusers
import torch
from torch.utils.flop_counter import FlopCounterMode

from ddpm_hf.files.atomic import write_text

ROOT = Path(__file__).parents[1]

RESULTS = ROOT / "benchmarks" / "results"
ROUNDS = 9


def in_turns(
    calls: dict[str, Callable], rounds: int = ROUNDS, warmup: int = 2, repeat: int = 1
) -> dict[str, list[float]]:
    """Return the seconds of each call in each round. In a round, each call runs `repeat` times in a row.

    Each round begins with the next call, so that no call is always the first.
    """
    for call in calls.values():
        for _ in range(warmup):
            call()
    seconds = {name: [] for name in calls}
    turns = list(calls.items())
    for _ in range(rounds):
        turns.append(turns.pop(0))
        for name, call in turns:
            _wait()
            start = time.perf_counter()
            for _ in range(repeat):
                call()
            _wait()
            seconds[name].append((time.perf_counter() - start) / repeat)
    return seconds


def in_turns_in_processes(
    makers: dict[str, tuple], rounds: int = ROUNDS, warmup: int = 2, repeat: int = 1
) -> tuple[dict[str, list[float]], dict[str, float], dict]:
    """As `in_turns`, but with one process per call, so that calls do not share an allocator or their memory.

    Args:
        makers: name -> an importable function and its arguments; the function returns the call to measure.

    Returns:
        Three dicts by name: the seconds in each round; the peak MB of the calls after the first one, minus the peak after
            the imports; the result of the last call.
    """
    context, workers = multiprocessing.get_context("spawn"), {}
    for name, (make, *arguments) in makers.items():
        workers[name], worker_end = context.Pipe()
        context.Process(target=_serve, args=(worker_end, make, arguments, repeat), daemon=True).start()
        worker_end.close()  # so that recv() raises EOFError if the process fails
    seconds, mb, results = {name: [] for name in workers}, {}, {}
    turns = list(workers)
    for i in range(-warmup, rounds):
        turns.append(turns.pop(0))
        for name in turns:
            workers[name].send("turn")
            elapsed, mb[name], results[name] = workers[name].recv()
            if i >= 0:
                seconds[name].append(elapsed)
    for worker in workers.values():
        worker.send("end")
    return seconds, mb, results


def _serve(connection, make, arguments, repeat):
    initial_mb = peak_mb()
    call, is_first = make(*arguments), True
    while connection.recv() == "turn":
        if repeat > 1:
            call()  # warm up short calls: the caches hold the data of another process
        start = time.perf_counter()
        for _ in range(repeat):
            result = call()
        _wait()
        connection.send(((time.perf_counter() - start) / repeat, peak_mb() - initial_mb, result))
        if is_first:
            Path("/proc/self/clear_refs").write_text("5")  # reset the peak, which would include the compiler's memory
            is_first = False


def _wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio(seconds: dict[str, list[float]], baseline: str, ours: str) -> dict:
    """Return how many times faster `ours` is than `baseline`: the median ratio over the rounds, and its quartiles."""
    ratios = [slow / fast for slow, fast in zip(seconds[baseline], seconds[ours])]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"ratio": statistics.median(ratios), "quartiles": [low, high]}


def medians(seconds: dict[str, list[float]], unit: str) -> dict[str, float]:
    """Return the median of each call, as the columns "name unit" of a row; unit: s, ms or us."""
    scale = {"s": 1, "ms": 1e3, "us": 1e6}[unit]
    return {f"{name} {unit}": scale * statistics.median(values) for name, values in seconds.items()}


def format_ratio(ratio_row: dict) -> str:
    """Format a ratio with its quartiles, for a table."""
    low, high = ratio_row["quartiles"]
    return f"{ratio_row['ratio']:.2f} ({low:.2f} to {high:.2f})"


def flops(call: Callable) -> int:
    """Count the floating point operations of a call's convolutions and matrix products; a multiply-add counts as two."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def peak_rate(dtype: torch.dtype, device: str = "cpu") -> float:
    """Measure this machine's peak FLOP/s: the best of a large matrix product and three 3x3 convolutions."""
    n = 2048
    a, b = torch.randn(2, n, n, dtype=dtype, device=device)
    best_seconds = min(in_turns({"": lambda: a @ b}, rounds=7)[""])
    rates = [2 * n**3 / best_seconds]
    for channels, side in ((128, 32), (256, 16), (256, 32)):
        x = torch.randn(8, channels, side, side, dtype=dtype, device=device).to(memory_format=torch.channels_last)
        conv = torch.nn.Conv2d(channels, channels, 3, padding=1, dtype=dtype, device=device)
        conv.to(memory_format=torch.channels_last)
        with torch.no_grad():
            best_seconds = min(in_turns({"": lambda conv=conv, x=x: conv(x)}, rounds=7)[""])
        rates.append(2 * 9 * channels**2 * 8 * side**2 / best_seconds)
    return max(rates)


def peak_mb() -> float:
    """Return the peak resident set of this process in MB. getrusage would include that of the parent process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def machine() -> dict:
    """Return the versions, the processor and the number of threads."""
    description = {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        description["gpu"] = torch.cuda.get_device_name()
    return description


def _processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in fields.get("flags", "").split()]
    return f"{os.cpu_count()} x {fields.get('model name', platform.machine())} ({' '.join(flags)})"


def has_bfloat16() -> bool:
    """Return whether the device has bfloat16 instructions; without them bfloat16 is slower than float32."""
    return torch.cuda.is_available() or any(flag in _processor() for flag in ("avx512_bf16", "amx_bf16"))


def _commit():
    """Return the current commit, with "-dirty" if the measured code has uncommitted changes; result files do not count."""

    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "src", "training", "benchmarks/*.py")
    return git("rev-parse", "--short=10", "HEAD") + ("-dirty" if changed else "")


def record(name: str, title: str, row: dict, keys: Iterable[str], hidden: Iterable[str] = ()) -> None:
    """Print a row of results and add it to results/NAME.json and the table results/NAME.md, in the section of this machine.

    The row replaces the row of this machine with the same values of `keys`. The table leaves out the columns `hidden`.
    """
    this_machine, path, keys = machine(), RESULTS / f"{name}.json", list(keys)
    row = {**row, "commit": _commit()}
    sections = json.loads(path.read_text()) if path.is_file() else []
    section = next((section for section in sections if section["machine"] == this_machine), None)
    if section is None:
        section = {"machine": this_machine, "rows": []}
        sections.append(section)
    rows = [old for old in section["rows"] if any(old.get(key) != row.get(key) for key in keys)]
    section["rows"] = sorted([*rows, row], key=lambda row: [_sortable(row.get(key)) for key in keys])
    text = f"# {title}\n"
    for section in sections:
        columns = dict.fromkeys(key for row in section["rows"] for key in row if key not in hidden)
        text += "\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns) + "\n"
        for old in section["rows"]:
            text += "| " + " | ".join(_cell(old.get(column, "")) for column in columns) + " |\n"
        text += "\n" + ", ".join(f"{key} {value}" for key, value in section["machine"].items()) + "\n"
    print(", ".join(f"{key}: {_cell(value)}" for key, value in row.items() if key not in hidden), flush=True)
    RESULTS.mkdir(exist_ok=True)
    write_text(path, json.dumps(sections, indent=2) + "\n")
    write_text(path.with_suffix(".md"), text)


def _sortable(value):
    return (0, value, "") if isinstance(value, (int, float)) else (1, 0, str(value))


def _cell(value):
    if isinstance(value, dict):
        return format_ratio(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
