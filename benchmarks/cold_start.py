"""Compare the start-up time of a new process, ours and stock: import, and first image of a saved pipeline.

    python benchmarks/cold_start.py

The pipeline is the digits network with ten steps. Every measurement starts a new process, and the two packages take turns. Our
package is byte-compiled first, as pip has done with diffusers.
"""

import compileall
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import in_turns, medians, ratio, record
from networks import make_pair

import ddpm_hf
from ddpm_hf import DDPMImagePipeline, VariationalDDPMScheduler

IMPORTS = {
    "stock": "from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel",
    "ours": "from ddpm_hf import DDPMImagePipeline, DDPMUNet, VariationalDDPMScheduler",
}
FIRST_IMAGE = {
    "stock": "from diffusers import DDPMPipeline as Pipeline",
    "ours": "from ddpm_hf import DDPMImagePipeline as Pipeline",
}
DRAW = (
    "; pipe = Pipeline.from_pretrained({!r}); pipe.set_progress_bar_config(disable=True); pipe(num_inference_steps=10)"
)


def measure(task, programs, rounds=9):
    calls = {
        name: lambda program=program: subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)
        for name, program in programs.items()
    }
    seconds = in_turns(calls, rounds, warmup=1)
    row = {"what": task, **medians(seconds, "s"), "times stock": ratio(seconds, "stock", "ours")}
    record("cold_start", "A new process", row, keys=("what",))


def main():
    compileall.compile_dir(Path(ddpm_hf.__file__).parent, quiet=1)
    measure("import", IMPORTS)
    with tempfile.TemporaryDirectory() as folder:
        DDPMImagePipeline(make_pair("digits")[1], VariationalDDPMScheduler()).save_pretrained(folder)
        draw = DRAW.format(folder)
        measure("first image", {name: program + draw for name, program in FIRST_IMAGE.items()})


if __name__ == "__main__":
    main()
