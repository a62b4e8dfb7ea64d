"""Triton form of linear_decode: each thread block owns some outputs and walks along the whole of their weights."""

import torch
import triton
import triton.language as tl

from vitalrt_kernels.gpu.overlap import fetch_rows, overlap_options, wait_for_previous
from vitalrt_kernels.gpu.rows_times_weight import options, times_weight
from vitalrt_kernels.linear_decode import MAX_ROWS, Int8Weight, Norm
from vitalrt_kernels.tuned import Tile, tuned_tile

# 4.3 TB/s times a latency of 0.8 us is 26 kB on their way to each multiprocessor of an H200. A block has 4 kB of them
# for one row, and 16 or more for several.
BLOCKS_PER_SM = {"_linear_decode_kernel": {1: 8, MAX_ROWS: 3}}


@triton.jit
def _linear_decode_kernel(
    x_ptr, norm_ptr, weight_ptr, scale_ptr, residual_ptr, y_ptr, num_rows, num_outputs, width, eps,
    SWIGLU: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """num_outputs: columns of y; with SWIGLU the weight has twice as many rows, gate before up."""
    first = tl.program_id(0) * BLOCK_N
    outputs = first + tl.arange(0, BLOCK_N)
    up_ptr = None
    fetch_rows(weight_ptr, outputs, num_outputs, width, OVERLAPS)
    if SWIGLU:
        up_ptr = weight_ptr + tl.cast(num_outputs, tl.int64) * width
        fetch_rows(up_ptr, outputs, num_outputs, width, OVERLAPS)
    wait_for_previous(OVERLAPS)
    y, up = times_weight(
        x_ptr, num_rows, norm_ptr, eps, weight_ptr, up_ptr, first, num_outputs, width, ROWS, BLOCK_N, BLOCK_K,
        STAGES,
    )  # fmt: skip
    is_output = outputs < num_outputs
    if scale_ptr is not None:
        y *= tl.load(scale_ptr + outputs, mask=is_output, other=0.0)[None, :]
    if SWIGLU:
        if scale_ptr is not None:
            up *= tl.load(scale_ptr + num_outputs + outputs, mask=is_output, other=0.0)[None, :]
        y = y * tl.sigmoid(y) * up
    rows = tl.arange(0, ROWS)
    inside = (rows < num_rows)[:, None] & is_output[None, :]
    cells = rows.to(tl.int64)[:, None] * num_outputs + outputs[None, :]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + cells, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + cells, y.to(y_ptr.dtype.element_ty), mask=inside)


def default_tile(num_rows: int, swiglu: bool) -> Tile:
    """One row: small blocks with four rows of weights to a thread. More rows: tensor cores want 16 of them.

    Narrow blocks of outputs, so that the smallest matrix (O, 4096 outputs) still gives every multiprocessor some.
    """
    if num_rows == 1:
        return Tile(outputs=2 if swiglu else 4, columns=512, stages=1, warps=2)
    return Tile(outputs=16, columns=128, stages=3 if swiglu else 4, warps=4)


def linear_decode(
    x: torch.Tensor,
    weight: torch.Tensor | Int8Weight,
    norm: Norm | None,
    residual: torch.Tensor | None,
    swiglu: bool,
    tile: Tile | None = None,
) -> torch.Tensor:
    """tile: None for the tuned one, or else the default."""
    values, scale = weight if isinstance(weight, Int8Weight) else (weight, None)
    norm_weight, eps = norm or (None, 0.0)
    num_outputs = len(values) // (2 if swiglu else 1)
    y = x.new_empty(len(x), num_outputs)
    if y.numel():
        tile = tile or tuned_tile(len(x), values) or default_tile(len(x), swiglu)
        _linear_decode_kernel[(triton.cdiv(num_outputs, tile.outputs),)](
            x, norm_weight, values, scale, residual, y, len(x), num_outputs, x.shape[1], eps, SWIGLU=swiglu,
            **options(len(x), tile), **overlap_options(x),
        )  # fmt: skip
    return y
