"""Time the metrics of `ddpm_hf.evaluation.metrics` and measure their memory, on random features.

    python benchmarks/metrics.py [--count 50000] [--dimensions 2048] [--device cuda] [--metrics NAME ...]

Each metric runs once, in a process of its own, on as many real as generated images. "CPU s" is the time of all threads, which
other programs on the machine change little. "peak MB" is what the metric adds to the
memory that holds the features: of the processor, or of the accelerator where there is one.
"""

import argparse
import multiprocessing
import time
from pathlib import Path

import torch
from measure import peak_mb, record

from ddpm_hf.evaluation.metrics import (
    Moments,
    compare_manifolds,
    frechet_at_infinity,
    frechet_distance,
    frechet_error,
    inception_score,
    kernel_distance,
)

METRICS = {
    "moments": lambda real, generated: Moments.of(generated),
    "Fréchet distance": frechet_distance,
    "error of the Fréchet distance": frechet_error,
    "limit of the Fréchet distance": lambda real, generated: frechet_at_infinity(real, generated, standard_error=0.0),
    "kernel distance": kernel_distance,
    "inception score": lambda real, generated: inception_score(generated),
    "precision, recall, density, coverage": compare_manifolds,
}


def measure(name, count, dimensions, device, connection):
    """Send the seconds and the peak MB of a metric."""
    generator = torch.Generator(device).manual_seed(0)
    real, generated = torch.randn(2, count, dimensions, device=device, generator=generator)
    METRICS[name](real[:100], generated[:100])  # load the libraries
    on_accelerator = torch.device(device).type == "cuda"
    if on_accelerator:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    else:
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak to what is held now
        before = peak_mb()
    start, cpu_start = time.perf_counter(), time.process_time()
    METRICS[name](real, generated)
    if on_accelerator:
        torch.cuda.synchronize()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_accelerator else peak_mb()
    connection.send({"s": seconds, "CPU s": cpu_seconds, "peak MB": round(peak - before)})


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=50000)
    parser.add_argument("--dimensions", type=int, default=2048)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--metrics", nargs="+", default=list(METRICS), choices=list(METRICS))
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    for name in arguments.metrics:
        size = arguments.count, arguments.dimensions
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=measure, args=(name, *size, arguments.device, sender))
        process.start()
        sender.close()  # so that recv() raises EOFError if the process fails
        row = {"metric": name, "device": arguments.device, "images": size[0], "features": size[1], **receiver.recv()}
        process.join()
        record("metrics", "Metrics", row, keys=("metric", "device", "images", "features"))


if __name__ == "__main__":
    main()
