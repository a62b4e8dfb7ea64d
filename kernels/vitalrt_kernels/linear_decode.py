"""A linear map of the rows of a decode step, with what stands before and after it in the layer.

    QKV:      W rms_norm(x)                   O, down:  W x + residual
    gate/up:  silu(g) * u,  [g | u] = W rms_norm(x)

At these row counts the time is that of reading W once, so the rest must ride along: the norm is computed again by every
thread block (a row is 8 kB and sits in L2), which costs less than a launch and a round trip of x, and is divided by at
the end, so that it delays no weight (several rows in fp16, which may not hold what is not divided yet, are normed by a
launch of their own); SwiGLU and the residual are applied to the fp32 sums before their only rounding. Five launches
make a layer instead of two dozen.
That is so for one row, and for up to 16 where a card is known to be faster so (`tuned`). For others, and for a single
one where `tuned` says so, cuBLAS multiplies between launches of their own. int8 goes 16 rows at a time up to 64, and
then as numbers of the rows' dtype to cuBLAS as well.

Weights may be int8 with one fp32 scale per output channel (symmetric, weight-only): half the bytes, and since every
int8 is exact in fp16 and bf16 the only new error is that of quantise_int8.
M rows, N outputs, d inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

from vitalrt_kernels.backend import expect, runs_triton, wide
from vitalrt_kernels.rms_norm import rms_norm, rms_norm_reference
from vitalrt_kernels.swiglu import swiglu as swiglu_of_rows
from vitalrt_kernels.swiglu import swiglu_reference
from vitalrt_kernels.tuned import prefers_cublas, tuned_tile

MAX_ROWS = 16  # of one launch
MAX_INT8_ROWS = 64  # four readings at a byte a weight; widening one for cuBLAS moves five


class Int8Weight(NamedTuple):
    """values: [N, d] int8 in -127..127.  scale: [N] fp32.  The weight is values * scale[:, None]."""

    values: torch.Tensor
    scale: torch.Tensor


class Norm(NamedTuple):
    """weight: [d], dtype of the rows."""

    weight: torch.Tensor
    eps: float


def quantise_int8(weight: torch.Tensor) -> Int8Weight:
    """weight: [N, d].  Nearest of 255 steps; the largest entry of an output channel becomes 127 or -127."""
    scale = weight.float().abs().amax(1) / 127
    # A channel of zeros has scale 0; dividing by 1 instead leaves its zeros as they are.
    values = (weight.float() / torch.where(scale > 0, scale, 1)[:, None]).round()
    return Int8Weight(values.to(torch.int8), scale)


def linear_decode_reference(
    x: torch.Tensor,
    weight: torch.Tensor | Int8Weight,
    norm: Norm | None = None,
    residual: torch.Tensor | None = None,
    swiglu: bool = False,
) -> torch.Tensor:
    rows = wide(x if norm is None else rms_norm_reference(x, norm.weight, norm.eps))
    if isinstance(weight, Int8Weight):
        y = rows @ weight.values.to(rows.dtype).T * weight.scale
    else:
        y = rows @ weight.to(rows.dtype).T
    if swiglu:
        y = swiglu_reference(y)
    if residual is not None:
        y = y + wide(residual)
    return y.to(x.dtype)


def linear_cublas(
    x: torch.Tensor,
    weight: torch.Tensor | Int8Weight,
    norm: Norm | None = None,
    residual: torch.Tensor | None = None,
    swiglu: bool = False,
) -> torch.Tensor:
    """As linear_decode: torch's product, each other part a launch of its own, all rounded."""
    rows = x if norm is None else rms_norm(x, norm.weight, norm.eps)
    assert isinstance(rows, torch.Tensor)
    if isinstance(weight, Int8Weight):
        y = _int8_product(rows, weight)
    elif residual is not None and not swiglu:
        return torch.addmm(residual, rows, weight.T)
    else:
        y = F.linear(rows, weight)
    if swiglu:
        y = swiglu_of_rows(y)
    return y if residual is None else y + residual


def _int8_product(rows: torch.Tensor, weight: Int8Weight) -> torch.Tensor:
    if rows.dtype == torch.float16:  # sums that are not scaled yet may be larger than it holds
        return F.linear(rows, (weight.values * weight.scale[:, None]).to(rows.dtype))
    return (F.linear(rows, weight.values.to(rows.dtype)).float() * weight.scale).to(rows.dtype)


def linear_decode(
    x: torch.Tensor,
    weight: torch.Tensor | Int8Weight,
    norm: Norm | None = None,
    residual: torch.Tensor | None = None,
    swiglu: bool = False,
) -> torch.Tensor:
    """x: [M, d].  weight: [N, d] of its dtype, or int8.  residual: as the result.  All contiguous.

    norm: RMSNorm of x first (as rms_norm).  swiglu: weight is [gate | up] and the result has N / 2 columns.
    Where launches overlap, weight is read before the launch before has ended: none in flight may write it.
    Returns [M, N].
    Raises ValueError on disagreeing shapes, dtypes or devices.
    """
    check_rows(x)
    check_weight(x, weight)
    num_outputs = (weight.values if isinstance(weight, Int8Weight) else weight).shape[0]
    if swiglu and num_outputs % 2:
        raise ValueError(f"weight: expected [gate | up], an even number of outputs, got {num_outputs}")
    if norm is not None:
        expect("norm.weight", norm.weight, x.shape[1:], x.dtype, x.device)
    if residual is not None:
        expect("residual", residual, (len(x), num_outputs // (2 if swiglu else 1)), x.dtype, x.device)
    parts = (*tensors_of(weight), norm and norm.weight, residual)
    if not runs_triton(x, *[part for part in parts if part is not None]):
        return linear_decode_reference(x, weight, norm, residual, swiglu)
    if is_for_cublas(x, weight):
        return linear_cublas(x, weight, norm, residual, swiglu)
    from vitalrt_kernels.gpu import linear_decode as gpu

    pieces = [
        gpu.linear_decode(
            x[i : i + MAX_ROWS], weight, norm, None if residual is None else residual[i : i + MAX_ROWS], swiglu
        )
        for i in range(0, max(1, len(x)), MAX_ROWS)
    ]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def is_for_cublas(x: torch.Tensor, weight: torch.Tensor | Int8Weight) -> bool:
    """On a CUDA device."""
    if isinstance(weight, Int8Weight):
        return len(x) > MAX_INT8_ROWS
    if len(x) == 1:
        return prefers_cublas(1, weight)
    return len(x) > MAX_ROWS or tuned_tile(len(x), weight) is None


def check_rows(x: torch.Tensor) -> None:
    if x.ndim != 2:
        raise ValueError(f"x: expected [M, d], got {list(x.shape)}")
    expect("x", x, x.shape, x.dtype, x.device)


def check_weight(x: torch.Tensor, weight: torch.Tensor | Int8Weight) -> None:
    values, dtype = (weight.values, torch.int8) if isinstance(weight, Int8Weight) else (weight, x.dtype)
    if values.ndim != 2:
        raise ValueError(f"weight: expected [N, {x.shape[1]}], got {list(values.shape)}")
    expect("weight", values, (len(values), x.shape[1]), dtype, x.device)
    if isinstance(weight, Int8Weight):
        expect("weight.scale", weight.scale, (len(values),), torch.float32, x.device)


def tensors_of(weight: torch.Tensor | Int8Weight) -> tuple[torch.Tensor, ...]:
    return (*weight,) if isinstance(weight, Int8Weight) else (weight,)
