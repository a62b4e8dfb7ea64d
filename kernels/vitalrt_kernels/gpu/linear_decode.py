"""Triton form of linear_decode: each thread block owns some outputs and walks along the whole of their weights."""

import torch
import triton
import triton.language as tl

from vitalrt_kernels.gpu.overlap import FETCHED_COLUMNS, fetch_rows, overlap_options, wait_for_previous
from vitalrt_kernels.gpu.rows_times_weight import (
    add_product,
    empty_total,
    finish_total,
    inverse_rms,
    load_columns,
    load_rows,
)
from vitalrt_kernels.linear_decode import MAX_ROWS, Int8Weight, Norm
from vitalrt_kernels.tuned import Tile, tuned_tile

# 4.3 TB/s times a latency of 0.8 us is 26 kB on their way to each multiprocessor of an H200: two blocks' 16 kB tiles.
BLOCKS_PER_SM = {"_linear_decode_kernel": 2}


@triton.jit
def _linear_decode_kernel(
    x_ptr, norm_ptr, weight_ptr, scale_ptr, residual_ptr, y_ptr, num_rows, num_outputs, width, eps,
    SWIGLU: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    FETCHED: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """num_outputs: columns of y; with SWIGLU the weight has twice as many rows, gate before up.

    One row is divided by its rms at the end, as the sum of its squares comes out of the same loop: weights stream from
    the first moment. Several rows go through tensor cores, whose operands are narrow: these are normed before.
    """
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    up_weight_ptr = weight_ptr + tl.cast(num_outputs, tl.int64) * width
    fetch_rows(weight_ptr, outputs, num_outputs, width, OVERLAPS, FETCHED)
    if SWIGLU:
        fetch_rows(up_weight_ptr, outputs, num_outputs, width, OVERLAPS, FETCHED)
    wait_for_previous(OVERLAPS)
    squares = tl.zeros([ROWS, BLOCK_K], tl.float32)
    if norm_ptr is not None and ROWS > 1:
        rstd = inverse_rms(x_ptr, num_rows, width, eps, ROWS, BLOCK_K)
    total = empty_total(ROWS, BLOCK_N, BLOCK_K)
    up = empty_total(ROWS, BLOCK_N, BLOCK_K)
    for start in tl.range(0, width, BLOCK_K, num_stages=STAGES):
        columns = start + tl.arange(0, BLOCK_K)
        x = load_rows(x_ptr, num_rows, width, columns, ROWS)
        if norm_ptr is not None:
            norm = load_columns(norm_ptr, width, columns)
            if ROWS > 1:
                normed = (x.to(tl.float32) * rstd[:, None]).to(x.dtype)
                x = (normed.to(tl.float32) * norm).to(x.dtype)
            else:
                wide = x.to(tl.float32)
                squares += wide * wide
                x = wide * norm
        total = add_product(total, x, weight_ptr, outputs, num_outputs, width, columns, ROWS)
        if SWIGLU:
            up = add_product(up, x, up_weight_ptr, outputs, num_outputs, width, columns, ROWS)
    y = finish_total(total, scale_ptr, outputs, num_outputs, ROWS)
    one_rstd = 1.0
    if norm_ptr is not None and ROWS == 1:
        one_rstd = tl.rsqrt(tl.sum(squares, 1) / width + eps)[:, None]
        y *= one_rstd
    if SWIGLU:
        y = y * tl.sigmoid(y)
        if scale_ptr is not None:
            y *= finish_total(up, scale_ptr + num_outputs, outputs, num_outputs, ROWS) * one_rstd
        else:
            y *= finish_total(up, None, outputs, num_outputs, ROWS) * one_rstd
    rows = tl.arange(0, ROWS)
    inside = (rows < num_rows)[:, None] & (outputs < num_outputs)[None, :]
    cells = rows.to(tl.int64)[:, None] * num_outputs + outputs[None, :]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + cells, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + cells, y.to(y_ptr.dtype.element_ty), mask=inside)


def default_tile(num_rows: int, swiglu: bool) -> Tile:
    """One row: 16 kB of bf16 weights on their way per block. More rows: tensor cores want 16 of them.

    Narrow blocks of outputs, so that the smallest matrix (O, 4096 outputs) still gives every multiprocessor some.
    """
    if num_rows == 1:
        return Tile(outputs=8 if swiglu else 16, columns=512, stages=1, warps=8)
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
            ROWS=1 if len(x) == 1 else MAX_ROWS, FETCHED=FETCHED_COLUMNS,
            **tile.options(), **overlap_options(x),
        )  # fmt: skip
    return y
