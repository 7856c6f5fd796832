"""Start-up time of a new process: seconds to import the package, and to the first image of a saved pipeline; ours and stock.

    python benchmarks/cold_start.py

The pipeline is the digits network with ten steps. Each call is a process of its own, and the two take turns. The package is
byte-compiled first, as pip does with packages that it installs, diffusers among them.
"""

import compileall
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import in_turns, medians, ratio, record
from networks import pair

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


def measure(what, programs, rounds=9):
    calls = {
        name: lambda program=program: subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)
        for name, program in programs.items()
    }
    seconds = in_turns(calls, rounds, warmup=1)
    row = {"what": what, **medians(seconds, "s"), "times stock": ratio(seconds, "stock", "ours")}
    record("cold_start", "A new process", row, keys=("what",))


def main():
    compileall.compile_dir(Path(ddpm_hf.__file__).parent, quiet=1)
    measure("import", IMPORTS)
    with tempfile.TemporaryDirectory() as folder:
        DDPMImagePipeline(pair("digits")[1], VariationalDDPMScheduler()).save_pretrained(folder)
        draw = DRAW.format(folder)
        measure("first image", {name: program + draw for name, program in FIRST_IMAGE.items()})


if __name__ == "__main__":
    main()
