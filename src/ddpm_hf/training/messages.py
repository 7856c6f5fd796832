"""What a run prints while it trains."""

import contextlib
import sys
from collections.abc import Iterator

from safetensors import SafetensorError
from tqdm.auto import tqdm


def print_above_progress_bar(message: str) -> None:
    """Print a line to stderr; a progress bar stays below it."""
    tqdm.write(message, file=sys.stderr)


@contextlib.contextmanager
def warn_on_write_error(problem: str, reported: set[str] | None = None) -> Iterator[None]:
    """Within this context a failed write does not end the run: it prints `problem`, as "the sheet could not be written".

    Args:
        reported: problems that are not printed again until a write has succeeded.
    """
    reported = set() if reported is None else reported
    try:
        yield
        reported.discard(problem)
    except (OSError, SafetensorError) as error:  # safetensors has its own for a full disk
        if problem not in reported:
            print_above_progress_bar(f"{problem} ({' '.join(str(error).split())}); the run continues")
        reported.add(problem)
