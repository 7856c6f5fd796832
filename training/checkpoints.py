"""Checkpoints of a run: each is whole or not there, and a run that goes on from one ends as if it had not been stopped."""

import os
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, load

from config import ConfigError, TrainConfig, as_yaml, checkpoints_in


class Checkpoints:
    """Saves and loads the state of a run in `<output_dir>/checkpoints/<step>/`.

    accelerate keeps the network (as safetensors), the optimizer, the gradient scaler and each process's random states; `parts`
    are all else: objects with `state_dict` and `load_state_dict`, which are the same in every process, but for `at`, the place
    in the data. A checkpoint is written under a name that begins with a dot and renamed when it is whole.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator, at, **parts):
        self.config, self.accelerator, self.at, self.parts = config, accelerator, at, parts
        self.folder = Path(config.output_dir) / "checkpoints"

    def save(self, step: int) -> None:
        """Writes a checkpoint, then removes all but the newest `keep_checkpoints`."""
        whole, main = self.folder / f"{step:07d}", self.accelerator.is_main_process
        temporary = whole.with_name(f".{whole.name}")
        places = gather_object([self.at.state_dict()])
        if main:
            for stopped in self.folder.glob(".*"):
                shutil.rmtree(stopped)
            temporary.mkdir(parents=True)
            (temporary / "config.yaml").write_text(as_yaml(self.config))
            state = {name: part.state_dict() for name, part in self.parts.items()}
            torch.save({**state, "at": places}, temporary / "run.pt")
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(temporary)
        self.accelerator.wait_for_everyone()
        if main:
            for path in temporary.iterdir():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            os.replace(temporary, whole)
            for old in checkpoints_in(self.config.output_dir)[: -self.config.keep_checkpoints]:
                os.replace(old, old.with_name(f".{old.name}"))
                shutil.rmtree(old.with_name(f".{old.name}"))

    def load(self, path: Path) -> None:
        """Raises ConfigError for a checkpoint that cannot be read, or that another number of processes wrote."""
        index, processes = self.accelerator.process_index, self.accelerator.num_processes
        try:
            state = torch.load(path / "run.pt", map_location="cpu", weights_only=True)
            before = len(state["at"])
            if before == processes:
                load(path / f"random_states_{index}.pkl")  # accelerate goes on without it and says nothing
                self.accelerator.load_state(path)
                self.at.load_state_dict(state["at"][index])
                for name, part in self.parts.items():
                    part.load_state_dict(state[name])
        except Exception as error:
            raise ConfigError(
                f"{path} cannot be read ({type(error).__name__}); remove it to go on from an older one"
            ) from error
        if before != processes:
            raise ConfigError(f"{path} was written by {before} processes, this run has {processes}; start as many")
