"""What the benchmarks share: calls timed in turns in one process, the machine's own rates, and results as table and JSON."""

import json
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

RESULTS = Path(__file__).parent / "results"
ROUNDS = 9


def in_turns(
    calls: dict[str, Callable], rounds: int = ROUNDS, warmup: int = 2, repeat: int = 1
) -> dict[str, list[float]]:
    """Seconds of each call in each round; within a round every call has its turn, `repeat` times running."""
    for call in calls.values():
        for _ in range(warmup):
            call()
    seconds = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            _wait()
            start = time.perf_counter()
            for _ in range(repeat):
                call()
            _wait()
            seconds[name].append((time.perf_counter() - start) / repeat)
    return seconds


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


def machine() -> dict:
    """Versions, processor, threads and commit."""
    found = {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "commit": _git("describe", "--always", "--dirty", "--abbrev=10"),
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


def _git(*arguments):
    told = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
    return told.stdout.strip() or None


def write(name: str, title: str, columns: Iterable[str], rows: list[dict], **more) -> None:
    """Prints the columns of the rows as a markdown table; writes it, and everything with the machine, to results/."""
    columns = list(columns)
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(column, "")) for column in columns) + " |" for row in rows]
    here = machine()
    text = (
        f"# {title}\n\n" + "\n".join(lines) + "\n\n" + ", ".join(f"{key} {value}" for key, value in here.items()) + "\n"
    )
    print(f"\n{text}", flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text)
    (RESULTS / f"{name}.json").write_text(
        json.dumps({"machine": here, **more, "rows": rows}, indent=2, default=_cell) + "\n"
    )


def _cell(value):
    if isinstance(value, dict):
        return told(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
