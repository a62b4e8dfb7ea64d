"""What linear_decode and head_argmax share: a few rows against a block of a weight's rows, summed in fp32.

The weight is read once and never again: evict_first keeps the rows in L2 instead.
"""

import triton
import triton.language as tl

from vitalrt_kernels.linear_decode import MAX_ROWS
from vitalrt_kernels.tuned import Tile


def options(num_rows: int, tile: Tile) -> dict[str, int]:
    """What a kernel over times_weight is launched with."""
    return {"ROWS": 1 if num_rows == 1 else MAX_ROWS, **tile.options()}


@triton.jit
def times_weight(
    x_ptr, num_rows, norm_ptr, eps, weight_ptr, up_ptr, first, num_outputs, width, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows, normed where there is a norm, times rows first .. first + BLOCK_N - 1 of the weight, and of `up`, or None.

    Returns two [ROWS, BLOCK_N] fp32, the same one twice where there is no `up`.
    """
    if ROWS == 1:
        return _one_row(x_ptr, norm_ptr, eps, weight_ptr, up_ptr, first, num_outputs, width, BLOCK_N, BLOCK_K)
    else:
        return _few_rows(
            x_ptr, num_rows, norm_ptr, eps, weight_ptr, up_ptr, first, num_outputs, width, ROWS, BLOCK_N, BLOCK_K,
            STAGES,
        )  # fmt: skip


@triton.jit
def _one_row(
    x_ptr, norm_ptr, eps, weight_ptr, up_ptr, first, num_outputs, width, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Multiplied and added by each thread for itself, so that the loop holds no reduction and no barrier.

    For that, x has to come to every thread as the weight does: BLOCK_K is at least the 8 columns of each of the block's
    threads (see Tile), and a thread has the same columns of all outputs, one after the other in registers. The sums are
    divided by the rms at the end, as the sum of squares comes out of the same loop: weights stream from the first
    moment.
    """
    outputs = tl.arange(0, BLOCK_N)[:, None]
    is_output = first + outputs < num_outputs
    skipped = tl.cast(first, tl.int64) * width
    rows = outputs * width  # int32: within the block
    squares = tl.zeros([1, BLOCK_K], tl.float32)
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    up_total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in range(0, width, BLOCK_K):
        columns = (start + tl.arange(0, BLOCK_K))[None, :]
        in_row = columns < width
        # What comes from far is asked for first.
        weight = _load_by_eight(weight_ptr + skipped, rows + columns, is_output & in_row)
        if up_ptr is not None:
            up = _load_by_eight(up_ptr + skipped, rows + columns, is_output & in_row)
        x = tl.load(x_ptr + columns, mask=in_row, other=0.0, eviction_policy="evict_last").to(tl.float32)
        if norm_ptr is not None:
            norm = tl.load(norm_ptr + columns, mask=in_row, other=0.0, eviction_policy="evict_last")
            squares += x * x
            x *= norm.to(tl.float32)
        total += x * weight.to(tl.float32)
        if up_ptr is not None:
            up_total += x * up.to(tl.float32)
    y = tl.sum(total, 1)[None, :]
    if norm_ptr is not None:
        rstd = tl.rsqrt(tl.sum(squares, 1) / width + eps)[:, None]
        y *= rstd
    if up_ptr is not None:
        y_of_up = tl.sum(up_total, 1)[None, :]
        if norm_ptr is not None:
            y_of_up *= rstd
        return y, y_of_up
    else:
        return y, y


@triton.jit
def _load_by_eight(weight_ptr, cells, inside):
    """As it is stored. A thread has eight columns, as of x in 16 bits: int8 in 16 bytes would lie otherwise than x."""
    eights = tl.max_contiguous(weight_ptr + cells, [1, 8])
    return tl.load(eights, mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def _few_rows(
    x_ptr, num_rows, norm_ptr, eps, weight_ptr, up_ptr, first, num_outputs, width, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """By tensor cores, which want 16 rows, and whose operands are narrow: rows are normed before."""
    outputs = first + tl.arange(0, BLOCK_N)
    if norm_ptr is not None:
        rstd = _inverse_rms(x_ptr, num_rows, width, eps, ROWS, BLOCK_K)
    total = tl.zeros([ROWS, BLOCK_N], tl.float32)
    up_total = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for start in tl.range(0, width, BLOCK_K, num_stages=STAGES):
        columns = start + tl.arange(0, BLOCK_K)
        x = _load_rows(x_ptr, num_rows, width, columns, ROWS)
        if norm_ptr is not None:
            norm = tl.load(norm_ptr + columns, mask=columns < width, other=0.0, eviction_policy="evict_last")
            normed = (x.to(tl.float32) * rstd[:, None]).to(x.dtype).to(tl.float32)
            x = (normed * norm.to(tl.float32)[None, :]).to(x.dtype)
        total = _add_product(total, x, weight_ptr, outputs, num_outputs, width, columns)
        if up_ptr is not None:
            up_total = _add_product(up_total, x, up_ptr, outputs, num_outputs, width, columns)
    if up_ptr is not None:
        return total, up_total
    else:
        return total, total


@triton.jit
def _load_rows(x_ptr, num_rows, width, columns, ROWS: tl.constexpr):
    """[ROWS, BLOCK_K] of x in its dtype; zero outside."""
    rows = tl.arange(0, ROWS)
    inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
    cells = rows.to(tl.int64)[:, None] * width + columns[None, :]
    return tl.load(x_ptr + cells, mask=inside, other=0.0, eviction_policy="evict_last")


@triton.jit
def _inverse_rms(x_ptr, num_rows, width, eps, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """[ROWS] fp32."""
    squares = tl.zeros([ROWS, BLOCK_K], tl.float32)
    for start in range(0, width, BLOCK_K):
        x = _load_rows(x_ptr, num_rows, width, start + tl.arange(0, BLOCK_K), ROWS).to(tl.float32)
        squares += x * x
    return tl.rsqrt(tl.sum(squares, 1) / width + eps)


@triton.jit
def _add_product(total, x, weight_ptr, outputs, num_outputs, width, columns):
    """total + x @ weight[outputs, columns].T"""
    inside = (outputs < num_outputs)[:, None] & (columns < width)[None, :]
    cells = outputs.to(tl.int64)[:, None] * width + columns[None, :]
    weight = tl.load(weight_ptr + cells, mask=inside, other=0.0, eviction_policy="evict_first")
    return tl.dot(x, tl.trans(weight.to(x.dtype)), total, input_precision="ieee")
