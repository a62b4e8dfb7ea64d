"""Which form of an operation serves, and the checks that all of them share.

Every operation has a reference in plain torch, for any device, and a Triton form for CUDA. The public function of its
file chooses by a visible `if`; Triton itself is imported behind that `if` only (see vitalrt_kernels.gpu).
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence

import torch

OLDEST_CAPABILITY = (8, 0)  # Ampere: bfloat16 arithmetic
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def why_not_triton(device: torch.device) -> str | None:
    """None if Triton kernels run on this device, else what keeps the torch forms in use there, for people to read."""
    if device.type != "cuda":
        return f"{device.type} tensors take the torch form"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        return f"compute capability {capability} is older than {OLDEST_CAPABILITY}"
    return None


def runs_triton(*tensors: torch.Tensor) -> bool:
    """Whether the Triton form may serve these arguments: their device has it and their dtypes are its own.

    Operations that are not trained have no backward in Triton; where a gradient is wanted the reference serves.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    return can_run_triton(*tensors)


def can_run_triton(*tensors: torch.Tensor) -> bool:
    """As runs_triton, for operations whose Triton form has a backward."""
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    return why_not_triton(tensors[0].device) is None and all(tensor.dtype in TRITON_DTYPES for tensor in floats)


def expect(name: str, tensor: torch.Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    """Raises ValueError unless the tensor is contiguous and has this shape, dtype and device."""
    is_right = (*tensor.shape,) == (*shape,) and tensor.dtype == dtype and tensor.device == device
    if not is_right or not tensor.is_contiguous():
        came = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        came += "" if tensor.is_contiguous() else ", not contiguous"
        raise ValueError(f"{name}: expected contiguous {dtype} {list(shape)} on {device}, got {came}")


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """In the dtype that references compute in: fp32, or fp64 where fp64 came (tests)."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
