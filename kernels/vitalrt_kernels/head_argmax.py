"""The greedy token: argmax of the LM head's logits, which are never written to memory.

    token = argmax_n round(sum_i head[n, i] h[i])

Each thread block finds the best of its slice of the vocabulary, and the last block to finish compares the slices: one
launch instead of product, cast and argmax. The logits are rounded to the dtype of h before they are compared: in bf16
two logits are often equal, and the lower id must win exactly where torch.argmax over the logits lets it win.
M rows, N vocabulary, d width.
"""

from __future__ import annotations

import torch

from vitalrt_kernels.backend import runs_triton
from vitalrt_kernels.linear_decode import Int8Weight, check_rows, check_weight, linear_decode_reference
from vitalrt_kernels.tickets import check_tickets


def head_argmax_reference(h: torch.Tensor, head: torch.Tensor | Int8Weight) -> torch.Tensor:
    return linear_decode_reference(h, head).argmax(-1)


def head_argmax(h: torch.Tensor, head: torch.Tensor | Int8Weight, tickets: torch.Tensor) -> torch.Tensor:
    """h: [M, d], M at most 16, after the final norm.  head: [N, d] of its dtype, or int8.  All contiguous.

    tickets: [at least 1], from tickets.new_tickets.  Returns [M] int64: the lowest id of the largest logit; a NaN
    counts as largest.
    Raises ValueError on disagreeing shapes, dtypes or devices, or more than 16 rows.
    """
    check_rows(h)
    check_weight(h, head)
    check_tickets(tickets, 1, h.device)
    if runs_triton(h, *head) if isinstance(head, Int8Weight) else runs_triton(h, head):
        from vitalrt_kernels.gpu import head_argmax as gpu

        return gpu.head_argmax(h, head, tickets)
    return head_argmax_reference(h, head)
