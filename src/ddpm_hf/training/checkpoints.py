"""Checkpoints: each is complete or absent, and a run resumes from one bit-identically to an uninterrupted run."""

import contextlib
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError

from ddpm_hf.arguments import shown
from ddpm_hf.files.atomic import remove_folder, replacing_folder
from ddpm_hf.files.digests import DIGESTS, check_digests, write_digests
from ddpm_hf.training.accelerate_internals import check_random_states
from ddpm_hf.training.config import ConfigError, RunConfig, as_yaml
from ddpm_hf.training.messages import print_above_progress_bar, warn_on_write_error
from ddpm_hf.training.resume import checkpoints_before, checkpoints_in


class _NotWritten(RuntimeError):
    """A process could not write its part of a checkpoint."""


class AppleRandom:
    """The state of the random generator of Apple's GPU, which accelerate does not save."""

    def state_dict(self):
        return {"state": torch.mps.get_rng_state()}

    def load_state_dict(self, state):
        torch.mps.set_rng_state(state["state"])


class Checkpoints:
    """Saves and loads the state of a run in `<output_dir>/checkpoints/<step>/`.

    accelerate saves the network (as safetensors), the optimizer, the gradient scaler and the random states of each process. The
    other state is in objects with `state_dict` and `load_state_dict`: `shared` by all processes, or different `per_process`.
    `facts` are values that must not change when a run resumes, such as class names: numbers, text, None, or lists of these.

    A checkpoint is written under a temporary name and renamed when it is complete. The digests of its files are checked before
    anything is loaded. Its pickles cannot run code: torch opens them with weights_only.
    """

    def __init__(
        self, config: RunConfig, accelerator: Accelerator, per_process: dict, facts: dict | None = None, **shared
    ):
        per_process = {**per_process, "random": AppleRandom()} if accelerator.device.type == "mps" else per_process
        self.config, self.accelerator, self.per_process, self.shared = config, accelerator, per_process, shared
        self.facts = facts or {}
        self.folder = Path(config.output_dir) / "checkpoints"
        self.best_by = best_by(config)
        self.best = {"step": 0, self.best_by: math.inf}
        self.measured = True  # False if a signal interrupted the sheet or measurement of this step

    def is_best(self, step: int, measured: float) -> bool:
        """Whether this measurement is the lowest so far; the checkpoint of the best step is kept."""
        if measured < self.best[self.best_by]:
            self.best = {"step": step, self.best_by: measured}
        return self.best["step"] == step

    def save(self, step: int) -> bool:
        """Write a checkpoint, then remove all but the newest `keep_checkpoints` and the best.

        Returns:
            Whether it was written. If not, the reason is printed, and older checkpoints are kept.
        """
        is_main, folder = self.accelerator.is_main_process, self.folder / f"{step:07d}"
        states = gather_object([{name: part.state_dict() for name, part in self.per_process.items()}])

        def begin():
            self.folder.mkdir(parents=True, exist_ok=True)
            return folders.enter_context(replacing_folder(folder))

        def write():
            if is_main:
                (temporary / "config.yaml").write_text(as_yaml(self.config), encoding="utf-8")
                state = {name: part.state_dict() for name, part in self.shared.items()}
                state |= {"own": states, "best": self.best, "facts": self.facts, "measured": self.measured}
                torch.save(state, temporary / "run.pt")
            self.accelerator.save_state(temporary)

        def end():
            write_digests(temporary)
            folders.close()  # gives the folder its name

        try:
            with contextlib.ExitStack() as folders:
                temporary = self._everywhere(begin if is_main else None)
                self._everywhere(write)
                self._everywhere(end if is_main else None)
        except _NotWritten as error:
            if is_main:
                complete = checkpoints_in(self.config.output_dir)
                print_above_progress_bar(
                    f"a checkpoint could not be written ({error}); the run continues, "
                    f"the last complete one is {complete[-1] if complete else 'none'}"
                )
            return False
        if is_main:
            for old in checkpoints_in(self.config.output_dir)[: -self.config.keep_checkpoints]:
                if int(old.name) != self.best["step"]:
                    with warn_on_write_error(f"{old} could not be removed"):
                        remove_folder(old)
        return True

    def _everywhere(self, write: Callable | None):
        """Call `write` and wait for the other processes; return the result of the main process.

        Raises:
            _NotWritten: in all processes, if it failed in one of them.
        """
        result = problem = None
        try:
            result = write() if write else None
        except (OSError, RuntimeError, SafetensorError) as error:
            problem = " ".join(str(error).split())
        outcomes = gather_object([(result, problem)])
        for _, problem in outcomes:
            if problem:
                raise _NotWritten(problem)
        return outcomes[0][0]

    def load(self, path: Path) -> Path:
        """Load the checkpoint `path`, or the newest intact one before it if it is damaged; return the path that was loaded.

        Damaged checkpoints are reported; those in the run's own folder are renamed to `<step>.unreadable`.

        Raises:
            ConfigError: none can be read, or the number of processes or `facts` have changed.
        """
        candidates, damaged = [path, *reversed(checkpoints_before(path))], []
        is_main = self.accelerator.is_main_process
        for candidate in candidates:
            problem = self._problem(lambda: check_digests(candidate) if is_main else None)  # noqa: B023
            problem = problem or self._problem(lambda: self._read(candidate))  # noqa: B023
            if problem:
                if not (candidate / DIGESTS).exists():
                    problem = f"{DIGESTS} is missing: an older version of this package wrote it, and can resume from it"
                damaged.append((candidate, problem))
                continue
            if is_main:
                for broken, problem in damaged:
                    print_above_progress_bar(f"{broken} cannot be read ({problem}); the run resumes from {candidate}")
                    if broken.parent.resolve() == self.folder.resolve():  # not in the folder of another run
                        aside = broken.with_name(f"{broken.name}.unreadable")
                        shutil.rmtree(aside, ignore_errors=True)  # from an earlier failure at the same step
                        with warn_on_write_error(f"{broken} could not be renamed"):
                            os.replace(broken, aside)
            return candidate
        older = len(damaged) - 1
        older_text = (
            f", nor can the {older if older > 1 else 'one'} before it" if older else ", and there is none before it"
        )
        pipeline, takes_weights = path.absolute().parents[1] / "pipeline", hasattr(self.config, "init_from")
        raise ConfigError(
            f"{path} cannot be read ({damaged[0][1]}){older_text}; start again in another output_dir"
            + (f", --init_from {pipeline} takes the weights from there" if takes_weights and pipeline.is_dir() else "")
        )

    def _problem(self, read: Callable[[], object]) -> str | None:
        """Call `read` in each process; return the problem of any of them, or None. A ConfigError is raised in all processes."""
        problem, fatal = None, False
        try:
            read()
        except Exception as error:  # damaged files raise many classes
            problem, fatal = " ".join(str(error).split()), isinstance(error, ConfigError)
            if not isinstance(error, (ConfigError, ValueError)):
                problem = type(error).__name__
        outcomes = gather_object([(problem, fatal)])
        problem, fatal = next((outcome for outcome in outcomes if outcome[0]), (None, False))
        if fatal:
            raise ConfigError(problem)
        return problem

    def _read(self, candidate):
        index, processes = self.accelerator.process_index, self.accelerator.num_processes
        state = torch.load(candidate / "run.pt", map_location="cpu", weights_only=True)
        if len(state["own"]) != processes:
            raise ConfigError(
                f"{candidate} was written by {len(state['own'])} processes, this run has {processes}; start as many"
            )
        for name, value in self.facts.items():
            difference = _difference(state["facts"].get(name, value), value)  # older versions wrote others
            if difference:
                raise ConfigError(
                    f"{candidate} was trained on other data: {name.replace('_', ' ')} {difference}; give the data that it was "
                    "trained on, or another output_dir"
                    + ("; unreadable images may stay in it, see max_broken" if name == "size_of_the_split" else "")
                )
        check_random_states(candidate, index)
        self.accelerator.load_state(candidate)
        for name, part in self.shared.items():
            part.load_state_dict(state[name])
        for name, part in self.per_process.items():
            part.load_state_dict(state["own"][index][name])
        self.measured = state["measured"]
        if self.best_by in state["best"]:  # else no earlier measurement is comparable
            self.best = state["best"]


def best_by(config: RunConfig) -> str:
    """What the best checkpoint has the lowest of: numbers under one name can be compared. For a classifier it is the loss."""
    if getattr(config, "best_by", "bits_per_dim") == "bits_per_dim":
        return "bits_per_dim"
    return f"{config.best_by} of {config.eval_samples} samples by {config.eval_extractor}"


def _difference(before, now):
    """Describe the difference of two facts; empty if they are equal."""
    if before == now:
        return ""
    if not (isinstance(before, list) and isinstance(now, list)):
        return f"{'none' if before is None else shown(before)} then, {'none' if now is None else shown(now)} now"
    changes = []
    for names, verb in (
        ([x for x in now if x not in before], "added"),
        ([x for x in before if x not in now], "removed"),
    ):
        if names:
            changes.append(f"{', '.join(map(shown, names[:5]))}{', ...' if len(names) > 5 else ''} {verb}")
    return " and ".join(changes) or "in another order"
