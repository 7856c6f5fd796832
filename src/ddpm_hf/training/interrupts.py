"""What ends a run before its last step, a signal or gradients that stay without a finite value; and what does not."""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from tqdm.auto import tqdm

ENDINGS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]  # of Windows two


class Stopped(RuntimeError):
    """A run that ended early. `status` is the exit status of its process."""

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


class Interrupted(Stopped):
    """A measurement that a signal has ended early; raised in all processes."""


class Signals:
    """SIGTERM, SIGHUP and Ctrl-C within this context wait for the end of a step; the second one does what it always does.

    A SIGHUP that was ignored before (nohup) stays so. Several processes ask each other about once a second, not at each step:
    they wait for the device then.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.received, self.before = accelerator, None, {}
        self.asked, self.next, self.start = 0, 0, time.perf_counter()

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # others may not, as in a notebook's
            for number in ENDINGS:
                if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                    self.before[number] = signal.signal(number, self._note) or signal.SIG_DFL
        return self

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        if self.received is None:
            self.received, self.at = number, time.monotonic()
            if self.accelerator.is_main_process:
                with contextlib.suppress(RuntimeError):  # it came while something else was written there
                    tell(f"{signal.Signals(number).name}: stopping after this step; again ends at once")
        # a launcher passes on what its group of processes has received too
        elif number == signal.SIGINT or time.monotonic() - self.at > 2:
            signal.signal(number, self.before[number])
            signal.raise_signal(number)

    def stop(self, step: int) -> int | None:
        """The number of the signal that this or another process has received, in all of them after the same step."""
        if self.accelerator.num_processes == 1:
            return self.received
        if step < self.next:
            return None
        mine = torch.tensor([[float(self.received or 0), time.perf_counter() - self.start]])
        received, seconds = self.accelerator.gather(mine.to(self.accelerator.device)).amax(0).tolist()
        # the same everywhere, as what was gathered is
        self.next = step + max(1, int((step - (self.asked or step)) / max(seconds, 1e-3)))
        self.asked, self.start = step, time.perf_counter()
        return int(received) or None

    def measure(self, network: torch.nn.Module, compute: Callable[[], object]) -> list | None:
        """What `compute` returns in each process, in all of them; None in all where it failed in one, which is printed.

        Values that are not finite, or too little memory for more than a training step, end no run. After a signal the next call
        of `network` ends the computation, so that a long one does not hold up the end of the run.

        Raises:
            Interrupted: a process was interrupted. The next `stop` asks for the signal.
        """

        def check(*arguments):
            if self.received:
                raise Interrupted("")

        hook, mine = network.register_forward_pre_hook(check), None
        try:
            mine = (compute(), None, None)
        except Interrupted:
            mine = (None, self.received, None)
        except (ValueError, RuntimeError) as error:  # several processes would wait for this one without end
            mine = (None, None, " ".join(str(error).split()) or type(error).__name__)
        finally:
            hook.remove()
        outcomes = gather_object([mine])
        if number := max(received or 0 for _, received, _ in outcomes):
            self.next = 0
            raise Interrupted(f"stopped by signal {number}; the same command measures again", status=128 + number)
        if problem := next((problem for *_, problem in outcomes if problem), None):
            if self.accelerator.is_main_process:
                tell(f"a sheet or measurement is left out ({problem}); the run goes on")
            return None
        return [result for result, *_ in outcomes]


def ignore_interrupts(worker: int) -> None:
    """Of a process that reads images: signals to the group of processes reach it too, but the run decides when it ends.

    A second SIGTERM ends it, as the loader that waits for it in vain sends it.
    """
    for number in ENDINGS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


def find_dead_workers_when_reading() -> None:
    """To be called once torch's loader has started workers: with its own handler their death is raised in any line of ours.

    Without it the loader finds out while it waits for a batch, within five seconds.
    """
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


class FiniteSteps:
    """Skips the optimizer steps whose gradient is not finite, where the gradient is: the host does not wait for it.

    skipped, in_a_row: float32 scalars on the device, of the run and of the last steps.
    """

    def __init__(self, device: torch.device, limit: int):
        self.limit = limit
        self.skipped, self.in_a_row = torch.zeros(2, device=device)

    def state_dict(self):
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state):
        self.skipped, self.in_a_row = (state[key].to(self.skipped.device) for key in ("skipped", "in_a_row"))

    def check(self, norm: torch.Tensor, optimizer: torch.optim.AdamW, scaled: bool = False) -> None:
        """Before each step: a fused optimizer leaves all as it is where `found_inf` is 1.

        norm: of the gradient, a scalar. scaled: a gradient scaler sees to that itself.
        """
        bad = 1 - norm.detach().isfinite().float()
        self.skipped, self.in_a_row = self.skipped + bad, (self.in_a_row + 1) * bad
        if not scaled:
            optimizer.found_inf = bad

    def raise_if_lost(self, norm: torch.Tensor, t: torch.Tensor, losses: torch.Tensor, at) -> None:
        """After some steps, as it waits for the device. The tensors are of the last one, `at` its place in the data.

        Raises:
            Stopped: `limit` steps in a row were skipped, the last one among them.
        """
        if self.in_a_row < self.limit:
            return
        bad = ~losses.isfinite()
        where = ", ".join(map(str, t[bad].tolist()[:8])) or "none here"
        raise Stopped(
            f"{int(self.in_a_row)} steps in a row had no finite gradient and were skipped; the last: step {at.step}, epoch "
            f"{at.epoch}, batch {at.batch - 1}, gradient norm {float(norm)}, losses that are not finite at t = {where}; try a "
            "lower learning_rate, more lr_warmup_steps, or mixed_precision no"
        )


def tell(message: str) -> None:
    """A line for the user, above the progress bar."""
    tqdm.write(message, file=sys.stderr)


@contextlib.contextmanager
def going_on(problem: str, said: set[str] | None = None):
    """A file that cannot be written ends nothing: it is said, with `problem` as in "the sheet could not be written".

    said: problems that are not said again until they are over.
    """
    said = set() if said is None else said
    try:
        yield
        said.discard(problem)
    except (OSError, SafetensorError) as error:  # safetensors has its own for a full disk
        if problem not in said:
            tell(f"{problem} ({' '.join(str(error).split())}); the run goes on")
        said.add(problem)
