"""Triton form of paged_attention: split along the context, combined by the last split of each key/value head.

Appending, nothing has to be read that another block writes, and no more than q, k and v as projected comes from the
launch before. So the context is loaded before that has ended. Query heads are made ready anew in every split: a
kilobyte, from L2. What the new token adds is no part of a split: the block that combines them begins with it, and one
stores its key and value.
"""

import torch
import triton
import triton.language as tl

from vitalrt_kernels.gpu.interpreted import INTERPRETED
from vitalrt_kernels.gpu.norm_rope import load_halves, turned
from vitalrt_kernels.gpu.overlap import overlap_options, share_alike, wait_for_previous
from vitalrt_kernels.gpu.tickets import is_last_block
from vitalrt_kernels.paged_attention import BLOCK_L, Append

BLOCKS_PER_SM = {"_paged_attention_kernel": 2}
WARPS = 4
MIN_GROUP = 16  # rows of a tensor core product; smaller groups are padded
MIN_COLUMNS = tl.constexpr(8)  # of a tensor core product
FEW_SPLITS = 4  # and so many blocks in each that it pays to have the next one on its way
PART_CELLS = 4096  # of splits, held in registers at once while combining: 8 splits of 4 heads of 128


@triton.jit
def _load_pages(pages_ptr, start, stop, PAGE_SIZE: tl.constexpr, BLOCK_L: tl.constexpr):
    """Numbers of the pages that hold positions start .. start + BLOCK_L - 1, 0 for what begins at `stop` or later.

    Where a block is a whole number of pages one for each page, few loads, else one for each position.
    pages: of this sequence.  From L2: L1 may hold what was there before an earlier launch wrote, until this one has
    waited for the one before it.
    """
    if BLOCK_L % PAGE_SIZE == 0:
        own = start // PAGE_SIZE + tl.arange(0, BLOCK_L // PAGE_SIZE)
        return tl.load(pages_ptr + own, mask=own * PAGE_SIZE < stop, other=0, cache_modifier=".cg")
    else:
        position = start + tl.arange(0, BLOCK_L)
        return tl.load(pages_ptr + position // PAGE_SIZE, mask=position < stop, other=0, cache_modifier=".cg")


@triton.jit
def _load_block(
    k_ptr, v_ptr, pages, start, stop, kv_head, num_kv_heads: tl.constexpr, head_dim: tl.constexpr,
    PAGE_SIZE: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Keys in two halves [BLOCK_L, HALF] and values [BLOCK_L, BLOCK_D] from position `start` on, zeros from `stop` on.

    pages: as _load_pages gives them.  From L2, like these.
    """
    position = start + tl.arange(0, BLOCK_L)
    is_context = position < stop
    if BLOCK_L % PAGE_SIZE == 0:
        slots = pages.to(tl.int64)[:, None] * PAGE_SIZE + tl.arange(0, PAGE_SIZE)[None, :]
        slot = tl.reshape(slots, [BLOCK_L])
    else:
        slot = pages.to(tl.int64) * PAGE_SIZE + position % PAGE_SIZE
    first = (slot * num_kv_heads + kv_head)[:, None] * head_dim
    low, high = load_halves(k_ptr, first, is_context, head_dim, HALF)
    i = tl.arange(0, BLOCK_D)
    inside = is_context[:, None] & (i < head_dim)[None, :]
    return low, high, tl.load(v_ptr + first + i[None, :], mask=inside, other=0.0, cache_modifier=".cg")


@triton.jit
def _store_here(x, STAGES: tl.constexpr):
    """x, which is stored in shared memory where this stands, and no earlier. Many rows leave that to the compiler.

    Left to it, what is loaded is stored where it is loaded, so that the low halves of keys are waited for first, then
    the high ones and then values. Triton moves nothing past assembly that may have an effect; this has none, and is
    gone in machine code, which a test looks at.
    """
    if STAGES > 1 or INTERPRETED:
        return x
    else:
        PACK: tl.constexpr = 32 // x.dtype.primitive_bitwidth
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=PACK)


@triton.jit
def _filled_up(x, ROWS: tl.constexpr):
    """[ROWS, N]: zeros below the rows of x, both powers of two."""
    if x.shape[0] >= ROWS:
        return x
    else:
        doubled = tl.trans(tl.join(x, tl.zeros_like(x)), 2, 0, 1)
        return _filled_up(tl.reshape(doubled, [2 * x.shape[0], x.shape[1]]), ROWS)


@triton.jit
def _scores(q_low, q_high, low, high, is_context, scale):
    """Of these keys, in halves, in base 2."""
    scores = tl.dot(q_low, tl.trans(low), input_precision="ieee")
    scores = tl.dot(q_high, tl.trans(high), scores, input_precision="ieee") * scale
    return tl.where(is_context[None, :], scores, float("-inf"))


@triton.jit
def _take_in(scores, values, largest, total, out):
    """Online softmax: largest, total and out with these values.

    Weights are summed by tensor cores too, as each column of their product with ones: for a reduction warps would meet,
    and out would wait.
    """
    new_largest = tl.maximum(largest, tl.max(scores, 1))
    weights = tl.exp2(scores - new_largest[:, None])
    shrink = tl.exp2(largest - new_largest)
    weights = weights.to(values.dtype)
    ones = tl.full([values.shape[0], MIN_COLUMNS], 1.0, values.dtype)
    total = total * shrink + tl.max(tl.dot(weights, ones, input_precision="ieee"), 1)
    out = tl.dot(weights, values, out * shrink[:, None], input_precision="ieee")
    return new_largest, total, out


@triton.jit
def _parts_of(split, first, num_splits, head, group):
    """Where each head's part of a split is, and whether there is one."""
    return (first + split) * group + head, tl.where(head < group, split, num_splits) < num_splits


@triton.jit
def _combined(
    largest, total, out, part_ptr, part_max_ptr, part_sum_ptr, first, num_splits, group: tl.constexpr,
    head_dim: tl.constexpr, MEMBERS: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS_AT_ONCE: tl.constexpr,
):  # fmt: skip
    """[MEMBERS, BLOCK_D] fp32, of these [MEMBERS], [MEMBERS], [MEMBERS, BLOCK_D] and splits first .. first + num_splits
    - 1 with them; zeros if nothing has been seen.

    SPLITS_AT_ONCE are asked for together, not one after the other, each a trip to L2, and all of them have the same
    maximum before any is weighed, so that no weight waits for another. A cell's splits are summed by the thread that
    has the cell: nothing moves between threads.
    """
    head = tl.arange(0, MEMBERS)
    i = tl.arange(0, BLOCK_D)
    for start in range(0, num_splits, SPLITS_AT_ONCE):
        of_all = largest
        for of_these in tl.static_range(SPLITS_AT_ONCE):
            parts, is_part = _parts_of(start + of_these, first, num_splits, head, group)
            of_all = tl.maximum(of_all, tl.load(part_max_ptr + parts, mask=is_part, other=-1e30, cache_modifier=".cg"))
        shrink = tl.exp2(largest - of_all)
        total *= shrink
        out *= shrink[:, None]
        for of_these in tl.static_range(SPLITS_AT_ONCE):
            parts, is_part = _parts_of(start + of_these, first, num_splits, head, group)
            # As above: the compiler loads it once.
            own_largest = tl.load(part_max_ptr + parts, mask=is_part, other=-1e30, cache_modifier=".cg")
            part_sum = tl.load(part_sum_ptr + parts, mask=is_part, other=0.0, cache_modifier=".cg")
            is_cell = is_part[:, None] & (i < head_dim)[None, :]
            cells = parts[:, None] * head_dim + i[None, :]
            part = tl.load(part_ptr + cells, mask=is_cell, other=0.0, cache_modifier=".cg")
            share = tl.exp2(own_largest - of_all)
            total += part_sum * share
            out += part * share[:, None]
        largest = of_all
    return out / tl.where(total > 0, total, 1.0)[:, None]


@triton.jit
def _paged_attention_kernel(
    q_ptr, norm_ptr, turns_ptr, eps, k_ptr, v_ptr, pages_ptr, lengths_ptr, out_ptr, part_ptr,
    part_max_ptr, part_sum_ptr, tickets_ptr, num_pages, scale, num_kv_heads: tl.constexpr, group: tl.constexpr,
    head_dim: tl.constexpr, PAGE_SIZE: tl.constexpr, SPLITS: tl.constexpr, GROUP: tl.constexpr,
    MEMBERS: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr, BLOCK_L: tl.constexpr, STAGES: tl.constexpr,
    SPLITS_AT_ONCE: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """q: as it is scored, or, where there is a norm, q, k and v as they were projected.

    group: query heads per key/value head; MEMBERS is the power of two that it is padded to, GROUP what tensor cores
    want.  scale: log2(e) / sqrt(D), for exp2.  part: [B, G, SPLITS, group, D] fp32.
    STAGES: blocks of a split that are on their way at a time, after the first.
    A context of fewer blocks than SPLITS is split into as many as it has; an empty one has a split all the same.
    """
    APPENDS: tl.constexpr = norm_ptr is not None
    if not APPENDS:
        wait_for_previous(OVERLAPS)  # keys and values may be of the launch before
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    pages_ptr += row * num_pages
    # Those of one block for each split, which most contexts have: asked for beside the length, and not after it.
    pages = _load_pages(pages_ptr, split * BLOCK_L, num_pages * PAGE_SIZE, PAGE_SIZE, BLOCK_L)
    length = tl.load(lengths_ptr + row, cache_modifier=".cg")
    held = length
    if APPENDS:
        held = tl.maximum(length - 1, 0)  # in the cache; the new token is no part of a split
    num_blocks = tl.cdiv(held, BLOCK_L)
    num_splits = tl.maximum(1, tl.minimum(num_blocks, SPLITS))
    first = num_blocks * split // num_splits * BLOCK_L
    stop = tl.minimum(num_blocks * (split + 1) // num_splits * BLOCK_L, held)
    if split < num_splits:
        if num_blocks > SPLITS:
            pages = _load_pages(pages_ptr, first, stop, PAGE_SIZE, BLOCK_L)
        low, high, values = _load_block(
            k_ptr, v_ptr, pages, first, stop, kv_head, num_kv_heads, head_dim, PAGE_SIZE, BLOCK_L, BLOCK_D, HALF
        )
        is_context = first + tl.arange(0, BLOCK_L) < stop
        i = tl.arange(0, BLOCK_D)
        in_head = i < head_dim
        member = tl.arange(0, MEMBERS)
        is_member = member < group
        if APPENDS:
            half = head_dim // 2
            in_half = tl.arange(0, HALF) < half
            cos_ptr = turns_ptr + row * head_dim + tl.arange(0, HALF)
            cos = tl.load(cos_ptr, mask=in_half, other=0.0, cache_modifier=".cg")
            sin = tl.load(cos_ptr + half, mask=in_half, other=0.0, cache_modifier=".cg")
            new_page = tl.load(pages_ptr + held // PAGE_SIZE, mask=length > 0, other=0, cache_modifier=".cg")
            heads = kv_head * group + member
            k_heads = num_kv_heads * group + kv_head + 0 * member  # beside each query head, so that nothing moves
            q_norm_low, q_norm_high = load_halves(norm_ptr, heads[:, None] * head_dim, is_member, head_dim, HALF)
            k_norm_low, k_norm_high = load_halves(norm_ptr, k_heads[:, None] * head_dim, is_member, head_dim, HALF)
            wait_for_previous(OVERLAPS)
            qkv_ptr = q_ptr + row * (group + 2) * num_kv_heads * head_dim
            q_low, q_high = load_halves(qkv_ptr, heads[:, None] * head_dim, is_member, head_dim, HALF)
            new_low, new_high = load_halves(qkv_ptr, k_heads[:, None] * head_dim, is_member, head_dim, HALF)
            new_value_ptr = qkv_ptr + ((group + 1) * num_kv_heads + kv_head) * head_dim + i
            q_low, q_high = turned(q_low, q_high, q_norm_low, q_norm_high, cos, sin, eps, head_dim)
        else:
            q_first = ((row * num_kv_heads + kv_head) * group + member)[:, None] * head_dim
            q_low, q_high = load_halves(q_ptr, q_first, is_member, head_dim, HALF)
        # After q has been asked for, which so does not wait.
        low, high = _store_here(low, STAGES), _store_here(high, STAGES)
        all_low, all_high = _filled_up(q_low, GROUP), _filled_up(q_high, GROUP)
        if APPENDS:
            key_low, key_high = turned(new_low, new_high, k_norm_low, k_norm_high, cos, sin, eps, head_dim)
            products = q_low.to(tl.float32) * key_low.to(tl.float32) + q_high.to(tl.float32) * key_high.to(tl.float32)
            new_score = scale * tl.sum(products, 1)

        # Finite where nothing has been seen: a padded member or an empty split must not compute inf - inf.
        largest = tl.full([GROUP], -1e30, tl.float32)
        total = tl.zeros([GROUP], tl.float32)
        out = tl.zeros([GROUP, BLOCK_D], tl.float32)
        scores = _scores(all_low, all_high, low, high, is_context, scale)
        largest, total, out = _take_in(scores, _store_here(values, STAGES), largest, total, out)
        for start in tl.range(first + BLOCK_L, stop, BLOCK_L, num_stages=STAGES):
            pages = _load_pages(pages_ptr, start, stop, PAGE_SIZE, BLOCK_L)
            low, high, values = _load_block(
                k_ptr, v_ptr, pages, start, stop, kv_head, num_kv_heads, head_dim, PAGE_SIZE, BLOCK_L, BLOCK_D, HALF
            )
            scores = _scores(all_low, all_high, low, high, start + tl.arange(0, BLOCK_L) < stop, scale)
            largest, total, out = _take_in(scores, values, largest, total, out)

        pair = row * num_kv_heads + kv_head
        padded = tl.arange(0, GROUP)
        part = (pair * SPLITS + split) * group + padded
        tl.store(part_max_ptr + part, largest, mask=padded < group)
        tl.store(part_sum_ptr + part, total, mask=padded < group)
        is_part = (padded < group)[:, None] & in_head[None, :]
        tl.store(part_ptr + part[:, None] * head_dim + i[None, :], out, mask=is_part)
        if is_last_block(tickets_ptr + pair, num_splits):
            largest_of_all = tl.full([MEMBERS], -1e30, tl.float32)
            total_of_all = tl.zeros([MEMBERS], tl.float32)
            out_of_all = tl.zeros([MEMBERS, BLOCK_D], tl.float32)
            if APPENDS:
                is_live = length > 0
                largest_of_all = tl.where(is_live, new_score, largest_of_all)
                total_of_all += tl.where(is_live, 1.0, 0.0)
                beside = new_value_ptr[None, :] + 0 * member[:, None]
                new_value = tl.load(beside, mask=in_head[None, :], other=0.0).to(tl.float32)
                out_of_all += tl.where(is_live, new_value, 0.0)
            whole = _combined(
                largest_of_all, total_of_all, out_of_all, part_ptr, part_max_ptr, part_sum_ptr, pair * SPLITS,
                num_splits, group, head_dim, MEMBERS, BLOCK_D, SPLITS_AT_ONCE,
            )  # fmt: skip
            out_cells = (pair * group + member)[:, None] * head_dim + i[None, :]
            is_out = is_member[:, None] & in_head[None, :]
            tl.store(out_ptr + out_cells, whole.to(out_ptr.dtype.element_ty), mask=is_out)
        if APPENDS:  # noqa: SIM102 - known when this is compiled. Last, as nobody in this launch waits for it
            if (split == 0) & (length > 0):
                new_slot = new_page.to(tl.int64) * PAGE_SIZE + held % PAGE_SIZE
                new_first = (new_slot * num_kv_heads + kv_head) * head_dim
                new_k_ptr = k_ptr + new_first + tl.arange(0, HALF)[None, :] + 0 * member[:, None]
                is_one = (member == 0)[:, None] & in_half[None, :]
                tl.store(new_k_ptr, key_low, mask=is_one)
                tl.store(new_k_ptr + half, key_high, mask=is_one)
                tl.store(v_ptr + new_first + i, tl.load(new_value_ptr, mask=in_head, other=0.0), mask=in_head)


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    pages: torch.Tensor,
    lengths: torch.Tensor,
    page_size: int,
    tickets: torch.Tensor,
    append: Append | None,
    splits: int,
) -> torch.Tensor:
    batch, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    norm_weight = turns = None
    eps = 0.0
    if append is not None:
        num_heads -= 2 * num_kv_heads
        norm_weight, eps, turns = append
    group = num_heads // num_kv_heads
    out = q.new_empty(batch, num_heads, head_dim)
    if not batch:
        return out
    members = triton.next_power_of_2(group)
    block_d = max(16, triton.next_power_of_2(head_dim))
    parts = (batch, num_kv_heads, splits, group)
    part = q.new_empty(*parts, head_dim, dtype=torch.float32)
    part_max, part_sum = q.new_empty(2, *parts, dtype=torch.float32)
    # Warps that hold the same numbers sum them in the same place. Products fused into sums would make the last bits of
    # their sums differ, and which of them stays would be chance.
    kernel = _paged_attention_kernel[(batch, num_kv_heads, splits)](
        q, norm_weight, turns, eps, k_cache, v_cache, pages, lengths, out, part, part_max, part_sum,
        tickets, pages.shape[1], 1.4426950408889634 * head_dim**-0.5, num_kv_heads, group, head_dim,
        PAGE_SIZE=page_size, SPLITS=splits, GROUP=max(MIN_GROUP, members), MEMBERS=members, BLOCK_D=block_d,
        HALF=max(16, triton.next_power_of_2((head_dim + 1) // 2)), BLOCK_L=BLOCK_L,
        STAGES=2 if splits <= FEW_SPLITS else 1,
        SPLITS_AT_ONCE=min(splits, max(1, PART_CELLS // (members * block_d))), num_warps=WARPS,
        enable_fp_fusion=False, **overlap_options(q),
    )  # fmt: skip
    share_alike(kernel, q, num_kv_heads * splits)
    return out
