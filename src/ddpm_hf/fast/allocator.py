"""Keeps freed memory with the process, as torch's allocators for accelerators do."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory() -> bool:
    """Makes the C library keep freed memory for the next call of the network, in the whole process from now on.

    Otherwise glibc returns large blocks to the kernel, and every page of the next block costs a fault and is zeroed: 9 % of the
    time of a training step of the cifar10 network (docs/speed.md). The process keeps its peak memory until it ends.

    Returns:
        True if the C library can do so, which glibc on Linux can.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None)
    return hasattr(libc, "mallopt") and bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, -1))
