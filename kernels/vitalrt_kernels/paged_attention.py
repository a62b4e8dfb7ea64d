"""Attention of one new token per sequence over the paged cache, addressed by page table and length on the device.

    o_h = softmax(q_h K^T / sqrt(D)) V    over the positions 0 .. length - 1 of the sequence

A decode step reads each key and value once, a few megabytes spread over few heads: to keep all multiprocessors busy the
context is split, and to keep it one launch the last split to finish combines them (see tickets). All heads of a group
share the reads of their key/value head. Lengths and pages live on the device, so one captured graph serves every step.
B sequences, H query heads, G key/value heads, D head dim, S slots, P pages per sequence.
"""

from __future__ import annotations

import torch

from vitalrt_kernels.backend import expect, runs_triton, wide
from vitalrt_kernels.tickets import check_tickets


def paged_attention_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    pages: torch.Tensor,
    lengths: torch.Tensor,
    page_size: int,
) -> torch.Tensor:
    attended = []
    for row, length in enumerate(lengths.tolist()):
        positions = torch.arange(length, device=q.device)
        slots = pages[row, positions // page_size].long() * page_size + positions % page_size
        keys, values = wide(k_cache[slots]), wide(v_cache[slots])
        grouped = wide(q[row]).view(keys.shape[1], -1, q.shape[2])
        scores = torch.einsum("gnd,lgd->gnl", grouped, keys) * q.shape[2] ** -0.5
        attended.append(torch.einsum("gnl,lgd->gnd", scores.softmax(-1), values).reshape(q.shape[1:]))
    return torch.stack(attended).to(q.dtype) if attended else torch.empty_like(q)


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    pages: torch.Tensor,
    lengths: torch.Tensor,
    page_size: int,
    tickets: torch.Tensor,
) -> torch.Tensor:
    """q: [B, H, D].  k_cache, v_cache: [S, G, D], read only.  One dtype, all contiguous.  Returns [B, H, D].

    pages: [B, P] int32, page p of a sequence holds its positions from p * page_size on; those past its length are not
    read.  lengths: [B] int32, the new token's own position included; an idle row of length 0 gives zeros.
    tickets: [at least B * G], from tickets.new_tickets.
    Raises ValueError on disagreeing shapes, dtypes or devices.
    """
    if q.ndim != 3 or k_cache.ndim != 3 or not k_cache.shape[1] or q.shape[1] % k_cache.shape[1] or pages.ndim != 2:
        shapes = f"{list(q.shape)}, {list(k_cache.shape)}, {list(pages.shape)}"
        raise ValueError(f"q, k_cache, pages: expected [B, H, D], [S, G, D], [B, P], G dividing H, got {shapes}")
    (batch, _, head_dim), (num_slots, num_kv_heads, _) = q.shape, k_cache.shape
    expect("q", q, q.shape, q.dtype, q.device)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        expect(name, cache, (num_slots, num_kv_heads, head_dim), q.dtype, q.device)
    expect("pages", pages, (batch, pages.shape[1]), torch.int32, q.device)
    expect("lengths", lengths, (batch,), torch.int32, q.device)
    if page_size < 1:
        raise ValueError(f"page_size: expected at least 1, got {page_size}")
    check_tickets(tickets, batch * num_kv_heads, q.device)
    if runs_triton(q, k_cache, v_cache):
        from vitalrt_kernels.gpu import paged_attention as gpu

        return gpu.paged_attention(q, k_cache, v_cache, pages, lengths, page_size, tickets)
    return paged_attention_reference(q, k_cache, v_cache, pages, lengths, page_size)
