"""The greedy token: argmax of the LM head's logits, which of one row, or a few in int8, are never written to memory.

    token = argmax_n round(sum_i head[n, i] h[i])

Each thread block finds the best of its slice of the vocabulary, and the last block to finish compares the slices: one
launch instead of product, cast and argmax. The logits are rounded to the dtype of h before they are compared: in bf16
two logits are often equal, and the lower id must win exactly where torch.argmax over the logits lets it win.
M rows, N vocabulary, d width.
"""

from __future__ import annotations

import torch

from vitalrt_kernels.backend import expect, runs_triton
from vitalrt_kernels.linear_decode import (
    MAX_ROWS,
    Int8Weight,
    check_rows,
    check_weight,
    is_for_cublas,
    linear_cublas,
    linear_decode_reference,
    tensors_of,
)
from vitalrt_kernels.tickets import check_tickets


def head_argmax_reference(h: torch.Tensor, head: torch.Tensor | Int8Weight) -> torch.Tensor:
    return linear_decode_reference(h, head).argmax(-1)


def head_argmax(
    h: torch.Tensor, head: torch.Tensor | Int8Weight, tickets: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """h: [M, d], after the final norm.  head: [N, d] of its dtype, or int8.  All contiguous.
    Where launches overlap, head is read before the launch before has ended: none in flight may write it.

    tickets: [at least 1], from tickets.new_tickets.  Returns [M] int64, out where it is given: the lowest id of the
    largest logit; a NaN counts as largest. Where linear_decode leaves the product to cuBLAS, the logits are written
    after all.
    Raises ValueError on disagreeing shapes, dtypes or devices.
    """
    check_rows(h)
    check_weight(h, head)
    check_tickets(tickets, 1, h.device)
    tokens = h.new_empty(len(h), dtype=torch.int64) if out is None else out
    expect("out", tokens, (len(h),), torch.int64, h.device)
    if not runs_triton(h, *tensors_of(head)):
        return tokens.copy_(head_argmax_reference(h, head))
    if is_for_cublas(h, head):
        return torch.argmax(linear_cublas(h, head), -1, out=tokens)
    from vitalrt_kernels.gpu import head_argmax as gpu

    for i in range(0, len(h), MAX_ROWS):
        gpu.head_argmax(h[i : i + MAX_ROWS], head, tickets, tokens[i : i + MAX_ROWS])
    return tokens
