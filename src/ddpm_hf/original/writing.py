"""Writes networks of this package as checkpoints of other code bases."""

import types
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ddpm_hf.files.atomic import full_disk_as_oserror, replacing_file
from ddpm_hf.original import ho, openai, score_sde
from ddpm_hf.original.files import AVERAGE
from ddpm_hf.original.options import Options
from ddpm_hf.original.pairs import to_theirs


class Format(NamedTuple):
    """A format of checkpoints: the module for its code base, and the end of its files' names."""

    code: types.ModuleType
    suffixes: tuple[str, ...]


FORMATS = {
    "guided-diffusion": Format(openai, (".pt",)),
    "improved-diffusion": Format(openai, (".pt",)),
    "pytorch_diffusion": Format(ho, (".ckpt", ".pt", ".pth")),
    "ddim": Format(ho, (".pth", ".pt", ".ckpt")),
    "diffusion": Format(ho, (".npz",)),
    "score_sde_pytorch": Format(score_sde, (".pth", ".pt")),
}


def original_tensors(
    format: str,
    config: Mapping,
    options: Options,
    tensors: Mapping[str, torch.Tensor],
    sigmas: list[float] | None = None,
) -> dict[str, torch.Tensor]:
    """The tensors of a network by the names and in the layout of a code base, in its order.

    Args:
        format: a name in `FORMATS`.
        config: the arguments of `DDPMUNet` or `NoisyClassifier`.
        options: what the file would not say, see `original.options`.
        tensors: those of the network, by name.
        sigmas: the table of noise levels of score_sde_pytorch; None to compute it.
    """
    code = FORMATS[format].code
    pairs = ho.tensorflow_pairs if format == "diffusion" else code.pairs
    theirs = to_theirs(pairs(config, options, tensors), tensors)
    if code is score_sde:
        explodes = config.get("time_embedding_type") == "fourier" or options.get("sde") == "vesde"
        for name in ("sigma_min", "sigma_max", "num_scales"):
            if explodes and not sigmas and name not in options:
                options.report_missing(name)
        table = torch.tensor(sigmas, dtype=torch.float64) if sigmas else score_sde.noise_levels(options)
        theirs = {"sigmas": table, **theirs}
    return theirs


def write_original(path: Path, format: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes `original_tensors` as a file that the original code opens; averages and weights are the same.

    Raises:
        OSError: the folder is missing or not writable.
    """
    with replacing_file(path) as temporary, full_disk_as_oserror(path):
        if format == "diffusion":
            arrays = {name: tensor.float().numpy() for name, tensor in tensors.items()}
            arrays |= {name + AVERAGE: array for name, array in arrays.items()}
            with temporary.open("wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]  # names are no keywords of savez
        elif format == "ddim":
            wrapped = {f"module.{name}": tensor for name, tensor in tensors.items()}
            torch.save([wrapped, {}, 0, 0, dict(tensors)], temporary)
        elif format == "score_sde_pytorch":
            torch.save(_training_state(tensors), temporary)
        else:
            torch.save(dict(tensors), temporary)


def _training_state(tensors):
    """The state of a run of score_sde_pytorch, with an optimizer that has made no step."""
    averaged = score_sde.averaged_names(tensors)
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.empty(0)) for name in tensors if name != "sigmas"], lr=2e-4)
    return {
        "optimizer": optimizer.state_dict(),
        "model": {f"module.{name}": tensor for name, tensor in tensors.items()},
        "ema": {"decay": 0.9999, "num_updates": None, "shadow_params": [tensors[name] for name in averaged]},
        "step": 0,
    }
