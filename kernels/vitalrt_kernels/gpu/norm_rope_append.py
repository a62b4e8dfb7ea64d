"""Triton form of norm_rope_append: one warp per few heads of a token."""

import torch
import triton
import triton.language as tl

from vitalrt_kernels.gpu.norm_rope import cos_sin, load_halves, turned
from vitalrt_kernels.gpu.overlap import overlap_options, wait_for_previous
from vitalrt_kernels.norm_rope_append import Rope

BLOCKS_PER_SM = {"_norm_rope_append_kernel": 16}
HEADS_AT_ONCE = 4


@triton.jit
def _norm_rope_append_kernel(
    qkv_ptr, norm_ptr, positions_ptr, frequency_ptr, axis_ptr, slots_ptr, q_ptr, k_ptr, v_ptr, eps, num_tokens,
    num_heads, num_kv_heads, head_dim,
    BLOCK_H: tl.constexpr, HALF: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """num_heads: query heads."""
    wait_for_previous(OVERLAPS)
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    i = tl.arange(0, HALF)
    half = head_dim // 2
    in_half = i < half
    num_normed = num_heads + num_kv_heads
    axis = tl.load(axis_ptr + i, mask=in_half, other=0)
    position = tl.load(positions_ptr + axis * num_tokens + token, mask=in_half, other=0)
    cos, sin = cos_sin(position.to(tl.float32) * tl.load(frequency_ptr + i, mask=in_half, other=0.0))
    row_ptr = qkv_ptr + token * (num_normed + num_kv_heads) * head_dim
    first_cells = heads[:, None] * head_dim
    low, high = load_halves(row_ptr, first_cells, heads < num_normed, head_dim, HALF)
    low_weight, high_weight = load_halves(norm_ptr, first_cells, heads < num_normed, head_dim, HALF)
    low, high = turned(low, high, low_weight, high_weight, cos, sin, eps, head_dim)
    cells = first_cells + i[None, :]
    own_q_ptr = q_ptr + token * num_heads * head_dim + cells
    is_q = (heads < num_heads)[:, None] & in_half[None, :]
    tl.store(own_q_ptr, low, mask=is_q)
    tl.store(own_q_ptr + half, high, mask=is_q)
    slot = tl.load(slots_ptr + token)
    if slot >= 0:
        first = slot * num_kv_heads * head_dim
        own_k_ptr = k_ptr + first + cells - num_heads * head_dim
        is_k = ((heads >= num_heads) & (heads < num_normed))[:, None] & in_half[None, :]
        tl.store(own_k_ptr, low, mask=is_k)
        tl.store(own_k_ptr + half, high, mask=is_k)
        own_v_ptr = v_ptr + first + cells - num_normed * head_dim
        is_v = ((heads >= num_normed) & (heads < num_normed + num_kv_heads))[:, None] & in_half[None, :]
        tl.store(own_v_ptr, tl.load(row_ptr + cells, mask=is_v, other=0.0), mask=is_v)
        tl.store(own_v_ptr + half, tl.load(row_ptr + half + cells, mask=is_v, other=0.0), mask=is_v)


def norm_rope_append(
    qkv: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    positions: torch.Tensor,
    rope: Rope,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    num_tokens, num_all_heads, head_dim = qkv.shape
    num_kv_heads = k_cache.shape[1]
    num_heads = num_all_heads - 2 * num_kv_heads
    q = qkv.new_empty(num_tokens, num_heads, head_dim)
    if num_tokens:
        _norm_rope_append_kernel[(num_tokens, triton.cdiv(num_all_heads, HEADS_AT_ONCE))](
            qkv, norm_weight, positions, rope.frequencies, rope.axis, slots, q, k_cache, v_cache, eps, num_tokens,
            num_heads, num_kv_heads, head_dim, BLOCK_H=HEADS_AT_ONCE,
            HALF=triton.next_power_of_2(head_dim // 2), num_warps=1, **overlap_options(qkv),
        )  # fmt: skip
    return q
