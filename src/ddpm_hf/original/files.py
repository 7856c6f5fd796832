"""Opens checkpoint files of other code bases without running code from them, and finds the weights in them."""

import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import constants, hf_hub_download
from safetensors.torch import load_file

from ddpm_hf.arguments import listed, shown
from ddpm_hf.original import score_sde
from ddpm_hf.original.pairs import first_five

WEIGHTS = ("ema", "raw")

HUBS = ("huggingface.co", "hf.co", constants.ENDPOINT.partition("://")[2])

AVERAGE = "/ExponentialMovingAverage"  # the end of TensorFlow's names of averages


def local_file(link: str | os.PathLike) -> Path:
    """Returns the local path of a checkpoint; a file on the Hub is downloaded, as diffusers' `from_single_file` does.

    Args:
        link: a path, or https://huggingface.co/<repository>/blob/<revision>/<file>.

    Raises:
        ValueError: an address of another server.
        OSError: there is no such file.
    """
    text = str(link)
    match = re.fullmatch(r"https?://[^/]+/([\w.-]+/[\w.-]+)/(?:blob|resolve)/([^/]+)/(.+)", text)
    if match and text.partition("://")[2].partition("/")[0] in HUBS:
        return Path(hf_hub_download(match[1], match[3], revision=match[2]))
    if "://" in text:
        raise ValueError(f"{shown(text)} is not the address of a file on the Hub; download it, and give its path")
    if not os.path.exists(text):
        raise FileNotFoundError(f"there is no file {shown(text)}")
    return Path(text)


def read_tensors(path: Path, weights: str) -> dict[str, torch.Tensor]:
    """Returns the weights in a checkpoint by their original names, without optimizer state.

    The tensors of a file in torch's zip format, of safetensors and of .npy stay on the disk until they are read.

    Args:
        path: a file of torch.save (.pt, .pth, .ckpt), .safetensors or .npz, or a folder of .npy.
        weights: "ema" for the averaged weights where the file has any, "raw" for the others.

    Raises:
        ValueError: the file is damaged or of another kind, would run code, or holds no weights.
        OSError: it is missing or cannot be read.
    """
    if path.is_file() and path.stat().st_size == 0:
        raise ValueError(f"{path} is empty; download it again")
    if path.is_dir() or path.suffix == ".npz":
        return _of_tensorflow(_read_arrays(path), weights, path)
    tensors = _state(_read_content(path), weights, path)
    plain = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    if len(plain) < len(tensors):
        raise ValueError(f"{path} holds tensors twice, with and without 'module.'; save one of each by torch.save")
    if empty := [name for name, tensor in plain.items() if tensor.is_meta]:
        raise ValueError(f"{path} holds the names and shapes of {first_five(empty)} without numbers")
    return plain


def _read_content(path):
    """What the file holds, whatever its form; an untrusted one can make the libraries raise any exception."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    except Exception as error:
        match = re.search(r"GLOBAL ([\w.]+)|global ([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and match:
            raise ValueError(
                f"{path} holds {match[1] or match[2]}, and reading that would run code, so it is not opened; if you trust the "
                "file, open it with torch.load(..., weights_only=False) and save only its state dict"
            ) from None
        kind = "safetensors" if path.suffix == ".safetensors" else "torch.save"
        raise ValueError(f"{path} is damaged, or no file of {kind}; download it again") from error


def _state(content, weights, path) -> Mapping[str, torch.Tensor]:
    """The tensors by name in the content of a file: that of a state dict, of score_sde_pytorch, or of ddim."""
    if isinstance(content, list) and len(content) >= 4 and _is_state(content[0]):  # ddim
        averages = content[-1] if len(content) > 4 and _is_state(content[-1]) else None
        return content[0] if averages is None or weights == "raw" else averages
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not the weights of a network")
    if _is_state(content.get("model")) and isinstance(content.get("ema"), dict):  # score_sde_pytorch
        state = {name.removeprefix("module."): tensor for name, tensor in content["model"].items()}
        shadow_params = content["ema"].get("shadow_params")
        if weights == "raw" or not isinstance(shadow_params, list):
            return state
        try:
            return score_sde.averages(state, shadow_params)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    if _is_state(content.get("state_dict")):  # of Lightning
        return content["state_dict"]
    if not _is_state(content):
        if not content:
            raise ValueError(f"{path} holds no weights")
        if {"state", "param_groups"} <= content.keys():
            raise ValueError(f"{path} holds the state of an optimizer; give the file of the weights beside it")
        raise ValueError(f"{path} has the keys {listed(content)} and no state dict of a network")
    return content


def _is_state(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and len(content) > 0
        and all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in content.items())
    )


def _read_arrays(path):
    """The arrays of an .npz, or of the .npy files in a folder, whose paths in the folder are the names."""
    try:
        if path.is_dir():
            files = {file.relative_to(path).with_suffix("").as_posix(): file for file in sorted(path.rglob("*.npy"))}
            arrays = {name: np.load(file, mmap_mode="c", allow_pickle=False) for name, file in files.items()}
        else:
            with np.load(path, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
    except OSError:
        raise
    except Exception as error:  # an untrusted file can make numpy raise any exception
        raise ValueError(
            f"{path} is damaged, holds more than arrays of numbers, or is larger than the memory"
        ) from error
    if not arrays and (path / "model_index.json").is_file():
        raise ValueError(f"{path} is the folder of a saved pipeline; open it with from_pretrained")
    if not arrays and path.is_dir():
        raise ValueError(f"{path} is a folder without .npy files; give the file of a checkpoint")
    # names without slashes, as files in one folder must have them
    return {name if "/" in name else re.sub(r"__|\.", "/", name): array for name, array in arrays.items()}


def _of_tensorflow(arrays, weights, path):
    """Variables by name, without optimizer slots and counters; the averages have a name that ends in `AVERAGE`."""
    variables = {name: array for name, array in arrays.items() if name.startswith("model/")}
    averages = {name.removesuffix(AVERAGE): array for name, array in variables.items() if name.endswith(AVERAGE)}
    raw = {name: array for name, array in variables.items() if not name.endswith((AVERAGE, "/Adam", "/Adam_1"))}
    chosen = averages if averages and weights == "ema" else raw
    if not chosen:
        raise ValueError(f"{path} has no variable model/...; it holds {first_five(arrays)}")
    wrong = [name for name, array in chosen.items() if array.dtype not in (np.float16, np.float32, np.float64)]
    if wrong:
        raise ValueError(f"{path} has arrays that are not float16, float32 or float64: {first_five(wrong)}")
    return {name: torch.from_numpy(array) for name, array in chosen.items()}
