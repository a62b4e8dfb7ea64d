"""Memory of the CPU between torch's operations: glibc keeps what they free instead of handing it back each time."""

from __future__ import annotations

import ctypes
import functools
import os
import platform

# mallopt's parameters (malloc.h) and what they are set to: blocks up to 32 MiB, the most that glibc allows, come from
# the heap, and up to 64 MiB of it stay with the process when they are free.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 64 * 2**20
LARGEST_BYTES = 32 * 2**20

_USERS_OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")


@functools.cache
def keep_freed_memory() -> bool:
    """Let this process keep up to KEPT_BYTES of freed memory. Whether it does; whoever has tuned malloc keeps that.

    By default the C library returns an activation of some MB to the system when it is freed, and each page of the next
    one then costs a fault: a fifth of the vision tower's time for a batch of small images.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    if any(name in os.environ for name in _USERS_OWN) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    library = ctypes.CDLL(None)
    return bool(library.mallopt(_M_MMAP_THRESHOLD, LARGEST_BYTES) and library.mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES))
