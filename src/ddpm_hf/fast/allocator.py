"""Freed memory that stays with the process, as torch's own allocators for accelerators keep theirs."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory() -> bool:
    """Has the C library keep what is freed for the next call of the network, from now on and for the whole process.

    glibc gives large blocks back to the kernel, and each page of the next one is then a fault and zeroed: 9 % of the time of a
    training step of the cifar10 network (docs/speed.md). The process keeps the memory of its largest moment until it ends.

    Returns:
        Whether it could be told to: on Linux with glibc.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return hasattr(libc, "mallopt") and bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, -1))
