"""Evaluation mode for the duration of a call, whatever mode a network was left in."""

import contextlib
import threading
import weakref
from collections.abc import Iterator

from torch import nn

_LOCK = threading.Lock()


# module -> [number of calls in progress, submodules that were in training mode]
_CALLS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def evaluation_mode(*modules: object) -> Iterator[None]:
    """Puts modules into evaluation mode, without dropout, and afterwards gives each submodule its own mode back.

    Calls may overlap, also in several threads: the last one to end restores the modes. Callables that are no modules are
    ignored.
    """
    networks = [module for module in modules if isinstance(module, nn.Module)]
    with _LOCK:
        for module in networks:
            call = _CALLS.setdefault(module, [0, []])
            in_training = [submodule for submodule in module.modules() if submodule.training]
            for submodule in in_training:
                submodule.training = False
            call[0] += 1
            call[1] += in_training
    try:
        yield
    finally:
        with _LOCK:
            for module in networks:
                call = _CALLS[module]
                call[0] -= 1
                if call[0] == 0:
                    for submodule in _CALLS.pop(module)[1]:
                        submodule.training = True
