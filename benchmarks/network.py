"""The network's forward pass: ours against diffusers' `UNet2DModel`, eager and compiled, float32 and bfloat16.

    python benchmarks/network.py [--networks digits quarter cifar10] [--precisions float32]

Stock is the model as in diffusers' documentation, in bfloat16 under autocast; ours is `InferenceUNet` with the same weights, as
`pipe.optimize()` makes it. The variants in a row take turns, each in a process of its own, because settings of the allocator
affect a whole process. FLOP/s count the convolutions and matrix products of the plain network, even where fewer are computed,
and are given as shares of the machine's best measured rate.
"""

import argparse

import torch
from diffusers import UNet2DModel
from measure import flops, has_bfloat16, in_turns_apart, medians, peak_rate, ratio, record
from networks import NETWORKS, network, pair

from ddpm_hf import InferenceUNet

KINDS = ("stock", "stock compiled", "DDPMUNet", "ours", "ours compiled")


def make_call(kind, name, batch_size, precision):
    """One call is one forward pass of a network of its own; returns the output."""
    stock, ours = pair(name)
    side, channels = stock.config.sample_size, stock.config.in_channels
    x, t = torch.randn(batch_size, channels, side, side), torch.tensor(500)
    half = precision == "bfloat16"
    if kind.startswith("ours"):
        unet, half = InferenceUNet(ours, torch.bfloat16 if half else None, kind == "ours compiled"), False
    else:
        unet = {"stock": stock, "stock compiled": torch.compile(stock), "DDPMUNet": ours}[kind]

    @torch.no_grad()
    def call():
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return unet(x, t, return_dict=False)[0]

    return call


def measure(name, batch_size, precision, rounds):
    stock = network(name, UNet2DModel)
    side, channels = stock.config.sample_size, stock.config.in_channels
    makers = {kind: (make_call, kind, name, batch_size, precision) for kind in KINDS}
    repeat = max(2, min(20, int(200 / batch_size / channels / side)))
    seconds, _, outputs = in_turns_apart(makers, rounds, warmup=3, repeat=repeat)
    exact = make_call("stock", name, batch_size, "float32")()
    errors = {kind: (output.float() - exact).abs().max().item() for kind, output in outputs.items()}
    x = torch.randn(batch_size, channels, side, side)
    work = flops(lambda: stock(x, 500)) / min(seconds["ours compiled"])
    return {
        "network": name,
        "batch": batch_size,
        "precision": precision,
        **medians(seconds, "ms"),
        "eager, times stock": ratio(seconds, "stock", "ours"),
        "compiled, times stock": ratio(seconds, "stock", "ours compiled"),
        "compiled, times stock compiled": ratio(seconds, "stock compiled", "ours compiled"),
        "share of peak": work / peak_rate(torch.bfloat16 if precision == "bfloat16" else torch.float32),
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
