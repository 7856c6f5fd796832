"""A pretended accelerator for a CPU build of torch; README.md beside this says what it shows and what not."""

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import yaml

SOURCE = Path(__file__).with_name("accelerator.cpp")
ROOT = Path(__file__).parents[3]
BUILD = ROOT / "build" / "simulated_accelerator"
# Whose kernels for the CPU are taken whole: torch's own decomposition asks for libraries of the device, or rounds otherwise.
FORCED = ("convolution", "convolution_backward", "native_group_norm", "native_layer_norm")
MPS_ON_CPU = ("_linalg_svd", "_linalg_svd.U")  # torch itself moves these to the CPU and back

library = None  # kept: torch calls into it
counter = None  # of the waits, while they are counted


def build() -> Path:
    """The shared library, compiled (a minute) if it is not there for this source and this torch."""
    folder = _folder("torch")
    digest = hashlib.sha256(SOURCE.read_bytes() + importlib.metadata.version("torch").encode()).hexdigest()[:16]
    target = BUILD / f"accelerator-{digest}.so"
    if not target.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        include = [f"-I{folder}/include", f"-I{folder}/include/torch/csrc/api/include"]
        link = [f"-L{folder}/lib", f"-Wl,-rpath,{folder}/lib", "-Wl,--no-as-needed", "-ltorch_cpu", "-lc10"]
        temporary = target.with_suffix(f".{os.getpid()}")
        command = ["g++", "-std=c++20", "-O1", "-w", "-fPIC", "-shared", *include, str(SOURCE), *link]
        subprocess.run([*command, "-o", str(temporary)], check=True)
        os.replace(temporary, target)
    return target


def _folder(package):
    """Of a package that is not imported yet."""
    return Path(importlib.util.find_spec(package).submodule_search_locations[0])


def _operators(kind: str) -> tuple[list[str], list[str]]:
    """Of torch's own table of operators: those the device has no kernel for, and those that take a scalar of the host."""
    path = _folder("torchgen") / "packaged/ATen/native/native_functions.yaml"
    functions = {f["func"].split("(")[0]: f for f in yaml.load(path.read_text(), yaml.CSafeLoader)}

    def kernels(function):
        delegate = functions.get(function.get("structured_delegate"), {})
        keys = {**delegate.get("dispatch", {}), **function.get("dispatch", {})}
        return {key.strip() for names in keys for key in names.split(",")}

    missing, scalars = [], []
    for name, function in functions.items():
        keys = kernels(function)
        if "CPU" in keys and kind.upper() not in keys and not any(key.startswith("Composite") for key in keys):
            missing += [] if kind == "mps" and name in MPS_ON_CPU else [f"aten::{name}"]
        if function.get("device_check") == "NoCheck":
            scalars.append(f"aten::{name}")
    return missing, scalars


def start(kind: str) -> None:
    """Gives torch a device "cuda" or "mps" for the rest of the process; before torch is imported, for it looks for one then."""
    global library
    if "torch" in sys.modules:
        raise RuntimeError("torch is imported already; start the simulated accelerator before")
    library = ctypes.CDLL(str(build()))
    missing, scalars = _operators(kind)
    library.start(*("\n".join(names).encode() for names in ([kind], FORCED, missing, scalars)))

    import torch

    torch.serialization.register_package(0, lambda storage: None, functools.partial(_storage_on_device, torch, kind))
    torch.UntypedStorage.clone = functools.partialmethod(_clone_storage, torch)
    library.share_default_generator()
    replace = _replace_cuda if kind == "cuda" else _replace_mps
    replace(torch, torch.Generator(kind))
    library.keep = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p)(_waited)
    library.on_wait(library.keep)


def _storage_on_device(torch, kind, storage, location):
    """torch.load's storage at a location of the device, which torch itself makes only where it has been built for it."""
    if location.startswith(kind):
        return torch.empty(0, dtype=torch.uint8).set_(storage).to(kind).untyped_storage()


def _clone_storage(storage, torch):
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).clone().untyped_storage()


def _nothing(*names):
    """Functions of these names that do nothing, each one of its own: torch's compiler keeps a table of them."""
    return {name: lambda *args, **kwargs: None for name in names}


def _seeding(generator):
    """The functions of `torch.cuda` and `torch.mps` that seed, and save and restore, the default generator."""
    return {
        "manual_seed": lambda seed: generator.manual_seed(int(seed)) and None,
        "get_rng_state": lambda *device: generator.get_state(),
        "set_rng_state": lambda state, *device: generator.set_state(state) and None,
    }


def _replace_cuda(torch, generator):
    cuda = torch.cuda
    seeding = _seeding(generator)
    several = {
        "manual_seed_all": seeding["manual_seed"],
        "get_rng_state_all": lambda: [generator.get_state()],
        "set_rng_state_all": lambda states: seeding["set_rng_state"](states[0]),
    }
    for name, function in {**seeding, **several}.items():
        setattr(cuda, name, function)
        setattr(cuda.random, name, function)
    replaced = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *args, **kwargs: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda *device: "simulated",
        "get_device_capability": lambda *device: (9, 0),
        "max_memory_allocated": lambda *device: 0,
        "synchronize": lambda *device: _waited(b"synchronize", b"torch.cuda.synchronize"),
        "default_generators": (generator,),
        "device": lambda index: contextlib.nullcontext(),
        "_initialized": True,
        **_nothing("_lazy_init", "set_device", "empty_cache", "reset_peak_memory_stats"),
    }
    for name, value in replaced.items():
        setattr(cuda, name, value)
    cuda.amp.common.amp_definitely_not_available = lambda: False


def _replace_mps(torch, generator):
    mps, backend = torch.mps, torch.backends.mps
    replaced = {
        **_seeding(generator),
        "_get_default_mps_generator": lambda: generator,
        "device_count": lambda: 1,
        "current_allocated_memory": lambda: 0,
        **_nothing("synchronize", "empty_cache"),
    }
    for name, value in replaced.items():
        setattr(mps, name, value)
    for name in ("is_available", "is_built", "is_macos_or_newer", "is_macos13_or_newer"):
        setattr(backend, name, lambda *args: True)


def _waited(why, what):
    if counter is None:
        return
    frame, place = sys._getframe(1), "?"
    while frame:
        file = frame.f_code.co_filename
        if file.startswith(str(ROOT)) and not file.startswith(str(Path(__file__).parent)) and "/.venv/" not in file:
            place = f"{Path(file).name}:{frame.f_lineno}"
            break
        frame = frame.f_back
    counter[f"{why.decode()} by {what.decode()} at {place}"] += 1


@contextlib.contextmanager
def count_waits():
    """Within this context: a Counter of the times that the host waited for the device, each with its reason and its line."""
    global counter
    counter = Counter()
    try:
        yield counter
    finally:
        counter = None
