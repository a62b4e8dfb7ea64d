"""From the fused QKV projection to attention's inputs: q/k RMSNorm, interleaved M-RoPE, and the append to the cache.

    q_h, k_h = rotate(rms_norm(.) * weight_h, position);   k_cache[slot] = k;   v_cache[slot] = v

torch takes about ten launches a layer for a few kilobytes; fused it is one, and k and v go from the projection straight
to their slot. The rotation is computed in fp32 and rounded once, where eager code rounds cos, sin and both products.
T tokens, H query heads, G key/value heads, D head dim, S slots.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vitalrt_kernels.backend import expect, runs_triton, wide
from vitalrt_kernels.kv_append import kv_append
from vitalrt_kernels.rms_norm import rms_norm_reference
from vitalrt_kernels.turn_heads import rotate


class Rope(NamedTuple):
    """frequencies: [D/2] fp32.  axis: [D/2] int64, which of the three position axes turns each frequency."""

    frequencies: torch.Tensor
    axis: torch.Tensor


def turn_reference(
    qk: torch.Tensor, norm_weight: torch.Tensor, eps: float, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """qk: [T, H + G, D].  cos, sin: [T, D/2]."""
    normed = wide(rms_norm_reference(qk, norm_weight, eps))
    cos, sin = (torch.cat((table, table), dim=-1)[:, None].to(normed.dtype) for table in (cos, sin))
    return rotate(normed, cos, sin).to(qk.dtype)


def norm_rope_append_reference(
    qkv: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    positions: torch.Tensor,
    rope: Rope,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    num_kv_heads = k_cache.shape[1]
    num_qk_heads = qkv.shape[1] - num_kv_heads
    qk, v = qkv.split((num_qk_heads, num_kv_heads), dim=1)
    angles = (positions[rope.axis].T.float() * rope.frequencies).to(wide(qk).dtype)  # of fp32 always
    qk = turn_reference(qk, norm_weight, eps, angles.cos(), angles.sin())
    q, k = qk.split((num_qk_heads - num_kv_heads, num_kv_heads), dim=1)
    stored = slots >= 0
    kv_append(k_cache, v_cache, k[stored], v[stored], slots[stored])
    return q.contiguous()


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
    """qkv: [T, H + 2 G, D], heads in the order q, k, v.  norm_weight: [H + G, D].

    k_cache, v_cache: [S, G, D], modified.
    positions: [3, T] int64.  slots: [T] int64, unique; -1 leaves the cache alone (what fills up a bucket of lengths).
    One dtype, all contiguous.  Returns q, normed and rotated: [T, H, D].
    Raises ValueError on disagreeing shapes, dtypes or devices.
    Source: VITAL eq. 1 ("the KV-cache is updated in place"); Qwen3-VL for norm and rotation.
    """
    if qkv.ndim != 3 or k_cache.ndim != 3 or qkv.shape[1] <= 2 * k_cache.shape[1] or qkv.shape[2] % 2:
        raise ValueError(f"qkv, k_cache: expected [T, H + 2 G, D], [S, G, D], got {qkv.shape}, {k_cache.shape}")
    (num_tokens, num_heads, head_dim), (num_slots, num_kv_heads, _) = qkv.shape, k_cache.shape
    dtype, device = qkv.dtype, qkv.device
    expect("qkv", qkv, qkv.shape, dtype, device)
    expect("norm_weight", norm_weight, (num_heads - num_kv_heads, head_dim), dtype, device)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        expect(name, cache, (num_slots, num_kv_heads, head_dim), dtype, device)
    expect("positions", positions, (3, num_tokens), torch.int64, device)
    expect("rope.frequencies", rope.frequencies, (head_dim // 2,), torch.float32, device)
    expect("rope.axis", rope.axis, (head_dim // 2,), torch.int64, device)
    expect("slots", slots, (num_tokens,), torch.int64, device)
    if runs_triton(qkv, norm_weight):
        from vitalrt_kernels.gpu import norm_rope_append as gpu

        return gpu.norm_rope_append(qkv, norm_weight, eps, positions, rope, k_cache, v_cache, slots)
    return norm_rope_append_reference(qkv, norm_weight, eps, positions, rope, k_cache, v_cache, slots)
