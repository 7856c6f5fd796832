"""Signals that end a run, or a measurement, before its last step."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ddpm_hf.training.messages import print_above_progress_bar

ENDINGS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]  # Windows has two


def name_of(number: int) -> str:
    """The name of a signal, such as "SIGINT"."""
    return signal.Signals(number).name


class Stopped(RuntimeError):
    """A run that ended early. `status` is the exit status of its process."""

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


class Interrupted(Stopped):
    """A signal ended a measurement early; raised in all processes."""


class Interrupts:
    """Within this context SIGTERM, SIGHUP and Ctrl-C wait for the end of a step; a second one acts at once.

    A SIGHUP that was ignored before (nohup) stays ignored. Several processes ask each other about once a second, not at each
    step, because that waits for the device.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.received = accelerator, None
        self.handlers_before: dict = {}
        self.last_step_asked, self.next_step_to_ask, self.start = 0, 0, time.perf_counter()

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # other threads may not set handlers
            for number in ENDINGS:
                if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                    self.handlers_before[number] = signal.signal(number, self._note) or signal.SIG_DFL
        return self

    def __exit__(self, *exception):
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        if self.received is None:
            self.received, self.received_at = number, time.monotonic()
            if self.accelerator.is_main_process:
                signal_name = "Ctrl-C" if number == signal.SIGINT else name_of(number)
                with contextlib.suppress(RuntimeError):  # it came while something else was printing
                    print_above_progress_bar(
                        f"{name_of(number)}: stopping after this step; {signal_name} again stops immediately"
                    )
        # a launcher passes on what its group of processes has received too
        elif number == signal.SIGINT or time.monotonic() - self.received_at > 2:
            signal.signal(number, self.handlers_before[number])
            signal.raise_signal(number)

    def stop(self, step: int) -> int | None:
        """Return the signal that any process has received, the same in all processes after the same step."""
        if self.accelerator.num_processes == 1:
            return self.received
        if step < self.next_step_to_ask:
            return None
        state = torch.tensor([[float(self.received or 0), time.perf_counter() - self.start]])
        received, seconds = self.accelerator.gather(state.to(self.accelerator.device)).amax(0).tolist()
        # equal in all processes, as it depends on gathered values only
        self.next_step_to_ask = step + max(1, int((step - (self.last_step_asked or step)) / max(seconds, 1e-3)))
        self.last_step_asked, self.start = step, time.perf_counter()
        return int(received) or None

    def run(self, network: torch.nn.Module, compute: Callable[[], object]) -> list | None:
        """Call `compute` in each process; return all results, or print a failure in any process and return None.

        A failure, such as too little memory, does not end the run. After a signal the next call of `network` ends the
        computation, so that a long one does not delay the end of the run.

        Raises:
            Interrupted: a process received a signal; the next `stop` returns it.
        """

        def raise_if_interrupted(*arguments):
            if self.received:
                raise Interrupted("")

        hook = network.register_forward_pre_hook(raise_if_interrupted)
        try:
            outcome: tuple[object, int | None, str | None] = (compute(), None, None)
        except Interrupted:
            outcome = (None, self.received, None)
        except (ValueError, RuntimeError) as error:  # otherwise the other processes would wait forever
            outcome = (None, None, " ".join(str(error).split()) or type(error).__name__)
        finally:
            hook.remove()
        outcomes = gather_object([outcome])
        if number := max(received or 0 for _, received, _ in outcomes):
            self.next_step_to_ask = 0
            raise Interrupted(f"stopped by {name_of(number)}; the same command measures again", status=128 + number)
        if problem := next((problem for *_, problem in outcomes if problem), None):
            if self.accelerator.is_main_process:
                print_above_progress_bar(f"a sheet or measurement is left out ({problem}); the run continues")
            return None
        return [result for result, *_ in outcomes]


def ignore_interrupts(worker: int) -> None:
    """Make a data loading worker ignore the signals that reach its process group: the run decides when it ends.

    A second SIGTERM ends it; the loader sends one after a timeout.
    """
    for number in ENDINGS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


def find_dead_workers_when_reading() -> None:
    """Remove torch's signal handler for dead workers, which would raise an error at any line of the main process.

    Without it the loader detects a dead worker while it waits for a batch, within five seconds.
    """
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
