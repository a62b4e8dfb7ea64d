"""Rotation of the vision tower's q and k, out of its fused projection.

    (l, h) -> (l cos - h sin, h cos + l sin)    for the halves l and h of each head

torch widens, turns in three passes and narrows; fused it is one read and one write. Either way it is rounded once.
P patches, H heads of q and k together, D head dim.
"""

from __future__ import annotations

import torch

from vitalrt_kernels.backend import expect, runs_triton, wide


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x: [T, H, D]; cos, sin: [T, 1, D]. Turns the pairs (x_i, x_{i + D/2})."""
    half = x.shape[-1] // 2
    turned = x * cos
    turned[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return turned


def turn_heads_reference(qkv: torch.Tensor, num_heads: int, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    x = wide(qkv[:, :num_heads])
    return rotate(x, cos.to(x.dtype), sin.to(x.dtype)).to(qkv.dtype)


def turn_heads(qkv: torch.Tensor, num_heads: int, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """qkv: [P, at least H, D], of which the first num_heads are turned.  cos, sin: [P, 1, D] fp32.  All contiguous.

    Returns [P, H, D].  Raises ValueError on disagreeing shapes, dtypes or devices.
    """
    if qkv.ndim != 3 or qkv.shape[1] < num_heads or qkv.shape[2] % 2:
        raise ValueError(f"qkv: expected [P, at least {num_heads}, D], D even, got {list(qkv.shape)}")
    expect("qkv", qkv, qkv.shape, qkv.dtype, qkv.device)
    for name, table in (("cos", cos), ("sin", sin)):
        expect(name, table, (len(qkv), 1, qkv.shape[2]), torch.float32, qkv.device)
    if runs_triton(qkv):
        from vitalrt_kernels.gpu import turn_heads as gpu

        return gpu.turn_heads(qkv, num_heads, cos, sin)
    return turn_heads_reference(qkv, num_heads, cos, sin)
