"""Write new keys and values into the paged KV cache, in place.

The cache is never copied or concatenated: a step of B sequences writes B slots and leaves all others bit-identical.
S slots, H key/value heads, D head dim, T tokens.
"""

from __future__ import annotations

import torch


def kv_append(
    k_cache: torch.Tensor, v_cache: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor
) -> None:
    """k_cache, v_cache: [S, H, D], modified.  k, v: [T, H, D], dtype and device of the cache.

    slots: [T] int64, unique.
    Raises ValueError on disagreeing shapes or dtypes.
    Source: VITAL eq. 1 ("the KV-cache is updated in place").
    """
    if k.shape != v.shape or k_cache.shape != v_cache.shape or k.shape[1:] != k_cache.shape[1:]:
        raise ValueError(f"k, v: expected [T, {', '.join(map(str, k_cache.shape[1:]))}], got {k.shape}, {v.shape}")
    if k.dtype != k_cache.dtype or v.dtype != v_cache.dtype:
        raise ValueError(f"k, v: expected dtype {k_cache.dtype} of the cache, got {k.dtype}, {v.dtype}")
    if slots.dtype != torch.int64 or slots.shape != k.shape[:1]:
        raise ValueError(f"slots: expected int64 [{len(k)}], got {slots.dtype} {list(slots.shape)}")
    k_cache.index_copy_(0, slots, k)
    v_cache.index_copy_(0, slots, v)
