"""Profile a forward pass and a training step by operator: stock, ours and ours compiled.

    python benchmarks/profiles.py

Ours is `InferenceUNet` in the forward pass and `DDPMUNet` in training. Writes benchmarks/results/profile_*.txt: tables of
torch's profiler, sorted by the time in each operator itself. Compiled code is one row, "Call CompiledFxGraph". It contains the
fused group norms, activations, sums and copies.
"""

import torch
from measure import RESULTS
from networks import make_pair
from torch.profiler import profile
from training_step import BATCH_SIZES, make_step

from ddpm_hf import InferenceUNet
from ddpm_hf.files.atomic import write_text

CALLS = 3


def profile_table(call):
    """Profile CALLS calls after a warm-up call, and return the table."""
    call()
    with profile() as profiler:
        for _ in range(CALLS):
            call()
    table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=16, max_name_column_width=48)
    return "\n".join(line.rstrip() for line in table.splitlines())


@torch.no_grad()
def profile_forward(name, batch_size):
    stock, ours = make_pair(name)
    side, channels = stock.config.sample_size, stock.config.in_channels
    x, t = torch.randn(batch_size, channels, side, side), torch.tensor(500)
    calls = {"stock": stock, "ours": InferenceUNet(ours, compile=False), "ours compiled": InferenceUNet(ours)}
    write(
        f"profile_forward_{name}",
        f"{CALLS} forward passes of {batch_size} images, {name}, float32",
        {variant: profile_table(lambda net=net: net(x, t, return_dict=False)) for variant, net in calls.items()},
    )


def profile_training(name):
    write(
        f"profile_training_{name}",
        f"{CALLS} training steps of {BATCH_SIZES[name]} images, {name}, float32",
        {variant: profile_table(make_step(variant, name, "float32")) for variant in ("stock", "ours", "ours compiled")},
    )


def write(name, title, tables):
    text = title + "\n" + "".join(f"\n{variant}\n{table}\n" for variant, table in tables.items())
    write_text(RESULTS / f"{name}.txt", text)
    print(text, flush=True)


def main():
    torch.manual_seed(0)
    profile_forward("quarter", 16)
    profile_forward("cifar10", 8)
    profile_training("quarter")
    profile_training("cifar10")


if __name__ == "__main__":
    main()
