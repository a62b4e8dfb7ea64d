"""Triton form of rms_norm: one thread block per row, the row held in registers."""

import torch
import triton
import triton.language as tl

from vitalrt_kernels.gpu.overlap import overlap_options, share_alike, wait_for_previous
from vitalrt_kernels.gpu.row_warps import row_warps

BLOCKS_PER_SM = {"_rms_norm_kernel": 4}
MAX_WARPS = 8


@triton.jit
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, normed_ptr, total_ptr, width, eps, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr
):  # fmt: skip
    wait_for_previous(OVERLAPS)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    cells = tl.program_id(0).to(tl.int64) * width + columns
    x = tl.load(x_ptr + cells, mask=inside, other=0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + cells, mask=inside, other=0.0).to(tl.float32)
        x = (x.to(tl.float32) + residual).to(x_ptr.dtype.element_ty)  # what is normed is what is handed on: rounded
        tl.store(total_ptr + cells, x, mask=inside)
    x = x.to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    normed = normed.to(x_ptr.dtype.element_ty).to(tl.float32) * weight
    tl.store(normed_ptr + cells, normed.to(x_ptr.dtype.element_ty), mask=inside)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None, out: torch.Tensor | None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    normed = torch.empty_like(x) if out is None else out
    total = None if residual is None else torch.empty_like(x)
    block = triton.next_power_of_2(x.shape[1])
    num_warps = row_warps(block, MAX_WARPS)
    if len(x):
        kernel = _rms_norm_kernel[(len(x),)](
            x, residual, weight, normed, total, x.shape[1], eps, BLOCK=block, num_warps=num_warps, **overlap_options(x)
        )
        share_alike(kernel, x)
    return normed if total is None else (normed, total)
