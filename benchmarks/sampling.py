"""Sampling and bits/dim with all steps of the process: ours, diffusers' `DDPMPipeline`, and a plain loop.

    python benchmarks/sampling.py [--steps 1000] [--rounds 7]

Ours is `DDPMImagePipeline` with and without `pipe.optimize()`; stock is `DDPMPipeline` as in diffusers' documentation, and with
its network compiled. "network alone" is the time of our network, the lower limit for the whole. Likelihoods are of 64 images:
the stock network with one timestep per call and our terms, and `bits_per_dim` of an `InferenceUNet`. All take turns, each in a
process of its own.
"""

import argparse

import torch
from diffusers import DDPMPipeline, DDPMScheduler
from likelihood import one_step_a_call
from measure import in_turns_apart, medians, ratio, record
from networks import config_of, pair

from ddpm_hf import DDPMImagePipeline, InferenceUNet, VariationalDDPMScheduler, bits_per_dim


def make_sampling(kind, name, batch_size, steps):
    """One call draws images (N, H, W, C) from a pipeline of its own; of "network alone", calls its network as often."""
    stock, ours = pair(name)
    process = dict(variance_type="fixed_large", timestep_spacing="leading")
    if kind.startswith("stock"):
        pipe = DDPMPipeline(torch.compile(stock) if kind == "stock compiled" else stock, DDPMScheduler(**process))
    else:
        pipe = DDPMImagePipeline(ours, VariationalDDPMScheduler(**process))
    pipe.set_progress_bar_config(disable=True)
    if kind == "ours":
        pipe.optimize()
    fast = InferenceUNet(pipe.unet) if kind == "network alone" else None
    x = torch.randn(batch_size, *shape_of(name))

    def images():
        generator = torch.Generator().manual_seed(0)
        return pipe(batch_size, generator=generator, num_inference_steps=steps, output_type="np").images

    @torch.no_grad()
    def network_alone():
        pipe.scheduler.set_timesteps(steps)
        net = fast.at_timesteps(pipe.scheduler.timesteps)
        for t in pipe.scheduler.timesteps.tolist():
            net(x, t, return_dict=False)

    return network_alone if kind == "network alone" else images


def sampling(name, batch_size, steps, rounds):
    kinds = ("stock", "stock compiled", "ours as it is", "ours", "network alone")
    makers = {kind: (make_sampling, kind, name, batch_size, steps) for kind in kinds}
    seconds, _, images = in_turns_apart(makers, rounds, warmup=1)
    return {
        "what": f"sampling, {name}, batch {batch_size}",
        "steps": steps,
        **medians(seconds, "s"),
        "times stock": ratio(seconds, "stock", "ours"),
        "times stock compiled": ratio(seconds, "stock compiled", "ours"),
        "as it is, times stock": ratio(seconds, "stock", "ours as it is"),
        "largest difference": float(abs(images["ours"] - images["ours as it is"]).max()),
    }


def shape_of(name):
    config = config_of(name)
    return config["in_channels"], config["sample_size"], config["sample_size"]


def make_likelihood(kind, name, steps, images, rows):
    """One call is the whole bound of the same images; returns bits/dim."""
    stock, ours = pair(name)
    scheduler = VariationalDDPMScheduler()
    scheduler.set_timesteps(steps)
    x_start = torch.randint(0, 256, (images, *shape_of(name))) / 127.5 - 1
    if kind == "stock":
        return lambda: one_step_a_call(stock, scheduler, x_start).mean().item()
    net = ours if kind == "ours as it is" else InferenceUNet(ours)
    return lambda: bits_per_dim(net, scheduler, x_start, batch_size=images if kind == "ours" else rows).mean


def likelihood(name, steps, rounds, images=64, rows=256):
    kinds = ("stock", "ours as it is", "ours", "ours in larger calls")
    makers = {kind: (make_likelihood, kind, name, steps, images, rows) for kind in kinds}
    seconds, _, bits = in_turns_apart(makers, rounds, warmup=1)
    return {
        "what": f"bits/dim, {name}, {images} images",
        "steps": steps,
        **medians(seconds, "s"),
        "times stock": ratio(seconds, "stock", "ours"),
        "as it is, times stock": ratio(seconds, "stock", "ours as it is"),
        "larger calls, times stock": ratio(seconds, "stock", "ours in larger calls"),
        "bits/dim": {kind: bits[kind] for kind in ("stock", "ours")},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1000, help="of batch 1; a tenth of it for the others")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", help="of: 'sampling digits', 'bits/dim digits', and those of quarter")
    arguments = parser.parse_args()
    steps, rounds = arguments.steps, arguments.rounds
    measured = {
        "sampling digits": lambda: sampling("digits", 1, steps, rounds),
        "bits/dim digits": lambda: likelihood("digits", max(2, steps // 10), rounds),
        "sampling quarter": lambda: sampling("quarter", 64, max(2, steps // 100), rounds),
        "bits/dim quarter": lambda: likelihood("quarter", max(2, steps // 100), rounds),
    }
    for name in arguments.only or measured:
        row = measured[name]()
        record(
            "sampling", "Sampling and bits/dim", row, keys=("what", "steps"), hidden=("bits/dim", "largest difference")
        )


if __name__ == "__main__":
    main()
