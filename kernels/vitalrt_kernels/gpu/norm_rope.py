"""What kernels that take or make ready heads of q and k share: halves, RMSNorm and M-RoPE.

A head's halves turn together, so they are kept apart: cell i of one is turned with cell i of the other.
"""

import triton
import triton.language as tl


@triton.jit
def cos_sin(angle):
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
def load_halves(ptr, first, is_head, head_dim, HALF: tl.constexpr):
    """Both halves of heads that begin at `first` [N, 1], each [N, HALF]; zero outside. Where D is odd, the second has
    one cell more. From L2: a block reads them once."""
    i = tl.arange(0, HALF)[None, :]
    half = head_dim // 2
    low = tl.load(ptr + first + i, mask=is_head[:, None] & (i < half), other=0.0, cache_modifier=".cg")
    in_high = is_head[:, None] & (i < head_dim - half)
    high = tl.load(ptr + first + half + i, mask=in_high, other=0.0, cache_modifier=".cg")
    return low, high


@triton.jit
def turned(low, high, low_weight, high_weight, cos, sin, eps, head_dim):
    """Halves of heads, normed and rotated, as they came in: what attention takes.

    All but cos and sin, which are of every cell of a half [HALF], as load_halves gives them.
    """
    wide_low, wide_high = low.to(tl.float32), high.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(wide_low * wide_low + wide_high * wide_high, 1) / head_dim + eps)[:, None]
    normed_low, normed_high = _normed(low, low_weight, rstd), _normed(high, high_weight, rstd)
    cos, sin = cos[None, :], sin[None, :]
    turned_low, turned_high = normed_low * cos - normed_high * sin, normed_high * cos + normed_low * sin
    return turned_low.to(low.dtype), turned_high.to(low.dtype)


@triton.jit
def _normed(x, weight, rstd):
    """fp32, rounded as x is: once normalised, and once times its weight."""
    normed = (x.to(tl.float32) * rstd).to(x.dtype).to(tl.float32)
    return (normed * weight.to(tl.float32)).to(x.dtype).to(tl.float32)
