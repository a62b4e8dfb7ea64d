"""Attention of one new token per sequence over its part of the paged KV cache (grouped query heads).

B sequences, H query heads, G key/value heads, D head dim, S slots, L longest context.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    context_slots: torch.Tensor | slice,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """q: [B, H, D].  k_cache, v_cache: [S, G, D], read only.  Returns [B, H, D].

    context_slots: [B, L] int64, the slots of each sequence's context, the new token's own included, padded with any
    slot of finite numbers; for B = 1 also a slice, which reads the cache without copying.
    mask: [B, 1, 1, L] bool, False where padded; None if nothing is padded.
    """
    keys, values = k_cache[context_slots], v_cache[context_slots]
    if isinstance(context_slots, slice):
        keys, values = keys[None], values[None]
    attended = scaled_dot_product_attention(
        q[:, :, None], keys.transpose(1, 2), values.transpose(1, 2), attn_mask=mask, enable_gqa=True
    )
    return attended[:, :, 0]
