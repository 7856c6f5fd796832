"""Time a training step, forward to EMA, and its peak memory: ours and diffusers' `train_unconditional.py`.

    python benchmarks/training_step.py [--networks quarter] [--precisions float32]

Stock is the step of that script's loop with its default optimizer and EMA. Ours is the step of training/train.py, eager and
with `--compile true` (and `--channels_last auto`), without the log and the check for finite steps (for these see
benchmarks/training_overhead.py). The variants take turns, each in its own process, because allocator settings affect the whole
process. Peak memory is the largest resident set in the steps after the first one, minus that before the network was made.
"""

import argparse

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from measure import has_bfloat16, in_turns_in_processes, medians, ratio, record
from networks import make_network
from torch.nn.utils import clip_grad_norm_

from ddpm_hf import DDPMUNet, DiffusionObjective, UniformTimesteps, VariationalDDPMScheduler
from ddpm_hf.fast.allocator import keep_freed_memory
from ddpm_hf.training.config import TrainConfig
from ddpm_hf.training.devices import channels_last, compile_network

BATCH_SIZES = {"digits": 64, "quarter": 32, "cifar10": 16}
VARIANTS = ("stock", "stock compiled", "ours", "ours compiled")


def make_step(variant, name, precision):
    """Return a call that runs one training step of a new network."""
    unet = make_network(name, UNet2DModel if variant.startswith("stock") else DDPMUNet).train()
    size, channels = unet.config.sample_size, unet.config.in_channels
    x_start = torch.rand(BATCH_SIZES[name], channels, size, size) * 2 - 1
    compiled, is_bfloat16 = variant.endswith("compiled"), precision == "bfloat16"
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=is_bfloat16)
    return (stock_step if variant.startswith("stock") else our_step)(unet, x_start, compiled, autocast, is_bfloat16)


def stock_step(unet, x_start, compiled, autocast, is_bfloat16):
    scheduler = DDPMScheduler()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    ema = EMAModel(unet.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    model = torch.compile(unet) if compiled else unet

    def step():
        noise = torch.randn(x_start.shape)
        timesteps = torch.randint(0, 1000, (len(x_start),)).long()
        with autocast:
            output = model(scheduler.add_noise(x_start, noise, timesteps), timesteps).sample
        loss = F.mse_loss(output.float(), noise.float())
        loss.backward()
        clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        loss.detach().item()

    return step


def our_step(unet, x_start, compiled, autocast, is_bfloat16):
    device, config = x_start.device, TrainConfig(compile=compiled, mixed_precision="bf16" if is_bfloat16 else "no")
    keep_freed_memory()
    if channels_last(config, device):
        unet.to(memory_format=torch.channels_last)
    if compiled:
        compile_network(unet, config, device)
    scheduler = VariationalDDPMScheduler()
    objective, timesteps = DiffusionObjective(scheduler), UniformTimesteps(scheduler)
    optimizer = torch.optim.AdamW(unet.parameters(), 2e-4, weight_decay=0.0, fused=True)
    ema = EMAModel(unet.parameters(), decay=0.9999, foreach=True)

    def step():
        t, weights = timesteps.sample(len(x_start), device)
        with autocast:
            losses = objective(unet, x_start, None, t)
        (weights * losses).mean().backward()
        clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())

    return step


def measure(name, precision, rounds):
    seconds, memory, _ = in_turns_in_processes(
        {variant: (make_step, variant, name, precision) for variant in VARIANTS}, rounds, warmup=2
    )
    return {
        "network": name,
        "batch": BATCH_SIZES[name],
        "precision": precision,
        **medians(seconds, "ms"),
        "as it is, times stock": ratio(seconds, "stock", "ours"),
        "compiled, times stock": ratio(seconds, "stock", "ours compiled"),
        "compiled, times stock compiled": ratio(seconds, "stock compiled", "ours compiled"),
        "memory, of stock": memory["ours"] / memory["stock"],
        "memory compiled, of stock": memory["ours compiled"] / memory["stock"],
        "memory MB": memory,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="+", default=list(BATCH_SIZES), choices=list(BATCH_SIZES))
    precisions = ["float32", "bfloat16"]
    parser.add_argument("--precisions", nargs="+", default=precisions[: 1 + has_bfloat16()], choices=precisions)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    for name in arguments.networks:
        for precision in arguments.precisions:
            row = measure(name, precision, arguments.rounds)
            record("training_step", "A training step", row, keys=("network", "precision"), hidden=("memory MB",))


if __name__ == "__main__":
    main()
