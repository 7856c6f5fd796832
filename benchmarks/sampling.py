"""Sampling and bits/dim, all steps of the process: ours against diffusers' `DDPMPipeline` and the plain loop.

    python benchmarks/sampling.py [--steps 1000] [--rounds 7]

Ours is `DDPMImagePipeline` after `pipe.optimize()`, and as it is; stock is `DDPMPipeline` as diffusers' documentation
runs it, and with its network compiled. "network alone" is what ours spends in the network: the limit for everything
around it. Likelihoods: 64 images, stock's network at one timestep a call with our terms, against `bits_per_dim` of an
`InferenceUNet`. All take turns in one process.
"""

import argparse

import torch
from diffusers import DDPMPipeline, DDPMScheduler
from likelihood import one_step_a_call
from measure import in_turns, medians, ratio, record
from networks import config_of, pair

from ddpm_hf import DDPMImagePipeline, InferenceUNet, VariationalDDPMScheduler, bits_per_dim


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def sampling(name, batch_size, steps, rounds):
    stock, ours = pair(name)
    process = dict(variance_type="fixed_large", timestep_spacing="leading")
    plain, fast = (quiet(DDPMImagePipeline(ours, VariationalDDPMScheduler(**process))) for _ in range(2))
    fast.optimize()
    pipelines = {
        "stock": quiet(DDPMPipeline(stock, DDPMScheduler(**process))),
        "stock compiled": quiet(DDPMPipeline(torch.compile(stock), DDPMScheduler(**process))),
        "ours as it is": plain,
        "ours": fast,
    }
    seen = {}

    def run(name):
        kwargs = dict(generator=torch.Generator().manual_seed(0), num_inference_steps=steps, output_type="np")
        seen[name] = pipelines[name](batch_size, **kwargs).images

    calls = {name: lambda name=name: run(name) for name in pipelines}
    x = torch.randn(batch_size, *shape_of(name))

    def network_alone():
        timesteps = fast.scheduler.timesteps
        net = fast._network(timesteps)
        for t in timesteps.tolist():
            net(x, t, return_dict=False)

    calls["network alone"] = network_alone
    seconds = in_turns(calls, rounds, warmup=1)
    return {
        "what": f"sampling, {name}, batch {batch_size}",
        "steps": steps,
        **medians(seconds, "s"),
        "times stock": ratio(seconds, "stock", "ours"),
        "times stock compiled": ratio(seconds, "stock compiled", "ours"),
        "as it is, times stock": ratio(seconds, "stock", "ours as it is"),
        "largest difference": float(abs(seen["ours"] - seen["ours as it is"]).max()),
    }


def shape_of(name):
    config = config_of(name)
    return config["in_channels"], config["sample_size"], config["sample_size"]


@torch.no_grad()
def likelihood(name, steps, rounds, images=64, rows=256):
    stock, ours = pair(name)
    scheduler, fast = VariationalDDPMScheduler(), InferenceUNet(ours)
    scheduler.set_timesteps(steps)
    x_start = torch.randint(0, 256, (images, *shape_of(name))) / 127.5 - 1

    def whole(net, rows):
        return bits_per_dim(net, scheduler, x_start, batch_size=rows).mean

    calls = {
        "stock": lambda: one_step_a_call(stock, scheduler, x_start),
        "ours as it is": lambda: whole(ours, rows),
        "ours": lambda: whole(fast, images),
        "ours in larger calls": lambda: whole(fast, rows),
    }
    seconds = in_turns(calls, rounds, warmup=1)
    return {
        "what": f"bits/dim, {name}, {images} images",
        "steps": steps,
        **medians(seconds, "s"),
        "times stock": ratio(seconds, "stock", "ours"),
        "as it is, times stock": ratio(seconds, "stock", "ours as it is"),
        "larger calls, times stock": ratio(seconds, "stock", "ours in larger calls"),
        "bits/dim": {"stock": calls["stock"]().mean().item(), "ours": calls["ours"]()},
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
        torch.compiler.reset()
        row = measured[name]()
        record(
            "sampling", "Sampling and bits/dim", row, keys=("what", "steps"), hidden=("bits/dim", "largest difference")
        )


if __name__ == "__main__":
    main()
