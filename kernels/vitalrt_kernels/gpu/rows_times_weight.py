"""What linear_decode and head_argmax share: a few rows against a block of a weight's rows, summed in fp32.

The weight is read once and never again: evict_first keeps the rows in L2 instead.
"""

import triton
import triton.language as tl

from vitalrt_kernels.gpu.overlap import fetch, wait_for_previous
from vitalrt_kernels.gpu.widen import as_fp32
from vitalrt_kernels.linear_decode import MAX_ROWS
from vitalrt_kernels.tuned import Tile

LANES = tl.constexpr(32)  # of a warp
NORM_BYTES = tl.constexpr(8192)  # of a norm's weight, fetched before the launch before has ended


def options(num_rows: int, tile: Tile) -> dict[str, int]:
    """What a kernel over times_weight is launched with."""
    return {"ROWS": 1 if num_rows == 1 else MAX_ROWS, **tile.options()}


@triton.jit
def times_weight(
    x_ptr, num_rows, norm_ptr, eps, weight_ptr, up_ptr, residual_ptr, first, num_outputs, width, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, WARPS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Rows, normed where there is a norm, times rows first .. first + BLOCK_N - 1 of the weight, and of `up`, or None.

    Waits for the launch before, which makes x. Returns three [ROWS, BLOCK_N] fp32: the products, those of `up` and the
    residual, which is on its way while the weight is read; in place of what is None, the products once more.
    """
    if norm_ptr is not None:
        fetch(norm_ptr, width, NORM_BYTES, OVERLAPS)
    if ROWS == 1:
        return _one_row(
            x_ptr, norm_ptr, eps, weight_ptr, up_ptr, residual_ptr, first, num_outputs, width, BLOCK_N, BLOCK_K,
            OVERLAPS,
        )  # fmt: skip
    else:
        wait_for_previous(OVERLAPS)
        return _few_rows(
            x_ptr, num_rows, norm_ptr, eps, weight_ptr, up_ptr, residual_ptr, first, num_outputs, width, ROWS, BLOCK_N,
            BLOCK_K, STAGES, WARPS,
        )  # fmt: skip


@triton.jit
def _load_residual(residual_ptr, num_rows, first, num_outputs, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    rows = tl.arange(0, ROWS)
    outputs = first + tl.arange(0, BLOCK_N)
    inside = (rows < num_rows)[:, None] & (outputs < num_outputs)[None, :]
    cells = rows.to(tl.int64)[:, None] * num_outputs + outputs[None, :]
    return tl.load(residual_ptr + cells, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _one_row(
    x_ptr, norm_ptr, eps, weight_ptr, up_ptr, residual_ptr, first, num_outputs, width,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Multiplied and added by each thread for itself, so that the loop holds no reduction and no barrier.

    For that, x has to come to every thread as the weight does: BLOCK_K is at least the 8 columns of each of the block's
    threads, and for what follows BLOCK_N at most the lanes of a warp (see Tile). The sums are divided by the rms at the
    end, as the sum of squares comes out of the same loop: weights stream from the first moment.

    Weights are asked for in the round before, the first before the launch before has ended. Where they are used in the
    same round, the compiler moves each load down to where its numbers are needed, and there it waits for the one
    before; carried over, they are asked for together and waited for once, while other warps multiply. It leaves bytes
    together by itself, and those, carried over, would be unpacked into a register each. x, a trip to L2, is asked for a
    round ahead as well, unless there is a norm, whose weight would then have to be too.
    """
    tl.static_assert(BLOCK_N <= LANES and BLOCK_K >= 8 * LANES, "of one row: up to 32 outputs, 256 columns or more")
    IS_AHEAD: tl.constexpr = weight_ptr.dtype.element_ty != tl.int8
    IS_X_AHEAD: tl.constexpr = IS_AHEAD and norm_ptr is None
    outputs = tl.arange(0, BLOCK_N)[:, None]
    is_output = first + outputs < num_outputs
    # Addressed row by row: with one offset for all, triton 3.8 asks for up's only after gate's have been used.
    starts = tl.cast(first, tl.int64) * width + outputs * width  # the second in int32: within the block
    weight_rows, up_rows = weight_ptr + starts, None
    if up_ptr is not None:
        up_rows = up_ptr + starts
    squares = tl.zeros([1, BLOCK_K // 8], tl.float32)
    total = tl.zeros([BLOCK_N, BLOCK_K // 8], tl.float32)
    up_total = tl.zeros([BLOCK_N, BLOCK_K // 8], tl.float32)
    if IS_AHEAD:
        columns = tl.arange(0, BLOCK_K)[None, :]
        weight, up = _load_by_eight(weight_rows, up_rows, is_output, columns, width)
    wait_for_previous(OVERLAPS)
    if residual_ptr is not None:
        residual = _load_residual(residual_ptr, 1, first, num_outputs, 1, BLOCK_N)
    if IS_X_AHEAD:
        x = _load_columns(x_ptr, columns, width)
    for start in range(0, width, BLOCK_K):
        columns = (start + tl.arange(0, BLOCK_K))[None, :]
        if IS_X_AHEAD:
            next_x = _load_columns(x_ptr, columns + BLOCK_K, width)
        if IS_AHEAD:
            next_weight, next_up = _load_by_eight(weight_rows, up_rows, is_output, columns + BLOCK_K, width)
        else:
            weight, up = _load_by_eight(weight_rows, up_rows, is_output, columns, width)
        if not IS_X_AHEAD:
            x = _load_columns(x_ptr, columns, width)
        row = x.to(tl.float32)
        if norm_ptr is not None:
            squares = _add_products(squares, row, row, 8)
            row *= _load_columns(norm_ptr, columns, width).to(tl.float32)
        total = _add_products(total, row, as_fp32(weight), 8)
        if up_ptr is not None:
            up_total = _add_products(up_total, row, as_fp32(up), 8)
        if IS_AHEAD:
            weight, up = next_weight, next_up
        if IS_X_AHEAD:
            x = next_x
    sums = _by_output(_shared_among_lanes(total, LANES // 2), BLOCK_N)
    if up_ptr is not None:
        up_sums = _by_output(_shared_among_lanes(up_total, LANES // 2), BLOCK_N)
    if norm_ptr is not None:
        of_squares = _by_output(squares, BLOCK_N)  # in as many parts as outputs, to go along with their reduction
        if up_ptr is not None:
            sums, up_sums, of_squares = tl.reduce((sums, up_sums, of_squares), 1, _add_three)
        else:
            sums, of_squares = tl.reduce((sums, of_squares), 1, _add_two)
            up_sums = sums
        rstd = tl.rsqrt(tl.sum(of_squares, 0) / width + eps)
        sums *= rstd
        up_sums *= rstd
    elif up_ptr is not None:
        sums, up_sums = tl.reduce((sums, up_sums), 1, _add_two)
    else:
        sums = tl.sum(sums, 1)
        up_sums = sums
    y = sums[None, :]
    if residual_ptr is not None:
        return y, up_sums[None, :], residual
    else:
        return y, up_sums[None, :], y


@triton.jit
def _shared_among_lanes(total, STRIDE: tl.constexpr):
    """total [N, C], whose column c is in lane c % 32.  Returns [1, C]: each lane's share of one output's sum.

    A lane gives half of its outputs to the one STRIDE lanes away, which gives it its share of the other half, and so on
    until each is left with one of the N, in order where STRIDE begins with half of the lanes: N - 1 exchanges in a
    warp. A reduction, which leaves every sum in every lane, takes 5 N, and a multiprocessor makes one a clock. Were
    columns elsewhere, it would be as right, and slow.
    """
    N: tl.constexpr = total.shape[0]
    C: tl.constexpr = total.shape[1]
    if N == 1:
        return total
    else:
        first, second = tl.split(tl.trans(tl.reshape(total, [2, N // 2, C // LANES, LANES]), 1, 2, 3, 0))
        lane = tl.arange(0, LANES)[None, None, :]
        keeps_second = (lane & STRIDE) != 0
        given = tl.where(keeps_second, first, second)
        taken = tl.gather(given, tl.broadcast_to(lane ^ STRIDE, given.shape), 2)
        kept = tl.where(keeps_second, second, first) + taken
        return _shared_among_lanes(tl.reshape(kept, [N // 2, C]), STRIDE // 2)


@triton.jit
def _by_output(shares, N: tl.constexpr):
    """shares [1, C], of N outputs, one after the other, in the lanes of each warp: [N, C / N]."""
    C: tl.constexpr = shares.shape[1]
    of_warps = tl.reshape(shares, [C // LANES, N, LANES // N])
    return tl.reshape(tl.trans(of_warps, 1, 0, 2), [N, C // N])


@triton.jit
def _add_two(x, y, other_x, other_y):
    return x + other_x, y + other_y


@triton.jit
def _add_three(x, y, z, other_x, other_y, other_z):
    return x + other_x, y + other_y, z + other_z


@triton.jit
def _load_columns(ptr, columns, width):
    """Of a row that every block reads."""
    return tl.load(ptr + columns, mask=columns < width, other=0.0, eviction_policy="evict_last")


@triton.jit
def _load_by_eight(weight_rows, up_rows, is_output, columns, width):
    """These columns of the weight's rows, and of those of `up`, or None, as stored; zero outside.

    A thread has eight columns, as of x in 16 bits: int8 in 16 bytes would lie otherwise than x.
    """
    inside = is_output & (columns < width)
    cells = tl.max_contiguous(weight_rows + columns, [1, 8])
    weight = tl.load(cells, mask=inside, other=0.0, eviction_policy="evict_first")
    if up_rows is not None:
        up_cells = tl.max_contiguous(up_rows + columns, [1, 8])
        up = tl.load(up_cells, mask=inside, other=0.0, eviction_policy="evict_first")
        return weight, up
    else:
        return weight, weight


@triton.jit
def _add_products(total, x, weight, NEIGHBOURS: tl.constexpr):
    """total [N, K / NEIGHBOURS] and the products x [1, K] * weight [N, K] of its NEIGHBOURS columns, one by one.

    Up to eight are in the thread that total is in: nothing moves.
    """
    if NEIGHBOURS == 1:
        return total + x * weight
    else:
        x_even, x_odd = _even_and_odd(x)
        even, odd = _even_and_odd(weight)
        total = _add_products(total, x_even, even, NEIGHBOURS // 2)
        return _add_products(total, x_odd, odd, NEIGHBOURS // 2)


@triton.jit
def _even_and_odd(x):
    return tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))


@triton.jit
def _few_rows(
    x_ptr, num_rows, norm_ptr, eps, weight_ptr, up_ptr, residual_ptr, first, num_outputs, width, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """By tensor cores, which want 16 rows: each warp multiplies columns of its own, all outputs of the block.

    A product of batches does that. One product, shared out by outputs, would have every warp prepare all of x again.
    """
    outputs = first + tl.arange(0, BLOCK_N)
    OF_WARP: tl.constexpr = BLOCK_K // WARPS
    own_columns = tl.arange(0, WARPS)[:, None] * OF_WARP + tl.arange(0, OF_WARP)[None, :]
    squares = tl.zeros([WARPS, ROWS, OF_WARP], tl.float32)
    total = tl.zeros([WARPS, ROWS, BLOCK_N], tl.float32)
    up_total = tl.zeros([WARPS, ROWS, BLOCK_N], tl.float32)
    if residual_ptr is not None:
        residual = _load_residual(residual_ptr, num_rows, first, num_outputs, ROWS, BLOCK_N)
    for start in tl.range(0, width, BLOCK_K, num_stages=STAGES):
        columns = start + own_columns
        x = _load_rows(x_ptr, tl.arange(0, ROWS), num_rows, width, columns, "evict_last")
        if norm_ptr is not None:
            norm = tl.load(norm_ptr + columns, mask=columns < width, other=0.0, eviction_policy="evict_last")
            wide = x.to(tl.float32)
            squares += wide * wide
            x *= norm[:, None, :]
        weight = _load_rows(weight_ptr, outputs, num_outputs, width, columns, "evict_first")
        total = tl.dot(x, tl.trans(weight.to(x.dtype), 0, 2, 1), total, input_precision="ieee")
        if up_ptr is not None:
            up = _load_rows(up_ptr, outputs, num_outputs, width, columns, "evict_first")
            up_total = tl.dot(x, tl.trans(up.to(x.dtype), 0, 2, 1), up_total, input_precision="ieee")
    y = tl.sum(total, 0)
    if norm_ptr is not None:
        rstd = tl.rsqrt(tl.sum(tl.sum(squares, 2), 0) / width + eps)[:, None]
        y *= rstd
    y_of_up = y
    if up_ptr is not None:
        y_of_up = tl.sum(up_total, 0)
        if norm_ptr is not None:
            y_of_up *= rstd
    if residual_ptr is not None:
        return y, y_of_up, residual
    else:
        return y, y_of_up, y


@triton.jit
def _load_rows(ptr, rows, num_rows, width, columns, POLICY: tl.constexpr):
    """columns: [warps, columns of each].  Returns [warps, rows, columns of each], as stored; zero outside."""
    inside = (rows < num_rows)[None, :, None] & (columns < width)[:, None, :]
    cells = rows.to(tl.int64)[None, :, None] * width + columns[:, None, :]
    return tl.load(ptr + cells, mask=inside, other=0.0, eviction_policy=POLICY)
