"""What norm_rope_append and paged_attention share: RMSNorm and M-RoPE of heads of q or k."""

import triton
import triton.language as tl


@triton.jit
def _cos_sin(angle):
    """angle: fp32, of any size. Both from one reduction, which fp64 keeps exact where positions are large: libdevice's
    own takes a stack for those. Polynomials of Cephes, an ulp or two over a quarter turn."""
    wide = angle.to(tl.float64)
    quarters = tl.floor(wide * 0.6366197723675814 + 0.5)  # 2 / pi
    rest = (wide - quarters * 1.5707963267948966).to(tl.float32)
    square = rest * rest
    sin = rest + rest * square * (-1.6666654611e-1 + square * (8.3321608736e-3 - square * 1.9515295891e-4))
    cos = (
        1.0
        - 0.5 * square
        + square * square * (4.166664568298827e-2 - square * (1.388731625493765e-3 - square * 2.443315711809948e-5))
    )
    quarter = quarters.to(tl.int32) & 3
    is_odd = (quarter & 1) == 1
    turned_cos = tl.where(is_odd, sin, cos)
    turned_sin = tl.where(is_odd, cos, sin)
    turned_cos = tl.where((quarter == 1) | (quarter == 2), -turned_cos, turned_cos)
    return turned_cos, tl.where(quarter >= 2, -turned_sin, turned_sin)


@triton.jit
def _load_normed(x_ptr, norm_ptr, cells, inside, rstd):
    """fp32, rounded as x is: once normalised, and once times its weight."""
    dtype = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + cells, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(norm_ptr + cells, mask=inside, other=0.0).to(tl.float32)
    return ((x * rstd).to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)


@triton.jit
def load_turned(x_ptr, norm_ptr, heads, is_head, position, frequency_ptr, eps, head_dim, BLOCK_D: tl.constexpr):
    """[heads, BLOCK_D], dtype of x: what attention takes; zero outside.

    x: [.., D], norm: [.., D], both with these heads.  position: one, or that of each cell of a head [BLOCK_D].
    A head's halves turn together: each cell is computed from itself and from its partner in the other half.
    """
    i = tl.arange(0, BLOCK_D)
    half = head_dim // 2
    in_head = i < head_dim
    inside = is_head[:, None] & in_head[None, :]
    cells = heads[:, None] * head_dim + i[None, :]
    partners = heads[:, None] * head_dim + tl.where(i < half, i + half, i - half)[None, :]
    x = tl.load(x_ptr + cells, mask=inside, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / head_dim + eps)[:, None]
    own = _load_normed(x_ptr, norm_ptr, cells, inside, rstd)
    partner = _load_normed(x_ptr, norm_ptr, partners, inside, rstd)
    frequency = tl.load(frequency_ptr + tl.where(i < half, i, i - half), mask=in_head, other=0.0)
    cos, sin = _cos_sin(position.to(tl.float32) * frequency)
    turned = own * cos[None, :] + tl.where(i < half, -1.0, 1.0)[None, :] * partner * sin[None, :]
    return turned.to(x_ptr.dtype.element_ty)
