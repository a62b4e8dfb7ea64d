"""Triton form of linear_decode: each thread block owns some outputs and walks along the whole of their weights."""

import torch
import triton
import triton.language as tl

from vitalrt_kernels.gpu.overlap import overlap_options, share_alike
from vitalrt_kernels.gpu.rms_norm import rms_norm
from vitalrt_kernels.gpu.rows_times_weight import options, times_weight
from vitalrt_kernels.linear_decode import MAX_ROWS, Int8Weight, Norm
from vitalrt_kernels.tuned import Tile, tuned_tile

FEW_OUTPUTS = 4096
BLOCKS_PER_SM = {"_linear_decode_kernel": {1: 2, MAX_ROWS: 1}}


@triton.jit
def _linear_decode_kernel(
    x_ptr, norm_ptr, weight_ptr, scale_ptr, residual_ptr, y_ptr, num_rows, num_outputs, width, eps,
    SWIGLU: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, WARPS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """num_outputs: columns of y; with SWIGLU the weight has twice as many rows, gate before up."""
    first = tl.program_id(0) * BLOCK_N
    outputs = first + tl.arange(0, BLOCK_N)
    up_ptr = None
    if SWIGLU:
        up_ptr = weight_ptr + tl.cast(num_outputs, tl.int64) * width
    is_output = outputs < num_outputs
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + outputs, mask=is_output, other=0.0)[None, :]
        if SWIGLU:
            up_scale = tl.load(scale_ptr + num_outputs + outputs, mask=is_output, other=0.0)[None, :]
    y, up, residual = times_weight(
        x_ptr, num_rows, norm_ptr, eps, weight_ptr, up_ptr, residual_ptr, first, num_outputs, width, ROWS, BLOCK_N,
        BLOCK_K, STAGES, WARPS, OVERLAPS,
    )  # fmt: skip
    if scale_ptr is not None:
        y *= scale
        if SWIGLU:
            up *= up_scale
    if SWIGLU:
        y = y * tl.sigmoid(y) * up
    rows = tl.arange(0, ROWS)
    inside = (rows < num_rows)[:, None] & is_output[None, :]
    cells = rows.to(tl.int64)[:, None] * num_outputs + outputs[None, :]
    if residual_ptr is not None:
        y += residual
    tl.store(y_ptr + cells, y.to(y_ptr.dtype.element_ty), mask=inside)


def default_tile(x: torch.Tensor, weight: torch.Tensor, swiglu: bool) -> Tile:
    """weight: as stored. What was fastest on an H200 at the shapes of Qwen3-VL-8B, whose O and down have few outputs.

    One row: what counts is bytes on their way, and that what is done to x serves many of them.
    More rows: each block reads all of x from L2, which for 16 rows is as much as 16 rows of weights in 16 bits; so it
    has 32 or more.
    """
    itemsize = weight.itemsize
    if len(x) > 1:
        if x.dtype == torch.float32:  # rarely served; a wider one with SwiGLU fits not everywhere
            return Tile(32, 128, stages=2, warps=8)
        is_narrow = itemsize == 1 and len(weight) <= FEW_OUTPUTS
        return Tile(32, 512, stages=3, warps=8) if is_narrow else Tile(32, 256, stages=3, warps=4)
    if itemsize == 4:
        return Tile(4, 256, stages=1, warps=1)
    if len(weight) <= FEW_OUTPUTS:
        return Tile(8, 2048, stages=1, warps=8)
    if itemsize == 1:
        return Tile(8, 1024, stages=1, warps=4)
    return Tile(8, 512, stages=1, warps=2) if swiglu else Tile(16, 1024, stages=1, warps=4)


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
    if norm is not None and len(x) > 1 and x.dtype == torch.float16:
        # Several rows are divided by their rms after the product, and before that fp16 may not hold them.
        normed = rms_norm(x, *norm, residual=None, out=None)
        assert isinstance(normed, torch.Tensor)
        x, norm = normed, None
    norm_weight, eps = norm or (None, 0.0)
    num_outputs = len(values) // (2 if swiglu else 1)
    y = x.new_empty(len(x), num_outputs)
    if y.numel():
        tile = tile or tuned_tile(len(x), values) or default_tile(x, values, swiglu)
        kernel = _linear_decode_kernel[(triton.cdiv(num_outputs, tile.outputs),)](
            x, norm_weight, values, scale, residual, y, len(x), num_outputs, x.shape[1], eps, SWIGLU=swiglu,
            **options(len(x), tile), **overlap_options(x),
        )  # fmt: skip
        share_alike(kernel, x)
    return y
