"""Triton form of norm_rope_append: one warp per few heads of a token, both halves of each head in registers."""

import torch
import triton
import triton.language as tl

from vitalrt_kernels.norm_rope_append import Rope

BLOCKS_PER_SM = {"_norm_rope_append_kernel": 16}
HEADS_AT_ONCE = 4


@triton.jit
def _cos_sin(angle):
    """angle: fp32, of any size. Both from one reduction, which fp64 keeps exact where positions are large: libdevice's
    own takes a stack for those. Polynomials of Cephes, an ulp or two over a quarter turn."""
    wide = angle.to(tl.float64)
    quarters = tl.floor(wide * 0.6366197723675814 + 0.5)  # 2 / pi
    rest = (wide - quarters * 1.5707963267948966).to(tl.float32)
    square = rest * rest
    sin = rest + rest * square * (-1.6666654611e-1 + square * (8.3321608736e-3 - square * 1.9515295891e-4))
    cos = (
        1.0
        - 0.5 * square
        + square * square * (4.166664568298827e-2 - square * (1.388731625493765e-3 - square * 2.443315711809948e-5))
    )
    quarter = quarters.to(tl.int32) & 3
    is_odd = (quarter & 1) == 1
    turned_cos = tl.where(is_odd, sin, cos)
    turned_sin = tl.where(is_odd, cos, sin)
    turned_cos = tl.where((quarter == 1) | (quarter == 2), -turned_cos, turned_cos)
    return turned_cos, tl.where(quarter >= 2, -turned_sin, turned_sin)


@triton.jit
def _norm_rope_append_kernel(
    qkv_ptr, norm_ptr, positions_ptr, frequency_ptr, axis_ptr, slots_ptr, q_ptr, k_ptr, v_ptr, eps, num_tokens,
    num_heads, num_kv_heads, half,
    THREE_AXES: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """num_heads: query heads.  half: D / 2; BLOCK_HALF is its next power of two."""
    dtype = qkv_ptr.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    i = tl.arange(0, BLOCK_HALF)
    num_normed = num_heads + num_kv_heads
    in_half = i < half
    inside = (heads < num_normed + num_kv_heads)[:, None] & in_half[None, :]
    head_cells = heads[:, None] * (2 * half) + i[None, :]
    cells = token * (num_normed + num_kv_heads) * (2 * half) + head_cells
    low_raw = tl.load(qkv_ptr + cells, mask=inside, other=0.0)
    high_raw = tl.load(qkv_ptr + cells + half, mask=inside, other=0.0)

    low, high = low_raw.to(tl.float32), high_raw.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(low * low + high * high, 1) / (2 * half) + eps)[:, None]
    has_norm = inside & (heads < num_normed)[:, None]
    low_weight = tl.load(norm_ptr + head_cells, mask=has_norm, other=0.0).to(tl.float32)
    high_weight = tl.load(norm_ptr + head_cells + half, mask=has_norm, other=0.0).to(tl.float32)
    low = ((low * rstd).to(dtype).to(tl.float32) * low_weight).to(dtype).to(tl.float32)
    high = ((high * rstd).to(dtype).to(tl.float32) * high_weight).to(dtype).to(tl.float32)

    if THREE_AXES:
        axis = tl.load(axis_ptr + i, mask=in_half, other=0)
        position = tl.load(positions_ptr + axis * num_tokens + token, mask=in_half, other=0)
    else:
        position = tl.load(positions_ptr + token)
    angle = position.to(tl.float32) * tl.load(frequency_ptr + i, mask=in_half, other=0.0)
    cos, sin = _cos_sin(angle)
    cos, sin = cos[None, :], sin[None, :]
    low_turned = (low * cos - high * sin).to(dtype)
    high_turned = (high * cos + low * sin).to(dtype)

    is_q = inside & (heads < num_heads)[:, None]
    q_cells = token * num_heads * (2 * half) + head_cells
    tl.store(q_ptr + q_cells, low_turned, mask=is_q)
    tl.store(q_ptr + q_cells + half, high_turned, mask=is_q)
    slot = tl.load(slots_ptr + token)
    if slot >= 0:
        is_k = inside & ((heads >= num_heads) & (heads < num_normed))[:, None]
        k_cells = (slot * num_kv_heads - num_heads) * (2 * half) + head_cells
        tl.store(k_ptr + k_cells, low_turned, mask=is_k)
        tl.store(k_ptr + k_cells + half, high_turned, mask=is_k)
        is_v = inside & (heads >= num_normed)[:, None]
        v_cells = (slot * num_kv_heads - num_normed) * (2 * half) + head_cells
        tl.store(v_ptr + v_cells, low_raw, mask=is_v)
        tl.store(v_ptr + v_cells + half, high_raw, mask=is_v)


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
            num_heads, num_kv_heads, head_dim // 2, THREE_AXES=positions.ndim == 2, BLOCK_H=HEADS_AT_ONCE,
            BLOCK_HALF=triton.next_power_of_2(head_dim // 2), num_warps=1,
        )  # fmt: skip
    return q
