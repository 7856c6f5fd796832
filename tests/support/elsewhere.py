"""Pipelines opened in new processes, with and without the package."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import torch

import ddpm_hf

ROUNDING = 1e-5  # of images: weights read anew may lie elsewhere in memory, and sums be taken in another order

# prints the classes and what was logged; saves samples and the weights, and a pipeline opened as remote code once more
OPEN = """
    import logging, sys, warnings
    import numpy as np, torch
    opener, x, out, steps = sys.argv[1:]
    if opener != "package":
        sys.modules["ddpm_hf"] = None  # not importable
    import diffusers
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    diffusers.utils.logging.add_handler(handler)
    kwargs = {
        "stock": {},
        "package": {},
        "remote": {"custom_pipeline": x, "trust_remote_code": True},
        "branch": {"revision": "remote-code", "trust_remote_code": True},
    }[opener]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if opener == "package":
            from ddpm_hf import DDPMImagePipeline as Opened
        else:
            Opened = diffusers.DiffusionPipeline
        pipe = Opened.from_pretrained(x, **kwargs)
    messages = [m for m in records if "trust" not in m.lower()]
    messages += [str(w.message) for w in caught if issubclass(w.category, UserWarning) and "diffusers" in w.filename]
    generator = torch.Generator().manual_seed(0)
    images = pipe(batch_size=2, generator=generator, num_inference_steps=int(steps), output_type="np").images
    np.save(out, images)
    torch.save(pipe.unet.state_dict(), out + ".pt")
    print(type(pipe).__name__, type(pipe.unet).__name__, type(pipe.scheduler).__name__, getattr(pipe.scheduler, "levels", None))
    print("messages:", messages)
    if opener == "remote":
        pipe.save_pretrained(out + "_again")
"""


def run_elsewhere(code, home, *argv, package=True, offline=False):
    """What code prints in a new process with a home of its own, on the Hub of conftest.py."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),  # as here: sums of as many parts, the same pixels
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_MODULES_CACHE": f"{home}/modules",
        "PYTHONPATH": str(Path(ddpm_hf.__file__).parents[1]) if package else "",
    }
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, argv)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def open_elsewhere(opener, x, out, home, steps):
    """Opens the folder or Hub id x by `opener`: stock, package, remote or branch."""
    return run_elsewhere(OPEN, home, opener, x, out, steps, package=opener == "package", offline=Path(x).is_dir())
