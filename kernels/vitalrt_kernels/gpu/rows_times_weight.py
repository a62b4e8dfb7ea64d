"""What linear_decode and head_argmax share: a few rows against a block of a weight's rows, summed in fp32."""

import triton
import triton.language as tl


@triton.jit
def load_rows(x_ptr, num_rows, width, columns, ROWS: tl.constexpr):
    """[ROWS, BLOCK_K] of x in its dtype; zero outside."""
    rows = tl.arange(0, ROWS)
    inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
    cells = rows.to(tl.int64)[:, None] * width + columns[None, :]
    return tl.load(x_ptr + cells, mask=inside, other=0.0, eviction_policy="evict_last")


@triton.jit
def load_columns(ptr, width, columns):
    """[1, BLOCK_K] fp32 of a weight of the norm; zero outside."""
    values = tl.load(ptr + columns, mask=columns < width, other=0.0, eviction_policy="evict_last")
    return values.to(tl.float32)[None, :]


@triton.jit
def inverse_rms(x_ptr, num_rows, width, eps, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """[ROWS] fp32."""
    squares = tl.zeros([ROWS, BLOCK_K], tl.float32)
    for start in range(0, width, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        x = load_rows(x_ptr, num_rows, width, columns, ROWS).to(tl.float32)
        squares += x * x
    return tl.rsqrt(tl.sum(squares, 1) / width + eps)


@triton.jit
def add_product(total, x, weight_ptr, outputs, num_outputs, width, columns, ROWS: tl.constexpr):
    """total + x @ weight[outputs, columns].T.

    One row: total is [BLOCK_N, BLOCK_K], products yet to be summed along K, so that the loop holds no reduction.
    More rows: total is [ROWS, BLOCK_N] and tensor cores sum; ROWS is then at least 16.
    The weight is read once and never again: evict_first keeps the rows in L2 instead.
    """
    inside = (outputs < num_outputs)[:, None] & (columns < width)[None, :]
    cells = outputs.to(tl.int64)[:, None] * width + columns[None, :]
    weight = tl.load(weight_ptr + cells, mask=inside, other=0.0, eviction_policy="evict_first")
    if ROWS == 1:
        total += weight.to(tl.float32) * x.to(tl.float32)
    else:
        total = tl.dot(x, tl.trans(weight.to(x.dtype)), total, input_precision="ieee")
    return total


@triton.jit
def empty_total(ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    if ROWS == 1:
        return tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    else:
        return tl.zeros([ROWS, BLOCK_N], tl.float32)


@triton.jit
def finish_total(total, scale_ptr, outputs, num_outputs, ROWS: tl.constexpr):
    """[ROWS, BLOCK_N] fp32, times the scale of each output where the weight is int8."""
    if ROWS == 1:
        total = tl.sum(total, 1)[None, :]
    if scale_ptr is not None:
        total *= tl.load(scale_ptr + outputs, mask=outputs < num_outputs, other=0.0)[None, :]
    return total
