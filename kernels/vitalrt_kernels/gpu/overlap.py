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
DRIVERS_CHOICE = -1
CARVEOUT = 9  # the driver's number for CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
_asked: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


@functools.cache
def can_overlap(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= OLDEST_CAPABILITY


def overlap_options(tensor: torch.Tensor) -> dict[str, bool]:
    """What a kernel with OVERLAPS is launched with."""
    overlaps = can_overlap(tensor.device)
    return {"OVERLAPS": True, "launch_pdl": True} if overlaps else {"OVERLAPS": False}


def share_alike(kernel: Any, rows: torch.Tensor, num_blocks: int = 1) -> None:
    """How a multiprocessor's fast memory is divided into L1 and shared memory, from the kernel's next launch on.

    Blocks of two kernels are on one multiprocessor at a time only where both do with the same division; else one waits
    until all of the other's have left. Left to itself the driver gives each kernel its own. So where launches overlap,
    kernels of a single row all ask for the same; those of more, or of so many blocks that one would wait for another
    of its own kernel, leave it to the driver. A graph keeps what was asked for before its capture, by the dry run.

    kernel: what its launch gave; None where it is interpreted.  num_blocks: those that need a lot of shared memory.
    """
    if getattr(kernel, "function", None) is None or not can_overlap(rows.device):
        return
    is_alike = len(rows) == 1 and num_blocks <= num_multiprocessors(rows.device)
    percent = SHARED_PERCENT if is_alike else DRIVERS_CHOICE
    if _asked.get(kernel, DRIVERS_CHOICE) != percent:
        # A wish: whatever the driver makes of it, results are the same.
        _driver().cuFuncSetAttribute(ctypes.c_void_p(kernel.function), CARVEOUT, percent)
        _asked[kernel] = percent


def num_multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


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
