"""The folder of a run: one run writes in it at a time."""

import contextlib
import json
import os
import platform
import re
import time
from pathlib import Path

import psutil
from accelerate import Accelerator
from accelerate.utils import gather_object

from ddpm_hf.files.atomic import remove_leftovers, restore_folder, write_text
from ddpm_hf.training.config import ConfigError, RunConfig, as_yaml
from ddpm_hf.training.environment import environment
from ddpm_hf.training.interrupts import tell

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class OutputFolder:
    """Within this context no other run writes in `config.output_dir`, which is made if need be.

    The main process locks the file `.lock` in it, which names the process. The system releases the lock with the process,
    however that ends; processes that it forks do not keep it. On a system without such locks the name in the file decides.

    Raises:
        ConfigError: another run is there. In all processes.
    """

    def __init__(self, config: RunConfig, accelerator: Accelerator, saved: str):
        """saved: the name of the folder in it that the run ends with."""
        self.config, self.accelerator, self.saved = config, accelerator, saved
        self.path = Path(config.output_dir)
        self.lock, self.file, self.made = self.path / ".lock", None, False
        if hasattr(os, "register_at_fork"):  # readers of images live on for a while when a run is killed
            os.register_at_fork(after_in_child=self._close)

    def __enter__(self):
        problem = None
        if self.accelerator.is_main_process:
            try:
                self._acquire()
            except (ConfigError, OSError) as error:
                problem = str(error)
        problems = [each for each in gather_object([problem]) if each]
        if problems:
            raise ConfigError(problems[0])
        return self

    def __exit__(self, *exception):
        if self.file is None:
            return
        with contextlib.suppress(OSError):
            if self._is_there():
                self.lock.unlink()
            if self.made:
                self.path.rmdir()  # where nothing was written
        self._close()

    def begin(self) -> None:
        """Tidies up after a run that was killed, and writes what the run is made by and on. Of the main process."""
        for name in {self.saved, "pipeline"}:  # train_classifier.py saves both
            restore_folder(self.path / name)
        for folder in (self.path, self.path / "samples", self.path / "checkpoints"):
            remove_leftovers(folder)
        self._describe()

    def keep(self) -> bool:
        """Whether the folder is there as it was; where somebody has removed or moved it, it is made anew. Of the main process.

        Raises:
            ConfigError: another run has begun there meanwhile.
            OSError: it cannot be made.
        """
        if self._is_there():
            return True
        self._acquire()
        self._describe()
        tell(
            f"{self.path} was removed or moved; it is made anew, and the run goes on, without the checkpoints that it held"
        )
        return False

    def _describe(self):
        write_text(self.path / "environment.json", json.dumps(environment(self.accelerator), indent=2) + "\n")
        write_text(self.path / "config.yaml", as_yaml(self.config))  # the last: with both a run has begun

    def _is_there(self):
        """Whether the name of the lock's file still stands for the file that is locked."""
        try:
            return self.file is not None and os.path.samestat(os.stat(self.lock), os.fstat(self.file))
        except OSError:
            return False

    def _close(self):
        if self.file is not None:
            os.close(self.file)
        self.file = None

    def _acquire(self):
        self.made = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            while True:
                self._close()
                self.file = os.open(self.lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
                self._lock()
                if self._is_there():  # a run that ends removes it
                    break
        except BaseException:
            self._close()
            raise
        owner = {"process": os.getpid(), "host": platform.node(), "started": psutil.Process().create_time()}
        os.ftruncate(self.file, 0)
        os.lseek(self.file, 0, os.SEEK_SET)
        os.write(self.file, json.dumps(owner).encode())

    def _lock(self):
        owner = self._owner()
        name = "process {process} on {host}, which began at {began}".format(**owner) if owner else "another run"
        problem = f"output_dir={self.config.output_dir!r} is in use by {name}"
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{problem}; end it or wait, or take another output_dir") from None
        except (OSError, AttributeError):  # a system without locks
            if owner and owner["host"] != platform.node():
                raise ConfigError(f"{problem}; if that has ended, remove {self.lock}") from None
            if owner and _is_running(owner):
                raise ConfigError(f"{problem}; end it or wait, or take another output_dir") from None

    def _owner(self):
        """What the lock's file says of its process; None where it says nothing."""
        try:
            owner = json.loads(os.read(self.file, 1000))
            began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner["started"]))
            if isinstance(owner["process"], int) and re.fullmatch(r"[\w.-]{0,255}", owner["host"]):
                return {**owner, "began": began}
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            pass
        return None


def _is_running(owner):
    """Whether a process of this machine is there, and is not another one with its number."""
    try:
        began = psutil.Process(owner["process"]).create_time()
    except (psutil.Error, ValueError):
        return False
    return owner["process"] != os.getpid() and abs(began - owner["started"]) < 1
