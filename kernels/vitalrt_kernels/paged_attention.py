"""Attention of one new token per sequence over the paged cache, addressed by page table and length on the device.

    o_h = softmax(q_h K^T / sqrt(D)) V    over the positions 0 .. length - 1 of the sequence

With `append` it begins where the QKV projection ends, as norm_rope_append does, and the new token's key and value are
among those it attends to: a layer of a decode step is then five launches and not six.

A decode step reads each key and value once, a few megabytes spread over few heads: to keep all multiprocessors busy the
context is split, and to keep it one launch the last split to finish combines them (see tickets). All heads of a group
share the reads of their key/value head. Lengths and pages live on the device, so one captured graph serves every step.
B sequences, H query heads, G key/value heads, D head dim, S slots, P pages per sequence.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vitalrt_kernels.backend import expect, runs_triton, wide
from vitalrt_kernels.kv_append import kv_append
from vitalrt_kernels.norm_rope_append import turn_reference
from vitalrt_kernels.tickets import check_tickets

BLOCK_L = 64  # positions that a thread block takes at once
SPLITS = (8, 16, 32)  # of a context; each is a variant of the kernel, and a graph of the step
TARGET_BLOCKS = 264  # two per multiprocessor of an H200


def num_splits(num_pairs: int, longest: int) -> int:
    """Into how many parts contexts of up to `longest` positions are divided.  num_pairs: B * G.

    The first of SPLITS that gives each block of the longest a part of its own, if there is one, but not more than fill
    the card, and a power of two.
    """
    most = max(1, TARGET_BLOCKS // max(1, num_pairs))
    wanted = next((splits for splits in SPLITS if splits * BLOCK_L >= longest), SPLITS[-1])
    return min(wanted, 2 ** (most.bit_length() - 1))


def splits_up_to(num_pairs: int, longest: int) -> list[int]:
    """All that num_splits may say of contexts that grow to `longest`."""
    return sorted({num_splits(num_pairs, min(longest, splits * BLOCK_L)) for splits in SPLITS})


class Append(NamedTuple):
    """norm_weight: [H + G, D].  turns: [B, D] fp32, cosines and then sines, as begin_step gives them."""

    norm_weight: torch.Tensor
    eps: float
    turns: torch.Tensor


def paged_attention_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    pages: torch.Tensor,
    lengths: torch.Tensor,
    page_size: int,
    append: Append | None = None,
) -> torch.Tensor:
    if append is not None:
        newest = (lengths.long() - 1).clamp(min=0)
        page = pages.long().gather(1, newest[:, None] // page_size)[:, 0]
        slots = torch.where(lengths > 0, page * page_size + newest % page_size, -1)
        qk, v = q.split((q.shape[1] - v_cache.shape[1], v_cache.shape[1]), dim=1)
        qk = turn_reference(qk, append.norm_weight, append.eps, *append.turns.chunk(2, dim=1))
        q, k = qk.split((qk.shape[1] - k_cache.shape[1], k_cache.shape[1]), dim=1)
        stored = slots >= 0
        kv_append(k_cache, v_cache, k[stored], v[stored], slots[stored])
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
    append: Append | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """q: [B, H, D].  k_cache, v_cache: [S, G, D], read only without append.  One dtype, all contiguous.

    pages: [B, P] int32, page p of a sequence holds its positions from p * page_size on; what those past its length say
    does not matter.  lengths: [B] int32, the new token's own position included; an idle row of length 0 gives zeros.
    tickets: [at least B * G], from tickets.new_tickets.
    append: q is then [B, H + 2 G, D], heads in the order q, k, v, as projected; q and k are normed and rotated, and the
    caches modified: k and v of each row that is not idle go to the slot of its last position. Where launches overlap,
    all but q is then read before the launch before has ended: none in flight may write it.
    splits: num_splits of the longest context, where it is known without asking the device; else of all pages. Contexts
    longer than was said are computed rightly as well.
    Returns [B, H, D].
    Raises ValueError on disagreeing shapes, dtypes or devices.
    Source: VITAL eq. 1 ("the KV-cache is updated in place").
    """
    is_shaped = q.ndim == 3 and k_cache.ndim == 3 and k_cache.shape[1] > 0 and pages.ndim == 2
    num_heads = q.shape[1] - (2 * k_cache.shape[1] if append else 0) if is_shaped else 0
    if not is_shaped or num_heads < 1 or num_heads % k_cache.shape[1]:
        shapes = f"{list(q.shape)}, {list(k_cache.shape)}, {list(pages.shape)}"
        expected = f"[B, {'H + 2 G' if append else 'H'}, D], [S, G, D], [B, P], G dividing H"
        raise ValueError(f"q, k_cache, pages: expected {expected}, got {shapes}")
    (batch, _, head_dim), (num_slots, num_kv_heads, _) = q.shape, k_cache.shape
    expect("q", q, q.shape, q.dtype, q.device)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        expect(name, cache, (num_slots, num_kv_heads, head_dim), q.dtype, q.device)
    expect("pages", pages, (batch, pages.shape[1]), torch.int32, q.device)
    expect("lengths", lengths, (batch,), torch.int32, q.device)
    for name, value in (("page_size", page_size), ("splits", splits)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if append is not None:
        if head_dim % 2:
            raise ValueError(f"q: expected an even head dim to rotate, got {head_dim}")
        expect("append.norm_weight", append.norm_weight, (num_heads + num_kv_heads, head_dim), q.dtype, q.device)
        expect("append.turns", append.turns, (batch, head_dim), torch.float32, q.device)
    check_tickets(tickets, batch * num_kv_heads, q.device)
    if runs_triton(q, k_cache, v_cache):
        from vitalrt_kernels.gpu import paged_attention as gpu

        splits = splits or num_splits(batch * num_kv_heads, pages.shape[1] * page_size)
        return gpu.paged_attention(q, k_cache, v_cache, pages, lengths, page_size, tickets, append, splits)
    return paged_attention_reference(q, k_cache, v_cache, pages, lengths, page_size, append)
