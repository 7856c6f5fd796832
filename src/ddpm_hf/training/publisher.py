"""A run's pipeline to the Hub while it goes on: training never waits for it, and never ends for it."""

import os
import re
import shlex
import shutil
import threading
from pathlib import Path

from huggingface_hub import get_token
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from ddpm_hf.hub.errors import HubError
from ddpm_hf.hub.upload import check_repository, push_folder
from ddpm_hf.training.config import ConfigError, TrainConfig
from ddpm_hf.training.interrupts import tell


class Publisher:
    """Pushes what is saved at checkpoints in a thread of its own: one at a time, and of those that wait the newest.

    What could not be pushed is told once for each reason; the next checkpoint's takes its place.

    Raises:
        ConfigError: there is no token, or the Hub says that it may not write there. A Hub that is not reached is told.
    """

    def __init__(self, config: TrainConfig):
        self.config, self.where = config, f"push_to_hub={config.push_to_hub!r}"
        self.folder, self.copies = Path(config.output_dir, "pipeline"), Path(config.output_dir, ".to-push")
        self.lock, self.thread, self.waiting, self.told = threading.Lock(), None, None, None
        shutil.rmtree(self.copies, ignore_errors=True)  # of a run that was killed
        if not get_token():
            raise ConfigError(f"{self.where}: there is no token; run `hf auth login` or set HF_TOKEN")
        try:
            check_repository(config.push_to_hub, private=config.hub_private or None)
        except HubError as error:
            if error.refused:
                raise ConfigError(f"{self.where}: {error}") from error
            self._tell(error)

    def push(self, step: int) -> None:
        """Begins to push the saved pipeline, or has it wait; returns at once. The folder may be replaced meanwhile."""
        copy = self.copies / f"{step:07d}"
        shutil.rmtree(copy, ignore_errors=True)
        try:
            shutil.copytree(self.folder, copy, copy_function=_link)
        except OSError as error:
            return self._tell(error)
        with self.lock:
            if self.waiting:
                shutil.rmtree(self.waiting, ignore_errors=True)
            self.waiting = copy
            if self.thread is None:  # ends with the process: what is on its way leaves the repository as it was
                self.thread = threading.Thread(target=self._work, daemon=True)
                self.thread.start()

    def _work(self):
        while True:
            with self.lock:
                if self.waiting is None:
                    self.thread = None
                    return
                copy, self.waiting = self.waiting, None
            quiet = are_progress_bars_disabled()
            disable_progress_bars()  # the bar of the training is there
            try:
                self._push(copy)
                self.told = None
            except Exception as error:  # nothing that happens there ends the run
                self._tell(error)
            finally:
                if not quiet:
                    enable_progress_bars()
                shutil.rmtree(copy, ignore_errors=True)

    def _push(self, folder):
        config = self.config
        return push_folder(folder, config.push_to_hub, license=config.license, private=config.hub_private or None)

    def _tell(self, error):
        message = " ".join(str(error).split()) or type(error).__name__
        reason = re.sub(r"\(Request ID: .*?\)", "", message)  # another one each time
        if reason != self.told:
            tell(f"{self.where}: {message}; the run goes on, the next checkpoint is pushed in its place")
        self.told = reason

    def finish(self) -> str:
        """Pushes the last pipeline, after what is on its way; returns the commit's address.

        Raises:
            HubError, ValueError: it could not be pushed; the message has the command that tries again.
        """
        with self.lock:
            self.waiting, thread = None, self.thread
        if thread:
            thread.join()
        shutil.rmtree(self.copies, ignore_errors=True)
        try:
            return self._push(self.folder).commit_url
        except (HubError, ValueError) as error:
            raise HubError(f"{error}; to try again: {self._command()}") from error

    def left(self) -> str:
        """What a run that stops says of the Hub: it does not wait for what is on its way."""
        return f"; to publish what is saved by then: {self._command()}"

    def _command(self):
        config = self.config
        words = ["python", "training/push.py", str(self.folder), "--repo_id", config.push_to_hub]
        words += ["--private"] * config.hub_private + (["--license", config.license] if config.license else [])
        return shlex.join(words)


def _link(source, target):
    """The same file under another name, where the disk knows that; a copy elsewhere."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
