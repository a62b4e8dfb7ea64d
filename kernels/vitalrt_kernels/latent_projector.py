"""The visual projector of VITAL eq. 5: from a latent state to the feature space of the vision encoder.

    n = LN_d(z);   a = W1 n;   h = drop(gelu(a)) + z;   o = W2 h;   y = LN_v(o)

gelu is the exact one (erf), the residual adds the raw z, neither linear map has a bias (eq. 5 has none; W1, W2 and two
affine norms are the paper's 21.51 M parameters at d 4096, v 1152), dropout 0.1 follows the GELU in training.

The two products stay with cuBLAS. Around them torch runs LN, GELU, dropout, addition, LN, and backward twice as many
passes; fused they are three launches forward (LN; GELU + dropout + residual; LN) and three backward. Kept for backward:
z, a, o and the norms' fp32 statistics. h, n and the dropout mask are recomputed; the mask is a function of seed, row
and column (Philox 4x32-10), the same on every device and in either form. M rows, d width, v feature width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from vitalrt_kernels.backend import can_run_triton, expect, wide


class ProjectorWeights(NamedTuple):
    """norm_in_*: [d].  w1: [d, d].  w2: [v, d].  norm_out_*: [v].  All of one dtype."""

    norm_in_weight: torch.Tensor
    norm_in_bias: torch.Tensor
    w1: torch.Tensor
    w2: torch.Tensor
    norm_out_weight: torch.Tensor
    norm_out_bias: torch.Tensor


def dropout_mask(shape: tuple[int, int], probability: float, seed: int, device: torch.device) -> torch.Tensor:
    """[M, d] bool, False where dropped: by the first word of Philox 4x32-10, counter (column, row, 0, 0), key seed."""
    rows, columns = shape
    c0 = torch.arange(columns, device=device).expand(shape)
    c1 = torch.arange(rows, device=device)[:, None].expand(shape)
    c2 = c3 = torch.zeros_like(c0)
    key0, key1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high2, low2 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high2 ^ c1 ^ key0, low2, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0 >= dropout_threshold(probability)


def dropout_threshold(probability: float) -> int:
    """A uniform 32-bit word below this is a dropped cell."""
    return round(probability * 2**32)


def _multiply(word: torch.Tensor, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a product of 32-bit words held in int64, which the whole product would overflow."""
    high = (word * (factor >> 16) + ((word * (factor & 0xFFFF)) >> 16)) >> 16
    return high, (word * factor) & 0xFFFFFFFF


def latent_projector_reference(
    z: torch.Tensor, weights: ProjectorWeights, eps: float, dropout: float, seed: int
) -> torch.Tensor:
    """Differentiable in z and all weights; everything in fp32 (or fp64) until the result."""
    norm_in_weight, norm_in_bias, w1, w2, norm_out_weight, norm_out_bias = (wide(weight) for weight in weights)
    hidden = F.gelu(F.layer_norm(wide(z), z.shape[-1:], norm_in_weight, norm_in_bias, eps) @ w1.T)
    if dropout:
        hidden = hidden * dropout_mask((len(z), z.shape[1]), dropout, seed, z.device) / (1 - dropout)
    out = (hidden + wide(z)) @ w2.T
    return F.layer_norm(out, out.shape[-1:], norm_out_weight, norm_out_bias, eps).to(z.dtype)


class FusedProjector(torch.autograd.Function):
    """The Triton form with its backward, which runs under the autocast of its forward: the same products in 16 bits."""

    @staticmethod
    def forward(
        ctx: Any, z: torch.Tensor, eps: float, dropout: float, seed: int, *weights: torch.Tensor
    ) -> torch.Tensor:
        from vitalrt_kernels.gpu import latent_projector as gpu

        y, kept = gpu.forward(z, ProjectorWeights(*weights), eps, dropout, seed)
        ctx.save_for_backward(z, *weights, *kept)
        ctx.dropout, ctx.seed = dropout, seed
        kind = z.device.type
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        from vitalrt_kernels.gpu import latent_projector as gpu

        z, *saved = ctx.saved_tensors
        weights, kept = ProjectorWeights(*saved[:6]), gpu.Kept(*saved[6:])
        with torch.autocast(*ctx.autocast):
            grad_z, grads = gpu.backward(grad_y.contiguous(), z, weights, kept, ctx.dropout, ctx.seed)
        return (grad_z, None, None, None, *grads)


def latent_projector(
    z: torch.Tensor, weights: ProjectorWeights, eps: float = 1e-5, dropout: float = 0.0, seed: int = 0
) -> torch.Tensor:
    """z: [M, d].  Returns [M, v].  One dtype, all contiguous; under autocast in fp32, for products in its dtype.

    dropout: probability, 0 outside training.  seed: in [0, 2^63), a new one for each training step.
    Raises ValueError on disagreeing shapes, dtypes or devices, or a dropout outside [0, 1).
    Source: VITAL eq. 5 and appendix on the visual projector.
    """
    if z.ndim != 2 or weights.w2.ndim != 2:
        raise ValueError(f"z, w2: expected [M, d] and [v, d], got {list(z.shape)} and {list(weights.w2.shape)}")
    width, feature_width = z.shape[1], weights.w2.shape[0]
    shapes = ((width,), (width,), (width, width), (feature_width, width), (feature_width,), (feature_width,))
    expect("z", z, z.shape, z.dtype, z.device)
    for name, weight, shape in zip(ProjectorWeights._fields, weights, shapes, strict=True):
        expect(name, weight, shape, z.dtype, z.device)
    if not 0 <= dropout < 1 or not 0 <= seed < 2**63:
        raise ValueError(f"dropout, seed: expected one in [0, 1) and one in [0, 2^63), got {dropout} and {seed}")
    if can_run_triton(z):
        return FusedProjector.apply(z, eps, dropout, seed, *weights)
    return latent_projector_reference(z, weights, eps, dropout, seed)
