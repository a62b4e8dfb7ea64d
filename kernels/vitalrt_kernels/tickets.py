"""Tickets: how the last thread block of a launch knows that it is the last and may combine what the others left.

Every block draws a number when its part is written; who draws the last number does the rest and sets the counter back
to zero. One launch then does what would take two, and a captured graph can be replayed without clearing anything.
"""

from __future__ import annotations

import torch


def new_tickets(num_tickets: int, device: torch.device | str) -> torch.Tensor:
    """[num_tickets] int32 zeros, to be kept and handed to every launch. Launches that share them must not overlap."""
    return torch.zeros(num_tickets, dtype=torch.int32, device=device)


def check_tickets(tickets: torch.Tensor, num_needed: int, device: torch.device) -> None:
    is_right = tickets.dtype == torch.int32 and tickets.ndim == 1 and len(tickets) >= num_needed
    if not is_right or tickets.device != device or not tickets.is_contiguous():
        came = f"{tickets.dtype} {list(tickets.shape)} on {tickets.device}"
        raise ValueError(f"tickets: expected int32, at least [{num_needed}], on {device}, got {came}")
