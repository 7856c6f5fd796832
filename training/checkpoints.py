"""Checkpoints of a run: each is whole or not there, and a run that goes on from one ends as if it had not been stopped."""

import dataclasses
import os
import shutil
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator

from config import TrainConfig, checkpoints_in


class Checkpoints:
    """Saves and loads the state of a run in `<output_dir>/checkpoints/<step>/`.

    accelerate keeps the network (as safetensors), the optimizer, the gradient scaler and each process's random states; `parts`
    are all else: objects with `state_dict` and `load_state_dict`, which are the same in every process. A checkpoint is written
    under a name that begins with a dot and renamed when it is whole.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator, **parts):
        self.config, self.accelerator, self.parts = config, accelerator, parts
        self.folder = Path(config.output_dir) / "checkpoints"

    def save(self, step: int) -> None:
        """Writes a checkpoint, then removes all but the newest `keep_checkpoints`."""
        whole, main = self.folder / f"{step:07d}", self.accelerator.is_main_process
        temporary = whole.with_name(f".{whole.name}")
        if main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            (temporary / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(self.config), sort_keys=False))
            torch.save({name: part.state_dict() for name, part in self.parts.items()}, temporary / "run.pt")
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(temporary)
        self.accelerator.wait_for_everyone()
        if main:
            os.replace(temporary, whole)
            for old in checkpoints_in(self.config.output_dir)[: -self.config.keep_checkpoints]:
                shutil.rmtree(old)

    def load(self, path: Path) -> None:
        self.accelerator.load_state(path)
        state = torch.load(path / "run.pt", map_location="cpu", weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
