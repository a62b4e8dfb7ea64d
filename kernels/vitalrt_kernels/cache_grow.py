"""A KV cache that training can differentiate through: append without copying what is there.

    torch.cat((prefix, new), dim=2)    as values and as gradients, but `prefix` already lies in place

The latent loop appends one token per step and layer, and later steps read all of it, so gradients must flow from every
later read to every earlier append. torch.cat gives that and copies the whole cache each time: O(T^2) traffic and K
copies kept for backward. Here all prefixes are views of one storage: a step writes its own tokens, and backward slices.
N samples, H heads, T tokens, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch

from vitalrt_kernels.backend import expect


def cache_grow_reference(prefix: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    return torch.cat((prefix, new), dim=2)


class CacheGrow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, storage: torch.Tensor, prefix: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        ctx.start = prefix.shape[2]
        stop = ctx.start + new.shape[2]
        # .data has a version counter of its own. What attention kept for backward is a view of tokens before `start`,
        # which this write leaves alone; a shared counter would call it modified.
        storage.data[:, :, ctx.start : stop] = new
        return storage.data[:, :, :stop]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor, torch.Tensor]:
        return None, grad[:, :, : ctx.start], grad[:, :, ctx.start :]


def cache_grow(storage: torch.Tensor, prefix: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """storage: [N, H, T_max, D], no gradient, modified.  new: [N, H, t, D].  Returns storage[:, :, :T + t].

    prefix: [N, H, T, D], the result of the call before, or storage[:, :, :0] to begin. Prefix by prefix the storage is
    append-only: growing an older prefix again would overwrite what newer ones hold, so one storage serves one chain and
    may be reused once its backward is done.
    Raises ValueError on disagreeing shapes, dtypes or devices, a prefix that is not the storage's, or a full storage.
    """
    if storage.ndim != 4 or prefix.ndim != 4 or new.ndim != 4:
        raise ValueError(f"storage, prefix, new: expected 4 axes, got {storage.ndim}, {prefix.ndim}, {new.ndim}")
    (num_samples, num_heads, capacity, head_dim), length = storage.shape, prefix.shape[2]
    expect("storage", storage, storage.shape, new.dtype, new.device)
    is_first = not prefix.numel() or prefix.data_ptr() == storage.data_ptr()
    if prefix.shape != (num_samples, num_heads, length, head_dim) or not is_first:
        raise ValueError(f"prefix: expected the first tokens of the storage {list(storage.shape)}, got {prefix.shape}")
    if new.shape != (num_samples, num_heads, new.shape[2], head_dim):
        raise ValueError(f"new: expected {[num_samples, num_heads, 't', head_dim]}, got {list(new.shape)}")
    if length + new.shape[2] > capacity:
        raise ValueError(f"storage: expected room for {length + new.shape[2]} tokens, got {capacity}")
    return CacheGrow.apply(storage, prefix, new)
