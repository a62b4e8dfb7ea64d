"""From the host to a device without waiting for what runs there, as a copy from pageable memory would."""

from __future__ import annotations

from collections.abc import Sequence

import torch

MAX_PINNED_BYTES = 32 * 2**20  # torch keeps pinned memory for the next copy: what is larger is not worth that


def is_pinned_for(num_bytes: int, device: torch.device) -> bool:
    """Whether as much is worth page-locked memory on its way to this device."""
    return device.type == "cuda" and num_bytes <= MAX_PINNED_BYTES


def pinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """As copy_(.., non_blocking=True) to this device takes it; the tensor itself where that gains nothing."""
    is_of_the_host = tensor.device.type == "cpu"
    return tensor.pin_memory() if is_of_the_host and is_pinned_for(tensor.nbytes, device) else tensor


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device; itself where it lies there."""
    return pinned(tensor, device).to(device, non_blocking=True)


def rows_of(tensor: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """tensor[rows], which would send its list from pageable memory."""
    return tensor.index_select(0, sent(torch.tensor(rows, dtype=torch.int64), tensor.device))
