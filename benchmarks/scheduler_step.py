"""Time one `step` of our scheduler and of diffusers' `DDPMScheduler` on the CPU, in turns in one process.

python benchmarks/scheduler_step.py
"""

import torch
from diffusers import DDPMScheduler
from measure import in_turns, medians, ratio, record

from ddpm_hf import VariationalDDPMScheduler

ROUNDS, CALLS = 100, 300  # short rounds: the speed of a shared machine changes within seconds
SHAPE = (1, 3, 32, 32)


def measure(steps):
    """Return a row of results for a chain of `steps`."""
    torch.manual_seed(0)
    x, epsilon, t = torch.randn(SHAPE), torch.randn(SHAPE), torch.tensor(500)
    schedulers = {"diffusers": DDPMScheduler(), "ddpm_hf": VariationalDDPMScheduler()}
    for scheduler in schedulers.values():
        scheduler.set_timesteps(steps)
    calls = {name: lambda s=s: s.step(epsilon, t, x) for name, s in schedulers.items()}
    # every implementation needs at least the noise and the three sums x_0, mean and sample
    calls["elementwise floor"] = lambda: torch.randn(SHAPE).mul_(0.1).add_(x).add_(epsilon).add_(x)
    seconds = in_turns(calls, ROUNDS, warmup=CALLS, repeat=CALLS)
    return {"chain": steps, **medians(seconds, "us"), "times diffusers": ratio(seconds, "diffusers", "ddpm_hf")}


def main():
    for steps in (1000, 50):
        record("scheduler_step", "One step of the scheduler", measure(steps), keys=("chain",))


if __name__ == "__main__":
    main()
