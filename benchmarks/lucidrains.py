"""Compare with lucidrains' denoising-diffusion-pytorch at equal parameter count: a training step and sampling, float32.

    python -m venv lucid
    lucid/bin/pip install torch==2.14.1 torchvision==0.29.1 denoising-diffusion-pytorch ".[train]"
    lucid/bin/python benchmarks/lucidrains.py

That package needs torchvision, which constraints.txt does not include, so this benchmark needs a separate environment. Its
network is the `Unet` of its README (dim_mults 1, 2, 4, 8); its width is chosen so that the number of parameters is nearest to
ours. Its training step is that of its `Trainer`. The two networks differ in their blocks and in the resolutions with attention,
so the table also gives the FLOP of a forward pass of one image.
"""

import argparse
import contextlib

import torch
from denoising_diffusion_pytorch import GaussianDiffusion, Unet
from ema_pytorch import EMA
from measure import flops, in_turns, medians, ratio, record
from networks import network_config
from training_step import our_step

from ddpm_hf import DDPMImagePipeline, DDPMUNet, VariationalDDPMScheduler

STEPS = 50


def nearest_unet(parameters, side):
    """Return their model with the width whose number of parameters is nearest to `parameters`."""
    width = min(range(8, 136, 8), key=lambda dim: abs(count_parameters(Unet(dim, dim_mults=(1, 2, 4, 8))) - parameters))
    return GaussianDiffusion(Unet(width, dim_mults=(1, 2, 4, 8)), image_size=side, timesteps=STEPS)


def our_unet(name):
    """Return our network without dropout, because theirs has none."""
    unet = DDPMUNet(**network_config(name) | {"dropout": 0.0})
    unet.reset_parameters("torch")
    return unet


def count_parameters(net):
    return sum(p.numel() for p in net.parameters())


def their_step(diffusion, images):
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99))
    ema = EMA(diffusion, beta=0.995, update_every=10)

    def step():
        loss = diffusion(images)
        loss.item()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    return step


def measure(name, train_batch, sample_batch, rounds):
    ours = our_unet(name)
    side = ours.config.sample_size
    theirs = nearest_unet(count_parameters(ours), side)
    images = torch.rand(train_batch, 3, side, side)
    image, t = torch.randn(1, 3, side, side), torch.tensor([500])
    forward_flop = {
        "GFLOP": flops(lambda: ours(image, t)) / 1e9,
        "their GFLOP": flops(lambda: theirs.model(image, t)) / 1e9,
    }
    shared = {
        "network": name,
        "parameters": count_parameters(ours),
        "their parameters": count_parameters(theirs.model),
        **forward_flop,
    }

    no_autocast, x_start = contextlib.nullcontext(), images * 2 - 1
    calls = {
        "theirs": their_step(theirs.train(), images),
        "ours": our_step(ours.train(), x_start, False, no_autocast, False),
    }
    calls["ours compiled"] = our_step(our_unet(name).train(), x_start, True, no_autocast, False)
    record_row(shared, f"training step, {train_batch} images", in_turns(calls, rounds))

    plain = DDPMImagePipeline(our_unet(name).eval(), VariationalDDPMScheduler(STEPS))
    fast = DDPMImagePipeline(plain.unet, VariationalDDPMScheduler(STEPS))
    fast.optimize()
    for pipe in (plain, fast):
        pipe.set_progress_bar_config(disable=True)
    theirs.eval()
    calls = {
        "theirs": lambda: theirs.sample(sample_batch),
        "ours": lambda: plain(sample_batch, output_type="np"),
        "ours compiled": lambda: fast(sample_batch, output_type="np"),
    }
    record_row(shared, f"{STEPS} steps of sampling, {sample_batch} images", in_turns(calls, rounds, warmup=1))


def record_row(shared, task, seconds):
    ratios = {f"{name}, times theirs": ratio(seconds, "theirs", name) for name in ("ours", "ours compiled")}
    keys = ("network", "what")
    record(
        "lucidrains",
        "Against denoising-diffusion-pytorch",
        {"what": task, **shared, **medians(seconds, "s")} | ratios,
        keys,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="+", default=["quarter"], choices=["quarter", "cifar10"])
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    for name in arguments.networks:
        measure(name, 16 if name == "quarter" else 4, 1, arguments.rounds)


if __name__ == "__main__":
    main()
