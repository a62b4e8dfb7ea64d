"""Triton form of turn_heads: one warp for some heads of a patch."""

import torch
import triton
import triton.language as tl

from vitalrt_kernels.gpu.norm_rope import load_halves
from vitalrt_kernels.gpu.overlap import overlap_options, wait_for_previous

BLOCKS_PER_SM = {"_turn_heads_kernel": 16}
HEADS_AT_ONCE = 8


@triton.jit
def _turn_heads_kernel(
    qkv_ptr, cos_ptr, sin_ptr, y_ptr, num_all_heads, num_heads, head_dim,
    BLOCK_H: tl.constexpr, HALF: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """num_all_heads: of qkv.  num_heads: that are turned."""
    wait_for_previous(OVERLAPS)
    patch = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    i = tl.arange(0, HALF)
    half = head_dim // 2
    inside = (heads < num_heads)[:, None] & (i < half)[None, :]
    first_cells = heads[:, None] * head_dim
    row_ptr = qkv_ptr + patch * num_all_heads * head_dim
    low, high = load_halves(row_ptr, first_cells, heads < num_heads, head_dim, HALF)
    low, high = low.to(tl.float32), high.to(tl.float32)
    places = patch * head_dim + i
    cos_low = tl.load(cos_ptr + places, mask=i < half, other=0.0)[None, :]
    cos_high = tl.load(cos_ptr + half + places, mask=i < half, other=0.0)[None, :]
    sin_low = tl.load(sin_ptr + places, mask=i < half, other=0.0)[None, :]
    sin_high = tl.load(sin_ptr + half + places, mask=i < half, other=0.0)[None, :]
    own_ptr = y_ptr + patch * num_heads * head_dim + first_cells + i[None, :]
    dtype = y_ptr.dtype.element_ty
    tl.store(own_ptr, (low * cos_low - high * sin_low).to(dtype), mask=inside)
    tl.store(own_ptr + half, (high * cos_high + low * sin_high).to(dtype), mask=inside)


def turn_heads(qkv: torch.Tensor, num_heads: int, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    num_patches, num_all_heads, head_dim = qkv.shape
    y = qkv.new_empty(num_patches, num_heads, head_dim)
    if y.numel():
        _turn_heads_kernel[(num_patches, triton.cdiv(num_heads, HEADS_AT_ONCE))](
            qkv, cos, sin, y, num_all_heads, num_heads, head_dim, BLOCK_H=HEADS_AT_ONCE,
            HALF=triton.next_power_of_2(head_dim // 2), num_warps=1, **overlap_options(qkv),
        )  # fmt: skip
    return y
