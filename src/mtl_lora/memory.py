"""What the C library does with freed memory: on a CPU, a visible part of a training step."""

import ctypes
import platform

# glibc's mallopt(3). Above the first, a buffer gets pages of its own from the system and returns them when freed;
# above the second, free memory at the end of the heap goes back to the system.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
_MMAP_THRESHOLD, _TRIM_THRESHOLD = 2**30, 2**31 - 1  # bytes; the parameter is a C int


def keep_freed_memory(device: str = "cpu") -> bool:
    """Tell glibc to keep large freed buffers for the next allocation of this process; True where that was done.

    An activation of a step is some megabytes, more than glibc keeps by itself. So every step asks the system for
    them anew, and the system clears them page by page: a tenth of the time of a step of 8 rows and more for larger ones
    (``benchmark/LOG.md``). Nothing that is computed changes. False, and nothing done, for another C library, and for a
    ``device`` (the type of a ``torch.device``) whose buffers are not the C library's.
    """
    if device != "cpu" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # An older glibc takes no more than half of a heap, 32 MiB.
    kept = mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD) or mallopt(_M_MMAP_THRESHOLD, 2**25)
    return bool(kept and mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD))
