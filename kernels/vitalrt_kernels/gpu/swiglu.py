"""Triton form of swiglu: each thread block does some columns of a row."""

import torch
import triton
import triton.language as tl

from vitalrt_kernels.gpu.overlap import overlap_options, wait_for_previous

BLOCKS_PER_SM = {"_swiglu_kernel": 8}
BLOCK = 1024


@triton.jit
def _swiglu_kernel(x_ptr, y_ptr, width, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):
    """width: of y."""
    wait_for_previous(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(x_ptr + 2 * row * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + (2 * row + 1) * width + columns, mask=inside, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + row * width + columns, y.to(y_ptr.dtype.element_ty), mask=inside)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    num_rows, width = len(x), x.shape[1] // 2
    y = x.new_empty(num_rows, width)
    if y.numel():
        grid = (num_rows, triton.cdiv(width, BLOCK))
        _swiglu_kernel[grid](x, y, width, BLOCK=BLOCK, num_warps=4, **overlap_options(x))
    return y
