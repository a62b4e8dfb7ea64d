"""Triton form of latent_projector: the pointwise stages around two cuBLAS products, forward and backward."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vitalrt_kernels.gpu.row_warps import row_warps
from vitalrt_kernels.latent_projector import ProjectorWeights, dropout_threshold

BLOCKS_PER_SM = {"_layer_norm": 4, "_gelu_residual": 8, "_gelu_residual_backward": 8, "_layer_norm_backward": 1}
MAX_WARPS = 8
MAX_BACKWARD_WARPS = 16  # a row of two fp32 sums per column stays in registers
GELU_BLOCK = 1024
# Rows are shared out over this many blocks, each with its own partial sum of the weight gradients: no atomics, so the
# same result every time.
MAX_BACKWARD_BLOCKS = 128


class Kept(NamedTuple):
    """What backward needs: a [M, d], o [M, v], and mean and 1/deviation of both norms, [M] fp32."""

    a: torch.Tensor
    o: torch.Tensor
    mean_in: torch.Tensor
    rstd_in: torch.Tensor
    mean_out: torch.Tensor
    rstd_out: torch.Tensor


@triton.jit
def _layer_norm(x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(x_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, 0) / width
    centred = tl.where(inside, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    y = centred * rstd * weight + bias
    tl.store(y_ptr + row * width + columns, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _dropout_scale(row, columns, seed, threshold, scale):
    """scale where the cell is kept, 0 where it is dropped: the mask of latent_projector.dropout_mask."""
    zero = columns * 0
    word, _, _, _ = tl.philox(seed, columns, zero + row, zero, zero)
    return tl.where(word.to(tl.int64) >= threshold, scale, 0.0)


@triton.jit(do_not_specialize=["seed", "threshold"])
def _gelu_residual(a_ptr, z_ptr, h_ptr, width, seed, threshold, scale, DROPS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    cells = row.to(tl.int64) * width + columns
    a = tl.load(a_ptr + cells, mask=inside, other=0.0).to(tl.float32)
    h = 0.5 * a * (1.0 + tl.erf(a * 0.7071067811865476))
    if DROPS:
        h *= _dropout_scale(row, columns, seed, threshold, scale)
    h += tl.load(z_ptr + cells, mask=inside, other=0.0).to(tl.float32)
    tl.store(h_ptr + cells, h.to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seed", "threshold"])
def _gelu_residual_backward(
    a_ptr, z_ptr, grad_h_ptr, h_ptr, grad_a_ptr, width, seed, threshold, scale, DROPS: tl.constexpr, BLOCK: tl.constexpr
):
    """Writes h, recomputed for the gradient of W2, and the gradient of a."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    cells = row.to(tl.int64) * width + columns
    a = tl.load(a_ptr + cells, mask=inside, other=0.0).to(tl.float32)
    below = 0.5 * (1.0 + tl.erf(a * 0.7071067811865476))
    h = a * below
    grad_a = below + a * 0.3989422804014327 * tl.exp(-0.5 * a * a)
    if DROPS:
        kept = _dropout_scale(row, columns, seed, threshold, scale)
        h *= kept
        grad_a *= kept
    h += tl.load(z_ptr + cells, mask=inside, other=0.0).to(tl.float32)
    grad_a *= tl.load(grad_h_ptr + cells, mask=inside, other=0.0).to(tl.float32)
    tl.store(h_ptr + cells, h.to(h_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_a_ptr + cells, grad_a.to(grad_a_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _layer_norm_backward(
    x_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, grad_y_ptr, added_ptr, grad_x_ptr, y_ptr, partial_weight_ptr,
    partial_bias_ptr, num_rows, width, BLOCK: tl.constexpr
):  # fmt: skip
    """Gradient of x, plus `added` where given (what reaches x on another way), and where y_ptr is given y again."""
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    sum_weight = tl.zeros([BLOCK], tl.float32)
    sum_bias = tl.zeros([BLOCK], tl.float32)
    row = tl.program_id(0).to(tl.int64)
    while row < num_rows:
        cells = row * width + columns
        x = tl.load(x_ptr + cells, mask=inside, other=0.0).to(tl.float32)
        grad_y = tl.load(grad_y_ptr + cells, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        normed = tl.where(inside, (x - tl.load(mean_ptr + row)) * rstd, 0.0)
        sum_weight += grad_y * normed
        sum_bias += grad_y
        grad_normed = grad_y * weight
        along = tl.sum(grad_normed * normed, 0) / width
        grad_x = (grad_normed - tl.sum(grad_normed, 0) / width - normed * along) * rstd
        if added_ptr is not None:
            grad_x += tl.load(added_ptr + cells, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + cells, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
        if y_ptr is not None:
            bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
            tl.store(y_ptr + cells, (normed * weight + bias).to(y_ptr.dtype.element_ty), mask=inside)
        row += tl.num_programs(0)
    partial = tl.program_id(0).to(tl.int64) * width + columns
    tl.store(partial_weight_ptr + partial, sum_weight, mask=inside)
    tl.store(partial_bias_ptr + partial, sum_bias, mask=inside)


def forward(
    z: torch.Tensor, weights: ProjectorWeights, eps: float, dropout: float, seed: int
) -> tuple[torch.Tensor, Kept]:
    n, mean_in, rstd_in = _normalise(z, weights.norm_in_weight, weights.norm_in_bias, eps, z.dtype)
    a = n @ weights.w1.T
    h = torch.empty_like(z)
    if z.numel():
        _gelu_residual[_cells(z)](a, z, h, *_dropout_arguments(z, dropout, seed), BLOCK=GELU_BLOCK)
    o = h @ weights.w2.T
    y, mean_out, rstd_out = _normalise(o, weights.norm_out_weight, weights.norm_out_bias, eps, z.dtype)
    return y, Kept(a, o, mean_in, rstd_in, mean_out, rstd_out)


def backward(
    grad_y: torch.Tensor, z: torch.Tensor, weights: ProjectorWeights, kept: Kept, dropout: float, seed: int
) -> tuple[torch.Tensor, ProjectorWeights]:
    """Gradients of z and of the weights."""
    grad_o, grad_norm_out_weight, grad_norm_out_bias = _normalise_backward(
        kept.o, weights.norm_out_weight, weights.norm_out_bias, kept.mean_out, kept.rstd_out, grad_y, None, None
    )
    grad_h = grad_o @ weights.w2
    h, grad_a = torch.empty_like(z), torch.empty_like(z)
    if z.numel():
        arguments = _dropout_arguments(z, dropout, seed)
        _gelu_residual_backward[_cells(z)](kept.a, z, grad_h, h, grad_a, *arguments, BLOCK=GELU_BLOCK)
    grad_n = grad_a @ weights.w1
    n = torch.empty_like(z)
    grad_z, grad_norm_in_weight, grad_norm_in_bias = _normalise_backward(
        z, weights.norm_in_weight, weights.norm_in_bias, kept.mean_in, kept.rstd_in, grad_n, grad_h, n
    )
    grads = (grad_norm_in_weight, grad_norm_in_bias, grad_a.T @ n, grad_o.T @ h)
    return grad_z, ProjectorWeights(*grads, grad_norm_out_weight, grad_norm_out_bias)


def _cells(x: torch.Tensor) -> tuple[int, int]:
    return len(x), triton.cdiv(x.shape[1], GELU_BLOCK)


def _dropout_arguments(z: torch.Tensor, dropout: float, seed: int) -> tuple[int, int, int, float, bool]:
    return z.shape[1], seed, dropout_threshold(dropout), 1 / (1 - dropout), dropout > 0


def _normalise(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y of the given dtype: under autocast x is of another than what the caller sees."""
    y = torch.empty_like(x, dtype=dtype)
    mean, rstd = x.new_empty(2, len(x), dtype=torch.float32)
    if len(x):
        block = triton.next_power_of_2(x.shape[1])
        num_warps = row_warps(block, MAX_WARPS)
        _layer_norm[(len(x),)](x, weight, bias, y, mean, rstd, x.shape[1], eps, BLOCK=block, num_warps=num_warps)
    return y, mean, rstd


def _normalise_backward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    grad_y: torch.Tensor,
    added: torch.Tensor | None,
    y: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x (plus `added`), weight and bias; where y is given, it is written again."""
    num_rows, width = x.shape
    num_blocks = max(1, min(num_rows, MAX_BACKWARD_BLOCKS))
    grad_x = torch.empty_like(x)
    block = triton.next_power_of_2(width)
    partial_weight, partial_bias = x.new_empty(2, num_blocks, width, dtype=torch.float32)
    _layer_norm_backward[(num_blocks,)](
        x, weight, bias, mean, rstd, grad_y, added, grad_x, y, partial_weight, partial_bias, num_rows, width,
        BLOCK=block, num_warps=row_warps(block, MAX_BACKWARD_WARPS),
    )  # fmt: skip
    return grad_x, partial_weight.sum(0).to(weight.dtype), partial_bias.sum(0).to(weight.dtype)
