"""Checkpoints of other code bases from the golden files: weights and inputs by formula (tests/golden/checkpoints/README.md)."""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoints"


def cases(code: str) -> dict[str, dict]:
    """The golden cases of a code base by name."""
    content = json.loads((GOLDEN / f"{code}.json").read_text())
    return {case.get("name") or case["files"][0]: case for case in content["cases"]}


def weight(key: str, shape: list[int]) -> torch.Tensor:
    """A tensor by the formula of its name."""
    size = math.prod(shape)
    k = np.arange(size, dtype=np.int64)
    s = np.sin(0.37 * ((k * k) % 10007) + zlib.crc32(key.encode()) % 1000)
    if len(shape) > 1:
        values = s / math.sqrt(size / shape[0])
    else:
        values = 1 + 0.1 * s if key.endswith(".weight") else 0.1 * s
    return torch.from_numpy(values.astype(np.float32).reshape(shape))


def state_dict(case: dict) -> dict[str, torch.Tensor]:
    """The state dict of a golden case."""
    state = {key: weight(key, shape) for key, shape in case["keys"]}
    if "sigmas" in state:
        model = case["configuration"]["model"]
        ends = np.log(model["sigma_max"]), np.log(model["sigma_min"])
        state["sigmas"] = torch.from_numpy(np.exp(np.linspace(*ends, model["num_scales"])))
    return state


def images(case: dict, name: str = "x") -> torch.Tensor:
    """The input of a golden case of this name: "x" or "low_res"."""
    shape = case["inputs"][name]["shape"]
    k = np.arange(math.prod(shape), dtype=np.float64)
    return torch.from_numpy(np.sin({"x": 0.11, "low_res": 0.13}[name] * k).astype(np.float32).reshape(shape))


def relative_error(output: torch.Tensor, expected: dict) -> float:
    """The largest error beside the largest output, both image by image."""
    output = output.double()
    largest = output.flatten(1).abs().amax(1)
    if "values" in expected:
        values = torch.tensor(expected["values"], dtype=torch.float64).reshape(expected["shape"])
        return ((output - values).flatten(1).abs().amax(1) / largest).max().item()
    # of a large output there are the first 64 elements, and 64 from all over
    flat, errors = output.flatten(), []
    for stride, values in ((1, expected["first64"]), (expected["stride"], expected["strided64"])):
        places = torch.arange(len(values)) * stride
        error = (flat[places] - torch.tensor(values, dtype=torch.float64)).abs()
        errors.append((error / largest[places // output[0].numel()]).max().item())
    return max(errors)
