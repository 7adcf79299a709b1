"""Freed buffers stay with the process."""

import platform
import subprocess
import sys

import pytest

# Page faults of ten buffers of 64 MiB, each written and freed: 16,384 pages of 4 KiB each if every one is new.
FAULTS = """
import resource
from mtl_lora.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        one * size
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

one, size = b"x", 2**26
faults()
print(faults(), keep_freed_memory(), [faults(), faults()][1])
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_a_freed_buffer_is_used_again():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    before, kept, after = done.stdout.split()
    assert kept == "True"
    assert int(before) > 1000, "every buffer was new to the process"
    assert int(after) < 0.01 * int(before), "no buffer is new"
