"""Timing of calls in turns, measured rates of the machine, and results as table and JSON, for all benchmarks."""

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
    """Seconds of each call in each round. In a round the calls take turns, each `repeat` times in a row.

    Each round begins with another call, so that no call always follows the same one.
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


def in_turns_apart(
    makers: dict[str, tuple], rounds: int = ROUNDS, warmup: int = 2, repeat: int = 1
) -> tuple[dict[str, list[float]], dict[str, float], dict]:
    """As `in_turns`, each call in a process of its own: what one does to the allocator and its memory is not the others'.

    Args:
        makers: for each name a function of a module and its arguments; what it returns is called.

    Returns:
        Seconds in each round; MB that the calls after the first take at most, less what imports take; what it returns.
    """
    context, workers = multiprocessing.get_context("spawn"), {}
    for name, (make, *arguments) in makers.items():
        workers[name], theirs = context.Pipe()
        context.Process(target=_serve, args=(theirs, make, arguments, repeat), daemon=True).start()
        theirs.close()  # so that the end of a process that failed is seen
    seconds, mb, results = {name: [] for name in workers}, {}, {}
    turns = list(workers)
    for i in range(-warmup, rounds):
        turns.append(turns.pop(0))
        for name in turns:
            workers[name].send("turn")
            took, mb[name], results[name] = workers[name].recv()
            if i >= 0:
                seconds[name].append(took)
    for worker in workers.values():
        worker.send("end")
    return seconds, mb, results


def _serve(connection, make, arguments, repeat):
    before = peak_mb()
    call, first = make(*arguments), True
    while connection.recv() == "turn":
        if repeat > 1:
            call()  # short calls: the turn of another process has left its data in the caches
        start = time.perf_counter()
        for _ in range(repeat):
            result = call()
        _wait()
        connection.send(((time.perf_counter() - start) / repeat, peak_mb() - before, result))
        if first:
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: the compiler's own is not a call's
            first = False


def _wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio(seconds: dict[str, list[float]], peer: str, ours: str) -> dict:
    """How many times faster `ours` is than `peer`: the median over the rounds of their ratio, and its quartiles."""
    ratios = [theirs / mine for theirs, mine in zip(seconds[peer], seconds[ours])]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"ratio": statistics.median(ratios), "quartiles": [low, high]}


def medians(seconds: dict[str, list[float]], unit: str) -> dict[str, float]:
    """The median of each call, as entries "name unit" of a row; unit: s, ms or us."""
    scale = {"s": 1, "ms": 1e3, "us": 1e6}[unit]
    return {f"{name} {unit}": scale * statistics.median(values) for name, values in seconds.items()}


def told(measured: dict) -> str:
    """A ratio with its spread, for a table."""
    low, high = measured["quartiles"]
    return f"{measured['ratio']:.2f} ({low:.2f} to {high:.2f})"


def flops(call: Callable) -> int:
    """Floating point operations of a call's convolutions and matrix products, two for a multiplication and its addition."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def peak_rate(dtype: torch.dtype, device: str = "cpu") -> float:
    """FLOP/s of the best of a large matrix product and three 3x3 convolutions: what this machine gives, as measured."""
    n = 2048
    a, b = torch.randn(2, n, n, dtype=dtype, device=device)
    best = min(in_turns({"": lambda: a @ b}, rounds=7)[""])
    rates = [2 * n**3 / best]
    for channels, side in ((128, 32), (256, 16), (256, 32)):
        x = torch.randn(8, channels, side, side, dtype=dtype, device=device).to(memory_format=torch.channels_last)
        conv = torch.nn.Conv2d(channels, channels, 3, padding=1, dtype=dtype, device=device)
        conv.to(memory_format=torch.channels_last)
        with torch.no_grad():
            best = min(in_turns({"": lambda conv=conv, x=x: conv(x)}, rounds=7)[""])
        rates.append(2 * 9 * channels**2 * 8 * side**2 / best)
    return max(rates)


def peak_mb() -> float:
    """Peak of the resident set of this process alone; getrusage's counts that of the one that started it too."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def machine() -> dict:
    """Versions, processor and threads."""
    found = {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in facts.get("flags", "").split()]
    return f"{os.cpu_count()} x {facts.get('model name', platform.machine())} ({' '.join(flags)})"


def has_bfloat16() -> bool:
    """Whether the device has instructions for bfloat16; without them it is slower than float32."""
    return torch.cuda.is_available() or any(flag in _processor() for flag in ("avx512_bf16", "amx_bf16"))


def _commit():
    """The commit of what is measured, "-dirty" where the tree is not it; results that are being written do not count."""

    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "src", "training", "benchmarks/*.py")
    return git("rev-parse", "--short=10", "HEAD") + ("-dirty" if changed else "")


def record(name: str, title: str, row: dict, keys: Iterable[str], hidden: Iterable[str] = ()) -> None:
    """Prints a row of results; puts it into results/NAME.json and the table NAME.md, where each machine has its own.

    It takes the place of a row of this machine with the same values of `keys`; keys of `hidden` are left out of the table.
    """
    here, path, keys = machine(), RESULTS / f"{name}.json", list(keys)
    row = {**row, "commit": _commit()}
    sections = json.loads(path.read_text()) if path.is_file() else []
    section = next((section for section in sections if section["machine"] == here), None)
    if section is None:
        section = {"machine": here, "rows": []}
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
        return told(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
