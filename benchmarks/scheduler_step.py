"""Microseconds of one `step` on the CPU, ours against diffusers' `DDPMScheduler`, interleaved in one process.

python benchmarks/scheduler_step.py
"""

import json
import platform
import statistics
import time
from pathlib import Path

import diffusers
import torch
from diffusers import DDPMScheduler

from ddpm_hf import VariationalDDPMScheduler

ROUNDS, CALLS = 100, 300  # short rounds: the speed of a shared machine changes within seconds
SHAPE = (1, 3, 32, 32)


def microseconds(function):
    start = time.perf_counter()
    for _ in range(CALLS):
        function()
    return (time.perf_counter() - start) / CALLS * 1e6


def main():
    torch.manual_seed(0)
    x, epsilon, t = torch.randn(SHAPE), torch.randn(SHAPE), torch.tensor(500)
    schedulers = {"diffusers": DDPMScheduler(), "ddpm_hf": VariationalDDPMScheduler()}
    rows = []
    for steps in (1000, 50):
        for scheduler in schedulers.values():
            scheduler.set_timesteps(steps)
        calls = {name: lambda s=s: s.step(epsilon, t, x) for name, s in schedulers.items()}
        # what no implementation can do without: the noise, and the three sums x_0, mean, sample
        calls["elementwise floor"] = lambda: torch.randn(SHAPE).mul_(0.1).add_(x).add_(epsilon).add_(x)
        for call in calls.values():
            microseconds(call)
        times = {name: [] for name in calls}
        for _ in range(ROUNDS):
            for name, call in calls.items():
                times[name].append(microseconds(call))
        ratios = [theirs / ours for theirs, ours in zip(times["diffusers"], times["ddpm_hf"])]
        rows.append(
            {
                "chain": steps,
                **{name: round(statistics.median(values), 1) for name, values in times.items()},
                "ratio": round(statistics.median(ratios), 2),
                "ratio_quartiles": [round(q, 2) for q in statistics.quantiles(ratios, n=4)[::2]],
            }
        )
    machine = {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "shape": SHAPE,
        "rounds": ROUNDS,
        "calls": CALLS,
    }
    print("| chain | diffusers us | ddpm_hf us | elementwise floor us | ratio | quartiles |\n|---|---|---|---|---|---|")
    for row in rows:
        low, high = row["ratio_quartiles"]
        print(
            f"| {row['chain']} | {row['diffusers']} | {row['ddpm_hf']} | {row['elementwise floor']} | {row['ratio']} "
            f"| {low} to {high} |"
        )
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "scheduler_step.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
