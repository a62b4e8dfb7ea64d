"""SwiGLU of rows that a projection to [gate | up] has left: y = silu(gate) * up.

linear_decode does the same to its own sums, at no cost; this is for rows that cuBLAS has multiplied. torch takes two
passes, the second over halves that do not lie together; fused it is one, rounded once.
N rows, I columns of each half.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from vitalrt_kernels.backend import expect, runs_triton, wide


def swiglu_reference(x: torch.Tensor) -> torch.Tensor:
    gate, up = wide(x).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """x: [N, 2 I], contiguous.  Returns [N, I].  Raises ValueError on another shape."""
    if x.ndim != 2 or x.shape[1] % 2:
        raise ValueError(f"x: expected [N, 2 I], got {list(x.shape)}")
    expect("x", x, x.shape, x.dtype, x.device)
    if runs_triton(x):
        from vitalrt_kernels.gpu import swiglu as gpu

        return gpu.swiglu(x)
    return swiglu_reference(x)
