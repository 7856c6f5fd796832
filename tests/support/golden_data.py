"""Reads tests/golden/*.json and rebuilds the data and the analytic network that their headers describe."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ddpm_hf.schedulers.betas import space_timesteps
from ddpm_hf.schedulers.ddpm import VariationalDDPMScheduler

SHAPE = (4, 3, 8, 8)
PROBED = [0, 77, 130, 191]
WEIGHTS = torch.from_numpy(np.random.RandomState(777).randn(192))
SEED_X, SEED_Q, SEED_STEP = 1, 2, 4
# In the golden files "linear" is IDDPM's, scaled by 1000 / T.
SCHEDULES = {"linear": "linear_scaled_by_T", "cosine": "cosine"}
PREDICTIONS = {"EPSILON": "epsilon", "START_X": "sample", "PREVIOUS_X": "previous"}


def golden_cases(name, *kinds):
    """The cases of tests/golden/{name}.json, of the given kinds where they have one."""
    cases = json.loads((Path(__file__).parents[1] / "golden" / f"{name}.json").read_text())["cases"]
    return [case for case in cases if not kinds or case["kind"] in kinds]


def case_id(case):
    config_keys = (
        "kind",
        "schedule",
        "T",
        "respacing",
        "mean_type",
        "var_type",
        "eta",
        "clip_denoised",
        "section_counts",
    )
    return "-".join(str(case[key]).replace(" ", "") for key in (*config_keys, "t", "t_index") if key in case)


def randn(seed, dtype=torch.float64):
    return torch.from_numpy(np.random.RandomState(seed).randn(*SHAPE)).to(dtype)


def images(dtype=torch.float64):
    """8-bit images in [-1, 1], with more black and white pixels than chance gives."""
    pixels = np.random.RandomState(0).randint(0, 256, SHAPE, dtype=np.int64).reshape(-1)
    pixels[::17] = 0
    pixels[5::23] = 255
    return torch.from_numpy(pixels.reshape(SHAPE) / 127.5 - 1).to(dtype)


def network(x, t, mean_type, var_type=None):
    """The stand-in for a network, of the dtype of x; t: int or (B,)."""
    t = torch.as_tensor(t, dtype=torch.float64).expand(len(x)).reshape(-1, 1, 1, 1)
    if mean_type == "EPSILON":
        output = torch.tanh(0.7 * x + (0.1 * torch.sin(0.01 * t)).to(x.dtype))
    elif mean_type == "START_X":
        output = torch.tanh(0.5 * x) * torch.cos(0.001 * t).to(x.dtype)
    else:
        output = 0.95 * x + 0.05 * torch.sin(x + (0.01 * t).to(x.dtype))
    if var_type in ("LEARNED", "LEARNED_RANGE"):
        output = torch.cat((output, 0.3 * torch.sin(x + (0.02 * t).to(x.dtype))), dim=1)
    return output


def case_scheduler(case, **overrides):
    scheduler = VariationalDDPMScheduler(
        **{
            "num_train_timesteps": case["T"],
            "beta_schedule": SCHEDULES[case["schedule"]],
            "variance_type": case.get("var_type", "FIXED_SMALL").lower(),
            "prediction_type": PREDICTIONS[case.get("mean_type", "EPSILON")],
            "clip_sample": case.get("clip_denoised", True),
        }
        | overrides
    )
    if "respacing" in case:
        scheduler.set_timesteps(timesteps=space_timesteps(case["T"], case["respacing"])[::-1])
    return scheduler


def assert_fingerprint(actual, stored, rtol=0.0, atol=0.0):
    """Compares a (4, ...) tensor with the numbers that the golden file keeps of it."""
    assert actual.shape == SHAPE
    flat = actual.double().flatten(1)
    if "const" in stored:
        expected = torch.tensor(stored["const"], dtype=torch.float64)
        torch.testing.assert_close(flat, expected[:, None].expand_as(flat), rtol=rtol, atol=atol)
        return
    fingerprint = {"probe": flat[:, PROBED], "mean": flat.mean(1), "dot": (flat * WEIGHTS).mean(1)}
    for name, value in fingerprint.items():
        expected = torch.tensor(stored[name], dtype=torch.float64)
        torch.testing.assert_close(value, expected, rtol=rtol, atol=atol, msg=partial("{}: {}".format, name))
