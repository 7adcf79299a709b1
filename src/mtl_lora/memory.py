"""How the C library treats freed memory, which on a CPU takes a noticeable part of a training step."""

import ctypes
import platform

# Parameters of glibc's mallopt(3). A buffer above the first threshold gets its own pages from the system and returns
# them when it is freed; free memory above the second at the end of the heap is returned to the system.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
_MMAP_THRESHOLD, _TRIM_THRESHOLD = 2**30, 2**31 - 1  # bytes; the parameter is a C int


def keep_freed_memory(device: str = "cpu") -> bool:
    """Have glibc keep large freed buffers for later allocations of this process; return whether that was done.

    An activation of a training step takes some megabytes, more than glibc keeps by default. Every step therefore gets
    new pages from the system, which clears them first: a tenth of the time of a step of 8 rows, and more for larger
    steps (``benchmark/LOG.md``). Results do not change. Returns False and does nothing for another C library, and for a
    ``device`` (the type of a ``torch.device``) whose buffers do not come from the C library.
    """
    if device != "cpu" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # An older glibc accepts at most half of a heap, 32 MiB.
    kept = mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD) or mallopt(_M_MMAP_THRESHOLD, 2**25)
    return bool(kept and mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD))
