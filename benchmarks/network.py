"""Time the network's forward pass: ours against diffusers' `UNet2DModel`, eager and compiled, float32 and bfloat16.

    python benchmarks/network.py [--networks digits quarter cifar10] [--precisions float32]

Stock is the model as in diffusers' documentation, under autocast for bfloat16. Ours is `InferenceUNet` with the same
weights, as made by `pipe.optimize()`. The variants of a row take turns, each in its own process, because allocator
settings affect the whole process. FLOP/s count the convolutions and matrix products of the plain network, even if a
variant computes fewer; the table gives them as a share of the machine's measured peak rate.
"""

import argparse

import torch
from diffusers import UNet2DModel
from measure import flops, has_bfloat16, in_turns_in_processes, medians, peak_rate, ratio, record
from networks import NETWORKS, make_network, make_pair

from ddpm_hf import InferenceUNet

VARIANTS = ("stock", "stock compiled", "DDPMUNet", "ours", "ours compiled")


def make_call(variant, name, batch_size, precision):
    """Return a call that runs one forward pass of a new network and returns the output."""
    stock, ours = make_pair(name)
    side, channels = stock.config.sample_size, stock.config.in_channels
    x, t = torch.randn(batch_size, channels, side, side), torch.tensor(500)
    dtype, autocasts = torch.bfloat16 if precision == "bfloat16" else None, False
    if variant.startswith("ours"):
        unet = InferenceUNet(ours, dtype, variant == "ours compiled")
    else:
        autocasts = dtype is not None
        unet = {"stock": stock, "stock compiled": torch.compile(stock), "DDPMUNet": ours}[variant]

    @torch.no_grad()
    def call():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocasts):
            return unet(x, t, return_dict=False)[0]

    return call


def measure(name, batch_size, precision, rounds):
    """Return a row of results: times, ratios, share of the peak rate, and errors against stock's float32 output."""
    stock = make_network(name, UNet2DModel)
    side, channels = stock.config.sample_size, stock.config.in_channels
    makers = {variant: (make_call, variant, name, batch_size, precision) for variant in VARIANTS}
    repeat = max(2, min(20, int(200 / batch_size / channels / side)))
    seconds, _, outputs = in_turns_in_processes(makers, rounds, warmup=3, repeat=repeat)
    reference = make_call("stock", name, batch_size, "float32")()
    errors = {variant: (output.float() - reference).abs().max().item() for variant, output in outputs.items()}
    x = torch.randn(batch_size, channels, side, side)
    flop_rate = flops(lambda: stock(x, 500)) / min(seconds["ours compiled"])
    return {
        "network": name,
        "batch": batch_size,
        "precision": precision,
        **medians(seconds, "ms"),
        "eager, times stock": ratio(seconds, "stock", "ours"),
        "compiled, times stock": ratio(seconds, "stock", "ours compiled"),
        "compiled, times stock compiled": ratio(seconds, "stock compiled", "ours compiled"),
        "share of peak": flop_rate / peak_rate(torch.bfloat16 if precision == "bfloat16" else torch.float32),
        "error stock": errors["stock"],
        "error ours": max(errors["ours"], errors["ours compiled"]),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    precisions = ["float32", "bfloat16"]
    parser.add_argument("--precisions", nargs="+", default=precisions[: 1 + has_bfloat16()], choices=precisions)
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()
    for name in arguments.networks:
        for batch_size in NETWORKS[name]["batch_sizes"]:
            for precision in arguments.precisions:
                row = measure(name, batch_size, precision, arguments.rounds)
                record("network", "Forward pass", row, keys=("network", "batch", "precision"))


if __name__ == "__main__":
    main()
