"""The folder of a run, in which one run writes at a time."""

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
from ddpm_hf.training.messages import print_above_progress_bar

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class OutputFolder:
    """Within this context no other run writes in `config.output_dir`, which is created if necessary.

    The main process locks the file `.lock` in it, which names the process. The system releases the lock with the process,
    however that ends, and forked processes do not keep it. On a system without such locks the name in the file decides.

    Raises:
        ConfigError: another run is there. In all processes.
    """

    def __init__(self, config: RunConfig, accelerator: Accelerator):
        self.config, self.accelerator = config, accelerator
        self.path = Path(config.output_dir)
        self.lock, self.file, self.created = self.path / ".lock", None, False
        if hasattr(os, "register_at_fork"):  # readers of images live on for a while when a run is killed
            os.register_at_fork(after_in_child=self._close)

    def __enter__(self):
        problem = None
        if self.accelerator.is_main_process:
            try:
                self._acquire()
            except (ConfigError, OSError) as error:
                problem = str(error)
        problems = [text for text in gather_object([problem]) if text]
        if problems:
            raise ConfigError(problems[0])
        return self

    def __exit__(self, *exception):
        if self.file is None:
            return
        with contextlib.suppress(OSError):
            if self._is_there():
                self.lock.unlink()
            if self.created:
                self.path.rmdir()  # where nothing was written
        self._close()

    def begin(self) -> None:
        """Remove leftovers of a killed run; write config.yaml and environment.json. Called in the main process."""
        for name in {self.config.RESULT, "pipeline"}:  # a run of a classifier saves both
            restore_folder(self.path / name)
        for folder in (self.path, self.path / "samples", self.path / "checkpoints"):
            remove_leftovers(folder)
        self._describe()

    def keep(self) -> bool:
        """Create the folder again if it was removed or moved; return whether it existed. Called in the main process.

        Raises:
            ConfigError: another run has begun there meanwhile.
            OSError: it cannot be created.
        """
        if self._is_there():
            return True
        self._acquire()
        self._describe()
        print_above_progress_bar(
            f"{self.path} was removed or moved; it is created again, and the run continues "
            "without the checkpoints that it held"
        )
        return False

    def _describe(self):
        write_text(self.path / "environment.json", json.dumps(environment(self.accelerator), indent=2) + "\n")
        write_text(self.path / "config.yaml", as_yaml(self.config))  # written last: with both files a run has begun

    def _is_there(self):
        """Whether the lock's file still has its name."""
        try:
            return self.file is not None and os.path.samestat(os.stat(self.lock), os.fstat(self.file))
        except OSError:
            return False

    def _close(self):
        if self.file is not None:
            os.close(self.file)
        self.file = None

    def _acquire(self):
        self.created = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            while True:
                self._close()
                self.file = os.open(self.lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
                self._lock()
                if self._is_there():  # a run removes it at its end
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
        """The process that the lock's file names, or None."""
        try:
            owner = json.loads(os.read(self.file, 1000))
            began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner["started"]))
            if isinstance(owner["process"], int) and re.fullmatch(r"[\w.-]{0,255}", owner["host"]):
                return {**owner, "began": began}
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            pass
        return None


def _is_running(owner):
    """Whether a process of this machine still runs; its number may be reused by another process."""
    try:
        began = psutil.Process(owner["process"]).create_time()
    except (psutil.Error, ValueError):
        return False
    return owner["process"] != os.getpid() and abs(began - owner["started"]) < 1
