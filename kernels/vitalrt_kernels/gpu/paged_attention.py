"""Triton form of paged_attention: split along the context, combined by the last split of each key/value head."""

import torch
import triton
import triton.language as tl

from vitalrt_kernels.gpu.tickets import is_last_block

BLOCKS_PER_SM = {"_paged_attention_kernel": 2}
BLOCK_L = 64
MIN_GROUP = 16  # rows of a tensor core product; smaller groups are padded
MAX_SPLITS = 32
TARGET_BLOCKS = 264  # two per multiprocessor of an H200
PART_CELLS = 4096  # of other splits, held in registers at once while combining


@triton.jit
def _paged_attention_kernel(
    q_ptr, k_ptr, v_ptr, pages_ptr, lengths_ptr, out_ptr, part_ptr, part_max_ptr, part_sum_ptr, tickets_ptr,
    num_kv_heads, group, head_dim, num_pages, scale,
    PAGE_SIZE: tl.constexpr, SPLITS: tl.constexpr, GROUP: tl.constexpr, MEMBERS: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr, SPLITS_AT_ONCE: tl.constexpr,
):  # fmt: skip
    """group: query heads per key/value head; GROUP and MEMBERS are the powers of two that it is padded to for tensor
    cores and for combining.  scale: log2(e) / sqrt(D), for exp2.  part: [B, G, SPLITS, group, D] fp32."""
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    member = tl.arange(0, GROUP)
    i = tl.arange(0, BLOCK_D)
    in_head = i < head_dim
    in_group = (member < group)[:, None] & in_head[None, :]
    q_cells = (row * num_kv_heads * group + kv_head * group + member)[:, None] * head_dim + i[None, :]
    q = tl.load(q_ptr + q_cells, mask=in_group, other=0.0)
    length = tl.load(lengths_ptr + row)
    num_blocks = tl.cdiv(length, BLOCK_L)
    first = tl.cdiv(num_blocks * split, SPLITS) * BLOCK_L
    stop = tl.minimum(tl.cdiv(num_blocks * (split + 1), SPLITS) * BLOCK_L, length)

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
) -> torch.Tensor:
    batch, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    group = num_heads // num_kv_heads
    out = torch.empty_like(q)
    if not batch:
        return out
    splits = num_splits(batch * num_kv_heads, pages.shape[1] * page_size)
    members = triton.next_power_of_2(group)
    block_d = max(16, triton.next_power_of_2(head_dim))
    parts = (batch, num_kv_heads, splits, group)
    part = q.new_empty(*parts, head_dim, dtype=torch.float32)
    part_max, part_sum = q.new_empty(2, *parts, dtype=torch.float32)
    _paged_attention_kernel[(batch, num_kv_heads, splits)](
        q, k_cache, v_cache, pages, lengths, out, part, part_max, part_sum, tickets, num_kv_heads, group, head_dim,
        pages.shape[1], 1.4426950408889634 * head_dim**-0.5, PAGE_SIZE=page_size, SPLITS=splits,
        GROUP=max(MIN_GROUP, members), MEMBERS=members, BLOCK_D=block_d, BLOCK_L=BLOCK_L,
        SPLITS_AT_ONCE=min(splits, max(1, PART_CELLS // (members * block_d))), num_warps=4, num_stages=2,
    )  # fmt: skip
    return out


def num_splits(num_pairs: int, capacity: int) -> int:
    """Enough to fill the card, none that could never have a block of context; a power of two, so few variants."""
    useful = min(TARGET_BLOCKS // num_pairs, triton.cdiv(capacity, BLOCK_L), MAX_SPLITS)
    return 2 ** (useful.bit_length() - 1) if useful > 1 else 1
