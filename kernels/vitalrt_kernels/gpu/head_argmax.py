"""Triton form of head_argmax."""

import torch
import triton
import triton.language as tl

from vitalrt_kernels.gpu import linear_decode
from vitalrt_kernels.gpu.overlap import overlap_options, share_alike
from vitalrt_kernels.gpu.rows_times_weight import options, times_weight
from vitalrt_kernels.gpu.tickets import is_last_block
from vitalrt_kernels.linear_decode import MAX_ROWS, Int8Weight
from vitalrt_kernels.tuned import Tile, tuned_tile

BLOCKS_PER_SM = {"_head_argmax_kernel": {1: 2, MAX_ROWS: 1}}
SLICES_AT_ONCE = {1: 4096, MAX_ROWS: 256}  # by rows of the tile: what fits in registers


@triton.jit
def _head_argmax_kernel(
    h_ptr, head_ptr, scale_ptr, best_ptr, best_id_ptr, ticket_ptr, token_ptr, num_rows, vocab, width,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    WARPS: tl.constexpr, SLICES_AT_ONCE: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, ROWS)
    first = tl.program_id(0) * BLOCK_N
    ids = first + tl.arange(0, BLOCK_N)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + ids, mask=ids < vocab, other=0.0)[None, :]
    logits, _, _ = times_weight(
        h_ptr, num_rows, None, 0.0, head_ptr, None, None, first, vocab, width, ROWS, BLOCK_N, BLOCK_K, STAGES, WARPS,
        OVERLAPS,
    )  # fmt: skip
    if scale_ptr is not None:
        logits *= scale
    logits = logits.to(h_ptr.dtype.element_ty).to(tl.float32)
    logits = tl.where(logits != logits, float("inf"), logits)
    logits = tl.where((ids < vocab)[None, :], logits, float("-inf"))
    best, place = tl.max(logits, 1, return_indices=True)
    num_slices = tl.num_programs(0)
    slices = rows.to(tl.int64) * num_slices + tl.program_id(0)
    tl.store(best_ptr + slices, best, mask=rows < num_rows)
    tl.store(best_id_ptr + slices, first + place, mask=rows < num_rows)
    if is_last_block(ticket_ptr, num_slices):
        best = tl.full([ROWS], float("-inf"), tl.float32)
        token = tl.full([ROWS], 0, tl.int32)
        for start in range(0, num_slices, SLICES_AT_ONCE):
            some = start + tl.arange(0, SLICES_AT_ONCE)
            inside = (rows < num_rows)[:, None] & (some < num_slices)[None, :]
            cells = rows.to(tl.int64)[:, None] * num_slices + some[None, :]
            values = tl.load(best_ptr + cells, mask=inside, other=float("-inf"), cache_modifier=".cg")
            found = tl.load(best_id_ptr + cells, mask=inside, other=0, cache_modifier=".cg")
            best_here, slice_here = tl.max(values, 1, return_indices=True)
            token_here = tl.sum(tl.where(tl.arange(0, SLICES_AT_ONCE)[None, :] == slice_here[:, None], found, 0), 1)
            token = tl.where(best_here > best, token_here, token)  # slices come in order: on a tie the first stays
            best = tl.maximum(best, best_here)
        tl.store(token_ptr + rows, token.to(tl.int64), mask=rows < num_rows)


def head_argmax(
    h: torch.Tensor,
    head: torch.Tensor | Int8Weight,
    tickets: torch.Tensor,
    tokens: torch.Tensor,
    tile: Tile | None = None,
) -> None:
    """Into tokens, [M].  tile: None for the tuned one, or else the default."""
    values, scale = head if isinstance(head, Int8Weight) else (head, None)
    tile = tile or tuned_tile(len(h), values) or linear_decode.default_tile(h, values, swiglu=False)
    of_tile = options(len(h), tile)
    num_slices = triton.cdiv(len(values), tile.outputs)
    best = h.new_empty(len(h), num_slices, dtype=torch.float32)
    best_id = h.new_empty(len(h), num_slices, dtype=torch.int32)
    if len(h):
        kernel = _head_argmax_kernel[(num_slices,)](
            h, values, scale, best, best_id, tickets, tokens, len(h), len(values), h.shape[1],
            SLICES_AT_ONCE=SLICES_AT_ONCE[of_tile["ROWS"]], **of_tile, **overlap_options(h),
        )  # fmt: skip
        share_alike(kernel, h)
