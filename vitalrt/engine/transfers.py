"""From the host to a device without waiting for what runs there, as a copy from pageable memory would."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def pinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU's as copy_(.., non_blocking=True) takes it; itself where the device is the CPU."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU's, on the device."""
    return pinned(tensor, device).to(device, non_blocking=True)


def rows_of(tensor: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """tensor[rows], which would send its list from pageable memory."""
    return tensor.index_select(0, sent(torch.tensor(rows, dtype=torch.int64), tensor.device))
