"""Evaluation mode for the time of a call, whatever mode a network was left in."""

import contextlib
import threading
import weakref
from collections.abc import Iterator

from torch import nn

_LOCK = threading.Lock()


_CALLS = weakref.WeakKeyDictionary()  # module -> [number of calls in progress, its parts that were in training mode]


@contextlib.contextmanager
def evaluation_mode(*modules: nn.Module | None) -> Iterator[None]:
    """Puts modules into evaluation mode within the block, without dropout; afterwards each part has its own mode back.

    Calls may overlap, in threads as well: the last of them to end restores the modes. What is no module is left as it is.
    """
    modules = [module for module in modules if isinstance(module, nn.Module)]
    with _LOCK:
        for module in modules:
            call = _CALLS.setdefault(module, [0, []])
            trained = [part for part in module.modules() if part.training]
            for part in trained:
                part.training = False
            call[0] += 1
            call[1] += trained
    try:
        yield
    finally:
        with _LOCK:
            for module in modules:
                call = _CALLS[module]
                call[0] -= 1
                if call[0] == 0:
                    for part in _CALLS.pop(module)[1]:
                        part.training = True
