"""The network's forward pass: ours against diffusers' `UNet2DModel`, eager and compiled, float32 and bfloat16.

    python benchmarks/network.py [--networks digits quarter cifar10] [--precisions float32]

Stock is the model as diffusers' documentation runs it, in bfloat16 under autocast; ours is `InferenceUNet` of the same weights,
as `pipe.optimize()` makes it. All of a row take turns in one process. FLOP/s count the plain network's convolutions and matrix
products, also where fewer are done, and are given as shares of the machine's best measured rate.
"""

import argparse

import torch
from measure import flops, has_bfloat16, in_turns, medians, peak_rate, ratio, record
from networks import NETWORKS, pair

from ddpm_hf import InferenceUNet


@torch.no_grad()
def measure(name, batch_size, precision, rounds):
    stock, ours = pair(name)
    side, channels = stock.config.sample_size, stock.config.in_channels
    x, t = torch.randn(batch_size, channels, side, side), torch.tensor(500)
    half = precision == "bfloat16"
    stock_compiled = torch.compile(stock)

    def autocast(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return model(x, t, return_dict=False)[0]

    dtype = torch.bfloat16 if half else None
    eager, compiled = (InferenceUNet(ours, dtype, compile) for compile in (False, True))
    calls = {
        "stock": lambda: autocast(stock),
        "stock compiled": lambda: autocast(stock_compiled),
        "DDPMUNet": lambda: autocast(ours),
        "ours": lambda: eager(x, t, return_dict=False)[0],
        "ours compiled": lambda: compiled(x, t, return_dict=False)[0],
    }
    exact = stock(x, t).sample
    errors = {name: (call().float() - exact).abs().max().item() for name, call in calls.items()}
    seconds = in_turns(calls, rounds, warmup=3, repeat=max(1, min(20, int(200 / batch_size / channels / side))))
    work = flops(lambda: stock(x, t)) / min(seconds["ours compiled"])
    return {
        "network": name,
        "batch": batch_size,
        "precision": precision,
        **medians(seconds, "ms"),
        "eager, times stock": ratio(seconds, "stock", "ours"),
        "compiled, times stock": ratio(seconds, "stock", "ours compiled"),
        "compiled, times stock compiled": ratio(seconds, "stock compiled", "ours compiled"),
        "share of peak": work / peak_rate(torch.bfloat16 if half else torch.float32),
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
                torch.compiler.reset()
                row = measure(name, batch_size, precision, arguments.rounds)
                record("network", "Forward pass", row, keys=("network", "batch", "precision"))


if __name__ == "__main__":
    main()
