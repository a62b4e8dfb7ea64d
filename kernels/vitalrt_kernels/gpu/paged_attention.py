"""Triton form of paged_attention: split along the context, combined by the last split of each key/value head.

The split that ends with the new token writes its key and value, and no other reads them: within one launch that is all
the order there has to be. Query heads are made ready again in every split: a kilobyte, from L2.
"""

import torch
import triton
import triton.language as tl

from vitalrt_kernels.gpu.norm_rope import load_turned
from vitalrt_kernels.gpu.overlap import overlap_options, wait_for_previous
from vitalrt_kernels.gpu.tickets import is_last_block
from vitalrt_kernels.paged_attention import Append

BLOCKS_PER_SM = {"_paged_attention_kernel": 2}
BLOCK_L = 64
MIN_GROUP = 16  # rows of a tensor core product; smaller groups are padded
MAX_SPLITS = 32
TARGET_BLOCKS = 264  # two per multiprocessor of an H200
PART_CELLS = 4096  # of other splits, held in registers at once while combining


@triton.jit
def _paged_attention_kernel(
    q_ptr, norm_ptr, positions_ptr, frequency_ptr, eps, k_ptr, v_ptr, pages_ptr, lengths_ptr, out_ptr, part_ptr,
    part_max_ptr, part_sum_ptr, tickets_ptr, num_kv_heads, group, head_dim, num_pages, scale,
    PAGE_SIZE: tl.constexpr, SPLITS: tl.constexpr, GROUP: tl.constexpr, MEMBERS: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr, SPLITS_AT_ONCE: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """q: as it is scored, or, where there is a norm, q, k and v as they were projected.

    group: query heads per key/value head; GROUP and MEMBERS are the powers of two that it is padded to for tensor cores
    and for combining.  scale: log2(e) / sqrt(D), for exp2.  part: [B, G, SPLITS, group, D] fp32."""
    wait_for_previous(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    member = tl.arange(0, GROUP)
    i = tl.arange(0, BLOCK_D)
    in_head = i < head_dim
    in_group = (member < group)[:, None] & in_head[None, :]
    length = tl.load(lengths_ptr + row)
    num_blocks = tl.cdiv(length, BLOCK_L)
    first = tl.cdiv(num_blocks * split, SPLITS) * BLOCK_L
    stop = tl.minimum(tl.cdiv(num_blocks * (split + 1), SPLITS) * BLOCK_L, length)
    heads = kv_head * group + member
    if norm_ptr is not None:
        place = tl.load(positions_ptr + row)
        row_ptr = q_ptr + row * (group + 2) * num_kv_heads * head_dim
        q = load_turned(row_ptr, norm_ptr, heads, member < group, place, frequency_ptr, eps, head_dim, BLOCK_D)
        if (first < stop) & (stop == length):
            one = tl.arange(0, 1)
            k_head = num_kv_heads * group + kv_head + one
            k = load_turned(row_ptr, norm_ptr, k_head, one == 0, place, frequency_ptr, eps, head_dim, BLOCK_D)
            v_cells = (k_head + num_kv_heads)[:, None] * head_dim + i[None, :]
            v = tl.load(row_ptr + v_cells, mask=in_head[None, :], other=0.0)
            last_page = tl.load(pages_ptr + row * num_pages + (length - 1) // PAGE_SIZE).to(tl.int64)
            new_slot = last_page * PAGE_SIZE + (length - 1) % PAGE_SIZE
            new_cells = (new_slot * num_kv_heads + kv_head + one)[:, None] * head_dim + i[None, :]
            tl.store(k_ptr + new_cells, k, mask=in_head[None, :])
            tl.store(v_ptr + new_cells, v, mask=in_head[None, :])
            tl.debug_barrier()  # other threads of this block read them below
    else:
        q_cells = (row * num_kv_heads * group + heads)[:, None] * head_dim + i[None, :]
        q = tl.load(q_ptr + q_cells, mask=in_group, other=0.0)

    # Finite where nothing has been seen: a padded member or an empty split must not compute inf - inf.
    largest = tl.full([GROUP], -1e30, tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    out = tl.zeros([GROUP, BLOCK_D], tl.float32)
    for start in range(first, stop, BLOCK_L):
        position = start + tl.arange(0, BLOCK_L)
        is_context = position < stop
        page = tl.load(pages_ptr + row * num_pages + position // PAGE_SIZE, mask=is_context, other=0)
        slot = page.to(tl.int64) * PAGE_SIZE + position % PAGE_SIZE
        cells = (slot * num_kv_heads + kv_head)[:, None] * head_dim + i[None, :]
        inside = is_context[:, None] & in_head[None, :]
        keys = tl.load(k_ptr + cells, mask=inside, other=0.0)
        values = tl.load(v_ptr + cells, mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(is_context[None, :], scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - new_largest[:, None])
        shrink = tl.exp2(largest - new_largest)
        total = total * shrink + tl.sum(weights, 1)
        out = tl.dot(weights.to(values.dtype), values, out * shrink[:, None], input_precision="ieee")
        largest = new_largest

    pair = row * num_kv_heads + kv_head
    part = (pair * SPLITS + split) * group + member
    tl.store(part_max_ptr + part, largest, mask=member < group)
    tl.store(part_sum_ptr + part, total, mask=member < group)
    tl.store(part_ptr + part[:, None] * head_dim + i[None, :], out, mask=in_group)
    if is_last_block(tickets_ptr + pair, SPLITS):
        head = tl.arange(0, MEMBERS)
        is_head = (head < group)[None, :]
        parts = (pair * SPLITS + tl.arange(0, SPLITS))[:, None] * group + head[None, :]
        maxima = tl.load(part_max_ptr + parts, mask=is_head, other=-1e30, cache_modifier=".cg")
        sums = tl.load(part_sum_ptr + parts, mask=is_head, other=0.0, cache_modifier=".cg")
        top = tl.max(maxima, 0)
        weight = tl.sum(sums * tl.exp2(maxima - top[None, :]), 0)
        combined = tl.zeros([MEMBERS, BLOCK_D], tl.float32)
        # Unrolled, several splits at a time: one after the other would cost a trip to L2 each.
        for first_of_some in tl.static_range(0, SPLITS, SPLITS_AT_ONCE):
            some = (pair * SPLITS + first_of_some + tl.arange(0, SPLITS_AT_ONCE))[:, None] * group + head[None, :]
            share = tl.exp2(
                tl.load(part_max_ptr + some, mask=is_head, other=-1e30, cache_modifier=".cg") - top[None, :]
            )
            some_cells = some[:, :, None] * head_dim + i[None, None, :]
            is_cell = is_head[:, :, None] & in_head[None, None, :]
            some_out = tl.load(part_ptr + some_cells, mask=is_cell, other=0.0, cache_modifier=".cg")
            combined += tl.sum(some_out * share[:, :, None], 0)
        combined /= tl.where(weight > 0, weight, 1.0)[:, None]  # an empty context gives zeros
        out_cells = (pair * group + head)[:, None] * head_dim + i[None, :]
        is_out = (head < group)[:, None] & in_head[None, :]
        tl.store(out_ptr + out_cells, combined.to(out_ptr.dtype.element_ty), mask=is_out)


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
    block_d = max(16, triton.next_power_of_2(head_dim))
    parts = (batch, num_kv_heads, splits, group)
    part = q.new_empty(*parts, head_dim, dtype=torch.float32)
    part_max, part_sum = q.new_empty(2, *parts, dtype=torch.float32)
    _paged_attention_kernel[(batch, num_kv_heads, splits)](
        q, norm_weight, positions, frequencies, eps, k_cache, v_cache, pages, lengths, out, part, part_max, part_sum,
        tickets, num_kv_heads, group, head_dim, pages.shape[1], 1.4426950408889634 * head_dim**-0.5,
        PAGE_SIZE=page_size, SPLITS=splits, GROUP=max(MIN_GROUP, members), MEMBERS=members, BLOCK_D=block_d,
        BLOCK_L=BLOCK_L, SPLITS_AT_ONCE=min(splits, max(1, PART_CELLS // (members * block_d))), num_warps=4,
        num_stages=2, **overlap_options(q),
    )  # fmt: skip
    return out


def num_splits(num_pairs: int, capacity: int) -> int:
    """Enough to fill the card, none that could never have a block of context; a power of two, so few variants."""
    useful = min(TARGET_BLOCKS // num_pairs, triton.cdiv(capacity, BLOCK_L), MAX_SPLITS)
    return 2 ** (useful.bit_length() - 1) if useful > 1 else 1
