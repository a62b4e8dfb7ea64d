"""The threads of torch's operations, for the C++ core to use as well.

OpenMP's threads wait for the next operation spinning, on a core each: threads of anybody else would wait for them.
"""

from __future__ import annotations

import ctypes
import functools
import re
from pathlib import Path

import torch

MAPS = Path("/proc/self/maps")


@functools.cache
def parallel_address() -> int:
    """Of GOMP_parallel (libgomp's ABI, which LLVM's and Intel's OpenMP have too) in torch's OpenMP; 0 if not found."""
    if not MAPS.is_file():
        return 0
    paths = {line.split(maxsplit=5)[5].strip() for line in MAPS.read_text().splitlines() if "omp" in line}
    found = sorted(path for path in paths if re.match(r"lib[gi]?omp\d?[-.]", Path(path).name))
    torch_root = Path(torch.__file__).parent
    roots = (torch_root / "lib", torch_root.with_name("torch.libs"))
    own = [path for path in found if Path(path).parent in roots] or found
    if len(own) != 1:  # others come with libraries of their own: which one is torch's is not told
        return 0
    try:
        return ctypes.cast(ctypes.CDLL(own[0]).GOMP_parallel, ctypes.c_void_p).value or 0
    except (AttributeError, OSError):
        return 0
