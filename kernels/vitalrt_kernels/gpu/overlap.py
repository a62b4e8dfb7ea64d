"""Launches that overlap: a kernel is set up, and asks for its first weights, while the one before it still runs.

Programmatic dependent launch, compute capability 9.0 on. Whoever is launched so may not touch what the kernel before
writes until wait_for_previous(): then all that came before is done, since each of those waited likewise. What no launch
writes (weights) may be loaded earlier. So may what kernels before the previous one have written, for that one has
waited for them before it let this one begin; but from L2, since L1 is sure to be up to date only after the wait.
"""

import ctypes
import functools
import weakref
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

OLDEST_CAPABILITY = (9, 0)
LINE = tl.constexpr(128)  # bytes of L2
SHARED_PERCENT = 4  # of a multiprocessor's fast memory; the rest is L1, through which weights come
CARVEOUT = 9  # the driver's number for CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
_asked: weakref.WeakSet[Any] = weakref.WeakSet()


@functools.cache
def can_overlap(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= OLDEST_CAPABILITY


def overlap_options(tensor: torch.Tensor) -> dict[str, bool]:
    """What a kernel with OVERLAPS is launched with."""
    overlaps = can_overlap(tensor.device)
    return {"OVERLAPS": True, "launch_pdl": True} if overlaps else {"OVERLAPS": False}


def share_alike(kernel: Any, num_rows: int) -> None:
    """kernel: what its launch gave, None where it is interpreted. If for one row: SHARED_PERCENT from the next one on.

    Blocks of two kernels are on one multiprocessor at a time only where both do with the same share of its memory that
    is not L1; else one waits until all of the other's have left. Left to itself the driver gives each kernel its own.
    More rows want more of it. It is a wish: a driver that does not grant it changes no result.
    """
    if num_rows == 1 and getattr(kernel, "function", None) is not None and kernel not in _asked:
        _driver().cuFuncSetAttribute(ctypes.c_void_p(kernel.function), CARVEOUT, SHARED_PERCENT)
        _asked.add(kernel)


@functools.cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


@triton.jit
def wait_for_previous(OVERLAPS: tl.constexpr):
    """The next kernel may be set up from here on: all blocks of this one that have begun have what they need."""
    if OVERLAPS:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def fetch(ptr, size, BYTES: tl.constexpr, OVERLAPS: tl.constexpr):
    """Ask for the first BYTES of `size` numbers to be brought to L2, and wait for nothing."""
    if OVERLAPS:
        NUMBERS: tl.constexpr = LINE * 8 // ptr.dtype.element_ty.primitive_bitwidth
        lines = ptr + tl.minimum(tl.arange(0, BYTES // LINE) * NUMBERS, size - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1
        )
