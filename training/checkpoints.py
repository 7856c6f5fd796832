"""Checkpoints of a run: each is whole or not there, and a run that goes on from one ends as if it had not been stopped."""

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, load
from safetensors import SafetensorError
from stops import going_on, tell

from config import ConfigError, RunConfig, as_yaml, checkpoints_before, checkpoints_in


def to_disk(folder: Path) -> None:
    """Waits until the files of a folder are on the disk: a name that is then put there stands for what is whole."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def put(folder: Path, write: Callable[[Path], None]) -> None:
    """Has a folder written under another name, and renames it: a folder of this name is whole, this one or that before it."""
    temporary, old = folder.with_name(f".{folder.name}"), put_aside(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        write(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk shall not stay full
        raise
    to_disk(temporary)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():  # of fewer steps
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def put_aside(folder: Path) -> Path:
    """Where `put` has the folder of before for a moment: if a run is killed then, it is all there is."""
    return folder.with_name(f".{folder.name}.old")


class Checkpoints:
    """Saves and loads the state of a run in `<output_dir>/checkpoints/<step>/`.

    accelerate keeps the network (as safetensors), the optimizer, the gradient scaler and each process's random states. All else
    are objects with `state_dict` and `load_state_dict`: `parts`, the same in every process, and `own`, which differ. A
    checkpoint is written under a name that begins with a dot and renamed when it is whole.
    """

    def __init__(self, config: RunConfig, accelerator: Accelerator, own: dict, **parts):
        self.config, self.accelerator, self.own, self.parts = config, accelerator, own, parts
        self.folder = Path(config.output_dir) / "checkpoints"
        self.best = {"step": 0, "bits_per_dim": math.inf}

    def is_best(self, step: int, measured: float) -> bool:
        """Whether no checkpoint before measured as little; then the one of this step, once saved, stays."""
        if measured < self.best["bits_per_dim"]:  # of a classifier its loss
            self.best = {"step": step, "bits_per_dim": measured}
        return self.best["step"] == step

    def save(self, step: int) -> bool:
        """Writes a checkpoint, then removes all but the newest `keep_checkpoints` and the best.

        Returns whether it is there: what could not be written is told, and leaves the older ones as they were.
        """
        whole = self.folder / f"{step:07d}"
        temporary = whole.with_name(f".{whole.name}")
        own = gather_object([{name: part.state_dict() for name, part in self.own.items()}])

        def begin():
            for stopped in self.folder.glob(".[0-9]*"):
                shutil.rmtree(stopped, ignore_errors=stopped != temporary)
            temporary.mkdir(parents=True)
            (temporary / "config.yaml").write_text(as_yaml(self.config))
            state = {name: part.state_dict() for name, part in self.parts.items()}
            torch.save({**state, "own": own, "best": self.best}, temporary / "run.pt")

        def end():
            to_disk(temporary)
            os.replace(temporary, whole)

        main = self.accelerator.is_main_process
        saved = (
            self._everywhere(begin if main else None)
            and self._everywhere(lambda: self.accelerator.save_state(temporary))
            and self._everywhere(end if main else None)
        )
        if main and saved:
            for old in checkpoints_in(self.config.output_dir)[: -self.config.keep_checkpoints]:
                if int(old.name) != self.best["step"]:
                    with going_on(f"{old} could not be removed"):
                        os.replace(old, old.with_name(f".{old.name}"))
                        shutil.rmtree(old.with_name(f".{old.name}"))
        elif main:
            shutil.rmtree(temporary, ignore_errors=True)
        return saved

    def _everywhere(self, write):
        """Whether all processes have done it; each waits for the others, and what went wrong is told."""
        problem = None
        try:
            if write:
                write()
        except (OSError, RuntimeError, SafetensorError) as error:
            problem = " ".join(str(error).split())
        problems = [each for each in gather_object([problem]) if each]
        if problems and self.accelerator.is_main_process:
            left = checkpoints_in(self.config.output_dir)
            tell(
                f"a checkpoint could not be written ({problems[0]}); the run goes on, "
                f"the last whole one is {left[-1] if left else 'none'}"
            )
        return not problems

    def load(self, path: Path) -> None:
        """Goes on from the checkpoint `path`; where it is this run's own and cannot be read, from the newest older one.

        Those that cannot be read are told, and renamed to `<step>.unreadable`.

        Raises:
            ConfigError: none can be read, or another number of processes wrote it.
        """
        index, processes = self.accelerator.process_index, self.accelerator.num_processes
        older = checkpoints_before(self.config.output_dir, path)
        candidates, unreadable = [path, *(reversed(older) if path.parent == self.folder else ())], []
        for candidate in candidates:
            problem = None
            try:
                state = torch.load(candidate / "run.pt", map_location="cpu", weights_only=True)
                written = len(state["own"])
                if written == processes:
                    load(candidate / f"random_states_{index}.pkl")  # accelerate goes on without it and says nothing
                    self.accelerator.load_state(candidate)
                    for name, part in self.parts.items():
                        part.load_state_dict(state[name])
                    for name, part in self.own.items():
                        part.load_state_dict(state["own"][index][name])
                    self.best = state["best"]
            except Exception as error:
                problem = type(error).__name__
            problem = next((each for each in gather_object([problem]) if each), None)
            if problem:
                unreadable.append((candidate, problem))
                continue
            if written != processes:
                raise ConfigError(
                    f"{candidate} was written by {written} processes, this run has {processes}; start as many"
                )
            if self.accelerator.is_main_process:
                for broken, why in unreadable:
                    aside = broken.with_name(f"{broken.name}.unreadable")
                    shutil.rmtree(aside, ignore_errors=True)  # of the same step before
                    os.replace(broken, aside)
                    tell(f"{broken} cannot be read ({why}); the run goes on from {candidate}")
            return
        raise ConfigError(f"{path} cannot be read ({unreadable[0][1]}), nor one before it; remove {path.parent}")
