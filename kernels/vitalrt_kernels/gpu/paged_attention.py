"""Triton form of paged_attention: split along the context, combined by the last split of each key/value head.

Appending, every split computes the new key and value for itself and one of them stores them: nothing has to be read
that another one writes, and no more than q, k and v as projected comes from the launch before. So the context is loaded
before that has ended. Query heads are made ready anew in every split: a kilobyte, from L2.
"""

import torch
import triton
import triton.language as tl

from vitalrt_kernels.gpu.norm_rope import load_turned
from vitalrt_kernels.gpu.overlap import fetch_rows, overlap_options, wait_for_previous
from vitalrt_kernels.gpu.tickets import is_last_block
from vitalrt_kernels.paged_attention import Append

BLOCKS_PER_SM = {"_paged_attention_kernel": 2}
BLOCK_L = 64
MIN_GROUP = 16  # rows of a tensor core product; smaller groups are padded
MAX_SPLITS = 32
NORM_BYTES = tl.constexpr(256)  # of each head's
TARGET_BLOCKS = 264  # two per multiprocessor of an H200
PART_CELLS = 8192  # of splits, held in registers at once while combining: 16 splits of 4 heads of 128


@triton.jit
def _load_block(
    k_ptr, v_ptr, pages_ptr, start, stop, kv_head, num_kv_heads, head_dim,
    PAGE_SIZE: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Keys and values [BLOCK_L, BLOCK_D] from position `start` on, zeros from `stop` on.  pages: of this sequence.

    From L2: L1 may hold what was there before an earlier launch wrote, until this one has waited for the one before it.
    """
    position = start + tl.arange(0, BLOCK_L)
    i = tl.arange(0, BLOCK_D)
    is_context = position < stop
    page = tl.load(pages_ptr + position // PAGE_SIZE, mask=is_context, other=0, cache_modifier=".cg")
    slot = page.to(tl.int64) * PAGE_SIZE + position % PAGE_SIZE
    cells = (slot * num_kv_heads + kv_head)[:, None] * head_dim + i[None, :]
    inside = is_context[:, None] & (i < head_dim)[None, :]
    keys = tl.load(k_ptr + cells, mask=inside, other=0.0, cache_modifier=".cg")
    return keys, tl.load(v_ptr + cells, mask=inside, other=0.0, cache_modifier=".cg")


@triton.jit
def _attend(q, keys, values, is_context, scale, largest, total, out):
    """Online softmax in base 2: largest, total and out with these keys and values taken in."""
    scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
    scores = tl.where(is_context[None, :], scores, float("-inf"))
    new_largest = tl.maximum(largest, tl.max(scores, 1))
    weights = tl.exp2(scores - new_largest[:, None])
    shrink = tl.exp2(largest - new_largest)
    total = total * shrink + tl.sum(weights, 1)
    out = tl.dot(weights.to(values.dtype), values, out * shrink[:, None], input_precision="ieee")
    return new_largest, total, out


@triton.jit
def _combined(
    part_ptr, part_max_ptr, part_sum_ptr, first, num_splits, group, head_dim,
    MEMBERS: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS_AT_ONCE: tl.constexpr,
):  # fmt: skip
    """[MEMBERS, BLOCK_D] fp32 of splits first .. first + num_splits - 1; zeros if these have seen nothing.

    Up to SPLITS_AT_ONCE are asked for together, not one after the other, each a trip to L2.
    """
    head = tl.arange(0, MEMBERS)
    i = tl.arange(0, BLOCK_D)
    largest = tl.full([MEMBERS], -1e30, tl.float32)
    total = tl.zeros([MEMBERS], tl.float32)
    out = tl.zeros([MEMBERS, BLOCK_D], tl.float32)
    for start in range(0, num_splits, SPLITS_AT_ONCE):
        split = start + tl.arange(0, SPLITS_AT_ONCE)[:, None]
        is_part = (split < num_splits) & (head < group)[None, :]
        parts = (first + split) * group + head[None, :]
        maxima = tl.load(part_max_ptr + parts, mask=is_part, other=-1e30, cache_modifier=".cg")
        sums = tl.load(part_sum_ptr + parts, mask=is_part, other=0.0, cache_modifier=".cg")
        cells = parts[:, :, None] * head_dim + i[None, None, :]
        is_cell = is_part[:, :, None] & (i < head_dim)[None, None, :]
        outs = tl.load(part_ptr + cells, mask=is_cell, other=0.0, cache_modifier=".cg")
        new_largest = tl.maximum(largest, tl.max(maxima, 0))
        share = tl.exp2(maxima - new_largest[None, :])
        shrink = tl.exp2(largest - new_largest)
        total = total * shrink + tl.sum(sums * share, 0)
        out = out * shrink[:, None] + tl.sum(outs * share[:, :, None], 0)
        largest = new_largest
    return out / tl.where(total > 0, total, 1.0)[:, None]


@triton.jit
def _paged_attention_kernel(
    q_ptr, norm_ptr, positions_ptr, frequency_ptr, eps, k_ptr, v_ptr, pages_ptr, lengths_ptr, out_ptr, part_ptr,
    part_max_ptr, part_sum_ptr, tickets_ptr, num_kv_heads, group, head_dim, num_pages, scale,
    PAGE_SIZE: tl.constexpr, SPLITS: tl.constexpr, GROUP: tl.constexpr, MEMBERS: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr, SPLITS_AT_ONCE: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """q: as it is scored, or, where there is a norm, q, k and v as they were projected.

    group: query heads per key/value head; GROUP and MEMBERS are the powers of two that it is padded to for tensor cores
    and for combining.  scale: log2(e) / sqrt(D), for exp2.  part: [B, G, SPLITS, group, D] fp32.
    A context of fewer blocks than SPLITS is split into as many as it has; an empty one has a split all the same.
    """
    APPENDS: tl.constexpr = norm_ptr is not None
    if not APPENDS:
        wait_for_previous(OVERLAPS)  # keys and values may be of the launch before
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(lengths_ptr + row, cache_modifier=".cg")
    num_blocks = tl.cdiv(length, BLOCK_L)
    num_splits = tl.maximum(1, tl.minimum(num_blocks, SPLITS))
    first = num_blocks * split // num_splits * BLOCK_L
    stop = tl.minimum(num_blocks * (split + 1) // num_splits * BLOCK_L, length)
    if split < num_splits:
        pages_ptr += row * num_pages
        held = stop
        if APPENDS:
            held = tl.minimum(stop, length - 1)
        keys, values = _load_block(
            k_ptr, v_ptr, pages_ptr, first, held, kv_head, num_kv_heads, head_dim, PAGE_SIZE, BLOCK_L, BLOCK_D
        )
        i = tl.arange(0, BLOCK_D)
        in_head = i < head_dim
        member = tl.arange(0, GROUP)
        heads = kv_head * group + member
        in_group = (member < group)[:, None] & in_head[None, :]
        if APPENDS:
            place = tl.load(positions_ptr + row, cache_modifier=".cg")
            last = tl.maximum(length - 1, 0)
            new_page = tl.load(pages_ptr + last // PAGE_SIZE, mask=length > 0, other=0, cache_modifier=".cg")
            heads = tl.where(member < group, heads, num_kv_heads * group + kv_head)  # the new key is one of them
            fetch_rows(norm_ptr, heads, (group + 1) * num_kv_heads, head_dim, NORM_BYTES, OVERLAPS)
            wait_for_previous(OVERLAPS)
            qkv_ptr = q_ptr + row * (group + 2) * num_kv_heads * head_dim
            k_head = num_kv_heads * group + kv_head
            v_cells = ((k_head + num_kv_heads) * head_dim + i)[None, :]
            new_value = tl.load(qkv_ptr + v_cells, mask=in_head[None, :], other=0.0)
            # At once, or q and k would be two trips to memory.
            q = load_turned(qkv_ptr, norm_ptr, heads, member <= group, place, frequency_ptr, eps, head_dim, BLOCK_D)
            new_key = tl.sum(tl.where((member == group)[:, None], q, 0.0), 0).to(q.dtype)
            if (first < stop) & (stop == length):  # one split, and none where the row is idle
                new_slot = new_page.to(tl.int64) * PAGE_SIZE + last % PAGE_SIZE
                new_cells = (new_slot * num_kv_heads + kv_head) * head_dim + i
                tl.store(k_ptr + new_cells, new_key, mask=in_head)
                tl.store(v_ptr + new_cells[None, :], new_value, mask=in_head[None, :])
        else:
            q_cells = (row * num_kv_heads * group + heads)[:, None] * head_dim + i[None, :]
            q = tl.load(q_ptr + q_cells, mask=in_group, other=0.0)

        # Finite where nothing has been seen: a padded member or an empty split must not compute inf - inf.
        largest = tl.full([GROUP], -1e30, tl.float32)
        total = tl.zeros([GROUP], tl.float32)
        out = tl.zeros([GROUP, BLOCK_D], tl.float32)
        for start in range(first, stop, BLOCK_L):
            if start > first:
                keys, values = _load_block(
                    k_ptr, v_ptr, pages_ptr, start, held, kv_head, num_kv_heads, head_dim, PAGE_SIZE, BLOCK_L, BLOCK_D
                )
            position = start + tl.arange(0, BLOCK_L)
            if APPENDS:
                is_new = (position == length - 1)[:, None]
                keys = tl.where(is_new, new_key[None, :], keys)
                values = tl.where(is_new, new_value, values)
            largest, total, out = _attend(q, keys, values, position < stop, scale, largest, total, out)

        pair = row * num_kv_heads + kv_head
        part = (pair * SPLITS + split) * group + member
        tl.store(part_max_ptr + part, largest, mask=member < group)
        tl.store(part_sum_ptr + part, total, mask=member < group)
        tl.store(part_ptr + part[:, None] * head_dim + i[None, :], out, mask=in_group)
        if is_last_block(tickets_ptr + pair, num_splits):
            whole = _combined(
                part_ptr, part_max_ptr, part_sum_ptr, pair * SPLITS, num_splits, group, head_dim,
                MEMBERS, BLOCK_D, SPLITS_AT_ONCE,
            )  # fmt: skip
            head = tl.arange(0, MEMBERS)
            out_cells = (pair * group + head)[:, None] * head_dim + i[None, :]
            is_out = (head < group)[:, None] & in_head[None, :]
            tl.store(out_ptr + out_cells, whole.to(out_ptr.dtype.element_ty), mask=is_out)


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    pages: torch.Tensor,
    lengths: torch.Tensor,
    page_size: int,
    tickets: torch.Tensor,
    append: Append | None,
) -> torch.Tensor:
    batch, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    norm_weight = positions = frequencies = None
    eps = 0.0
    if append is not None:
        num_heads -= 2 * num_kv_heads
        norm_weight, eps, positions, frequencies = append
    group = num_heads // num_kv_heads
    out = q.new_empty(batch, num_heads, head_dim)
    if not batch:
        return out
    splits = num_splits(batch * num_kv_heads, pages.shape[1] * page_size)
    members = triton.next_power_of_2(group)
    rows = triton.next_power_of_2(group + (append is not None))  # the new key is one of them
    block_d = max(16, triton.next_power_of_2(head_dim))
    parts = (batch, num_kv_heads, splits, group)
    part = q.new_empty(*parts, head_dim, dtype=torch.float32)
    part_max, part_sum = q.new_empty(2, *parts, dtype=torch.float32)
    # Warps that hold the same numbers sum them in the same place. Products fused into sums would make the last bits of
    # their sums differ, and which of them stays would be chance.
    _paged_attention_kernel[(batch, num_kv_heads, splits)](
        q, norm_weight, positions, frequencies, eps, k_cache, v_cache, pages, lengths, out, part, part_max, part_sum,
        tickets, num_kv_heads, group, head_dim, pages.shape[1], 1.4426950408889634 * head_dim**-0.5,
        PAGE_SIZE=page_size, SPLITS=splits, GROUP=max(MIN_GROUP, rows), MEMBERS=members, BLOCK_D=block_d,
        BLOCK_L=BLOCK_L, SPLITS_AT_ONCE=min(splits, max(1, PART_CELLS // (members * block_d))), num_warps=4,
        num_stages=2, enable_fp_fusion=False, **overlap_options(q),
    )  # fmt: skip
    return out


def num_splits(num_pairs: int, capacity: int) -> int:
    """Enough to fill the card, none that could never have a block of context; a power of two, so few variants."""
    useful = min(TARGET_BLOCKS // num_pairs, triton.cdiv(capacity, BLOCK_L), MAX_SPLITS)
    return 2 ** (useful.bit_length() - 1) if useful > 1 else 1
