"""Time sampling and bits/dim with many steps: ours, diffusers' `DDPMPipeline`, and a plain loop.

    python benchmarks/sampling.py [--steps 1000] [--rounds 7]

Ours is `DDPMImagePipeline` with and without `pipe.optimize()`. Stock is `DDPMPipeline` as in diffusers' documentation,
eager and with its network compiled. "network alone" is the time of our network, the lower limit for sampling.
Likelihoods are of 64 images: ours is `bits_per_dim` of an `InferenceUNet`; stock is diffusers' network with one
timestep per call, and our scheduler's terms. The variants take turns, each in its own process.
"""

import argparse

import torch
from diffusers import DDPMPipeline, DDPMScheduler
from likelihood import one_timestep_per_call
from measure import in_turns_in_processes, medians, ratio, record
from networks import make_pair, network_config

from ddpm_hf import DDPMImagePipeline, InferenceUNet, VariationalDDPMScheduler, bits_per_dim


def make_sampling(variant, name, batch_size, steps):
    """Return a call that draws images (N, H, W, C) from a new pipeline; "network alone" only calls the network as often."""
    stock, ours = make_pair(name)
    scheduler_config = dict(variance_type="fixed_large", timestep_spacing="leading")
    if variant.startswith("stock"):
        pipe = DDPMPipeline(
            torch.compile(stock) if variant == "stock compiled" else stock, DDPMScheduler(**scheduler_config)
        )
    else:
        pipe = DDPMImagePipeline(ours, VariationalDDPMScheduler(**scheduler_config))
    pipe.set_progress_bar_config(disable=True)
    if variant == "ours":
        pipe.optimize()
    fast = InferenceUNet(pipe.unet) if variant == "network alone" else None
    x = torch.randn(batch_size, *sample_shape(name))

    def draw_images():
        generator = torch.Generator().manual_seed(0)
        return pipe(batch_size, generator=generator, num_inference_steps=steps, output_type="np").images

    @torch.no_grad()
    def call_network():
        pipe.scheduler.set_timesteps(steps)
        net = fast.at_timesteps(pipe.scheduler.timesteps)
        for t in pipe.scheduler.timesteps.tolist():
            net(x, t, return_dict=False)

    return call_network if variant == "network alone" else draw_images


def measure_sampling(name, batch_size, steps, rounds):
    variants = ("stock", "stock compiled", "ours as it is", "ours", "network alone")
    makers = {variant: (make_sampling, variant, name, batch_size, steps) for variant in variants}
    seconds, _, images = in_turns_in_processes(makers, rounds, warmup=1)
    return {
        "what": f"sampling, {name}, batch {batch_size}",
        "steps": steps,
        **medians(seconds, "s"),
        "times stock": ratio(seconds, "stock", "ours"),
        "times stock compiled": ratio(seconds, "stock compiled", "ours"),
        "as it is, times stock": ratio(seconds, "stock", "ours as it is"),
        "largest difference": float(abs(images["ours"] - images["ours as it is"]).max()),
    }


def sample_shape(name):
    config = network_config(name)
    return config["in_channels"], config["sample_size"], config["sample_size"]


def make_likelihood(variant, name, steps, num_images, batch_size):
    """Return a call that computes the bound of the same images and returns bits/dim."""
    stock, ours = make_pair(name)
    scheduler = VariationalDDPMScheduler()
    scheduler.set_timesteps(steps)
    x_start = torch.randint(0, 256, (num_images, *sample_shape(name))) / 127.5 - 1
    if variant == "stock":
        return lambda: one_timestep_per_call(stock, scheduler, x_start).mean().item()
    net = ours if variant == "ours as it is" else InferenceUNet(ours)
    batch_size = num_images if variant == "ours" else batch_size
    return lambda: bits_per_dim(net, scheduler, x_start, batch_size=batch_size).mean


def measure_likelihood(name, steps, rounds, num_images=64, batch_size=256):
    variants = ("stock", "ours as it is", "ours", "ours in larger calls")
    makers = {variant: (make_likelihood, variant, name, steps, num_images, batch_size) for variant in variants}
    seconds, _, bits = in_turns_in_processes(makers, rounds, warmup=1)
    return {
        "what": f"bits/dim, {name}, {num_images} images",
        "steps": steps,
        **medians(seconds, "s"),
        "times stock": ratio(seconds, "stock", "ours"),
        "as it is, times stock": ratio(seconds, "stock", "ours as it is"),
        "larger calls, times stock": ratio(seconds, "stock", "ours in larger calls"),
        "bits/dim": {variant: bits[variant] for variant in ("stock", "ours")},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--steps", type=int, default=1000, help="steps of sampling digits; the other tasks use a tenth or a hundredth"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--only", nargs="+", help="tasks: 'sampling digits', 'bits/dim digits', 'sampling quarter', 'bits/dim quarter'"
    )
    arguments = parser.parse_args()
    steps, rounds = arguments.steps, arguments.rounds
    measurements = {
        "sampling digits": lambda: measure_sampling("digits", 1, steps, rounds),
        "bits/dim digits": lambda: measure_likelihood("digits", max(2, steps // 10), rounds),
        "sampling quarter": lambda: measure_sampling("quarter", 64, max(2, steps // 100), rounds),
        "bits/dim quarter": lambda: measure_likelihood("quarter", max(2, steps // 100), rounds),
    }
    for name in arguments.only or measurements:
        row = measurements[name]()
        record(
            "sampling", "Sampling and bits/dim", row, keys=("what", "steps"), hidden=("bits/dim", "largest difference")
        )


if __name__ == "__main__":
    main()
