"""Convert the published configurations at full size, with weights made up, and measure memory and time.

    python benchmarks/original_checkpoints.py [NAME ...]

The shapes of the tensors are those of the original code (tests/golden/checkpoints/published_shapes.json). Each conversion is a
process of its own, which reads a file and writes a folder. The network is built, so every tensor is used once, and fits.
"""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from measure import ROOT, record

SHAPES = ROOT / "tests" / "golden" / "checkpoints" / "published_shapes.json"


def write_checkpoint(case: dict, path: Path) -> None:
    """Write a file with tensors of these shapes, as the original code saves it."""
    generator = torch.Generator().manual_seed(0)
    state = {key: torch.randn(shape, generator=generator) * 0.02 for key, shape in case["keys"]}
    if "sigmas" in state:
        model = case["configuration"]["model"]
        ends = math.log(model["sigma_max"]), math.log(model["sigma_min"])
        state["sigmas"] = torch.linspace(*ends, model["num_scales"], dtype=torch.float64).exp()
        averages = [state[key] for key in state if key not in case["keys_not_in_ema_shadow_params"]]
        model = {f"module.{key}": tensor for key, tensor in state.items()}
        state = {"model": model, "ema": {"decay": 0.999, "num_updates": 1, "shadow_params": averages}, "step": 1}
    path.parent.mkdir(parents=True)
    torch.save(state, path)


def peak_memory(command: list[str]) -> tuple[float, float, float]:
    """Run a command; return its peak memory in GB, that of it which is no file, and its seconds."""
    start, peaks = time.perf_counter(), {"VmRSS": 0, "RssAnon": 0}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        for name in peaks:
            found = re.search(rf"{name}:\s+(\d+) kB", status)
            peaks[name] = max(peaks[name], int(found[1]) if found else 0)
        time.sleep(0.01)
    assert process.returncode == 0, command
    return *(kilobytes * 1024 / 1e9 for kilobytes in peaks.values()), time.perf_counter() - start


def main(chosen: list[str]) -> None:
    for case in json.loads(SHAPES.read_text())["cases"]:
        name = case["files"][0]
        if chosen and name not in chosen:
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, name if name.endswith(".pt") else f"{name}/checkpoint_8.pth")
            if name.endswith(".pt"):
                path = Path(folder, "files", name)
            write_checkpoint(case, path)
            size = path.stat().st_size / 1e9
            command = [sys.executable, "-W", "ignore", "-m", "ddpm_hf", "convert", str(path), "--out", f"{folder}/out"]
            peak, anonymous, seconds = peak_memory(command)
        row = {
            "checkpoint": name,
            "parameters": case["parameters"],
            "tensors": len(case["keys"]),
            "file GB": round(size, 2),
            "peak GB": round(peak, 2),
            "of it not the file GB": round(anonymous, 2),
            "s": round(seconds, 1),
        }
        record("original_checkpoints", "Converting published configurations", row, keys=("checkpoint",))


if __name__ == "__main__":
    main(sys.argv[1:])
