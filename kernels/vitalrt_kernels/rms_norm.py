"""RMSNorm of rows, with the residual addition that precedes it.

    s = x + residual;   y = cast(s / sqrt(mean(s^2) + eps)) * weight

As Qwen3-VL: normalised in fp32, cast to the dtype of x, and only then multiplied by the weight. torch takes a handful
of passes over the row; fused it is one read of x and residual and one write of s and y, in one launch.
N rows, d width.
"""

from __future__ import annotations

import torch

from vitalrt_kernels.backend import expect, runs_triton, wide


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    normed = wide(x) * torch.rsqrt(wide(x).square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """x, residual: [N, d].  weight: [d].  out: [N, d], where the normed rows go.  One dtype, all contiguous.

    Returns the normed rows [N, d]; with a residual (normed rows of x + residual, x + residual).
    Raises ValueError on disagreeing shapes, dtypes or devices.
    """
    if x.ndim != 2:
        raise ValueError(f"x: expected [N, d], got {list(x.shape)}")
    expect("x", x, x.shape, x.dtype, x.device)
    expect("weight", weight, x.shape[1:], x.dtype, x.device)
    if residual is not None:
        expect("residual", residual, x.shape, x.dtype, x.device)
    if out is not None:
        expect("out", out, x.shape, x.dtype, x.device)
    if runs_triton(x, weight) and (residual is None or runs_triton(residual)):
        from vitalrt_kernels.gpu import rms_norm as gpu

        return gpu.rms_norm(x, weight, eps, residual, out)
    total = x if residual is None else x + residual
    normed = rms_norm_reference(total, weight, eps)
    if out is not None:
        normed = out.copy_(normed)
    return normed if residual is None else (normed, total)
