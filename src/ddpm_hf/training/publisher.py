"""Publishes the pipeline on the Hub during a run, which neither waits for it nor fails because of it."""

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
from ddpm_hf.training.messages import print_above_progress_bar


class Publisher:
    """Pushes the pipelines of checkpoints in a separate thread, one at a time; only the newest one waits.

    The same failure is printed only once; the next checkpoint's pipeline is pushed instead.

    Raises:
        ConfigError: there is no token, or it may not write to the repository. A connection failure is only printed.
    """

    def __init__(self, config: TrainConfig):
        assert config.push_to_hub is not None  # checked by the caller
        self.config, self.key = config, f"push_to_hub={config.push_to_hub!r}"
        self.folder, self.copies = Path(config.output_dir, "pipeline"), Path(config.output_dir, ".to-push")
        self.lock = threading.Lock()
        self.thread: threading.Thread | None = None
        self.waiting: Path | None = None
        self.reported: str | None = None
        shutil.rmtree(self.copies, ignore_errors=True)  # a killed run's
        if not get_token():
            raise ConfigError(f"{self.key}: there is no token; run `hf auth login` or set HF_TOKEN")
        try:
            check_repository(config.push_to_hub, private=config.hub_private or None)
        except HubError as error:
            if error.refused:
                raise ConfigError(f"{self.key}: {error}") from error
            self._warn(error)

    def push(self, step: int) -> None:
        """Queue the saved pipeline and return at once; a copy is pushed, so the folder may be replaced meanwhile."""
        copy = self.copies / f"{step:07d}"
        shutil.rmtree(copy, ignore_errors=True)
        try:
            shutil.copytree(self.folder, copy, copy_function=_link)
        except OSError as error:
            return self._warn(error)
        with self.lock:
            if self.waiting:
                shutil.rmtree(self.waiting, ignore_errors=True)
            self.waiting = copy
            if self.thread is None:  # a daemon: a push that is cut off leaves the repository as it was
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
            disable_progress_bars()  # the training has its own
            try:
                self._push(copy)
                self.reported = None
            except Exception as error:  # none of them ends the run
                self._warn(error)
            finally:
                if not quiet:
                    enable_progress_bars()
                shutil.rmtree(copy, ignore_errors=True)

    def _push(self, folder):
        config = self.config
        return push_folder(folder, config.push_to_hub, license=config.license, private=config.hub_private or None)

    def _warn(self, error):
        message = " ".join(str(error).split()) or type(error).__name__
        reason = re.sub(r"\(Request ID: .*?\)", "", message)  # differs each time
        if reason != self.reported:
            print_above_progress_bar(
                f"{self.key}: {message}; the run continues, the next checkpoint is pushed in its place"
            )
        self.reported = reason

    def finish(self) -> str:
        """Push the last pipeline after any push in progress; return the address of the commit.

        Raises:
            HubError, ValueError: the push failed; the message has the command that repeats it.
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

    def how_to_publish(self) -> str:
        """Return the end of an interrupted run's message: the command that publishes the saved pipeline."""
        return f"; to publish what is saved by then: {self._command()}"

    def _command(self):
        config = self.config
        program = ["python", "training/push.py"] if config.program.endswith(".py") else ["ddpm-hf", "push"]
        words = [*program, str(self.folder), "--repo_id", config.push_to_hub]
        words += ["--private"] * config.hub_private + (["--license", config.license] if config.license else [])
        return shlex.join(words)


def _link(source, target):
    """Link to the file, or copy it where the disk has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
