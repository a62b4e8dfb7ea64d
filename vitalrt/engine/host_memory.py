"""Memory of the CPU between torch's operations: glibc keeps what they free instead of handing it back each time."""

from __future__ import annotations

import ctypes
import functools
import os
import platform

# mallopt's parameters (malloc.h) and what they are set to: blocks up to 8 MiB, activations of a small model, come from
# a heap, of which up to 32 MiB stay when they are free. Each of malloc's arenas is a heap, and threads have several:
# larger blocks, pictures being read above all, go back to the system at once.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 32 * 2**20
LARGEST_BYTES = 8 * 2**20

_USERS_OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")


@functools.cache
def keep_freed_memory() -> bool:
    """Let each arena of malloc keep up to KEPT_BYTES that are free. False where the environment tunes malloc itself.

    By default the C library returns an activation of some MB to the system when it is freed, and each page of the next
    one then costs a fault, which a batch of small images feels in every operation of the vision tower.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    if any(name in os.environ for name in _USERS_OWN) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    library = ctypes.CDLL(None)
    return bool(library.mallopt(_M_MMAP_THRESHOLD, LARGEST_BYTES) and library.mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES))
