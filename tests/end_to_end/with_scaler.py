"""train.py in fp16 on the CPU, with the gradient scaler that accelerate has on GPUs only; it begins high and grows fast."""

import runpy
from pathlib import Path

import accelerate
import torch


class Scaled(accelerate.Accelerator):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.native_amp = True
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=3)


accelerate.Accelerator = Scaled
script = Path(__file__).parents[2] / "training/train.py"
runpy.run_path(str(script), run_name="__main__")
