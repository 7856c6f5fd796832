"""Memory that the C library keeps."""

import platform
import subprocess
import sys

import pytest

# pages that come anew for each of ten blocks of 64 MB, here and in a thread
PROGRAM = """
import resource, sys, threading
import torch
from ddpm_hf.fast.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10

torch.ones(2**24)
before = faults()
assert keep_freed_memory()
faults()  # the first blocks may leave holes that are too small for the next
print(before, faults())
thread = threading.Thread(target=faults)
thread.start()
thread.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_freed_memory_is_taken_again():
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    before, after = map(float, run.stdout.split())
    assert before > 20 and after < before / 10  # 16,384 small pages, or 32 huge ones
