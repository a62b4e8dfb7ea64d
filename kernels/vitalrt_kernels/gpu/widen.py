"""int8 as fp32, at the rate of additions.

The instruction that converts does so for 16 numbers a clock and multiprocessor, and an H200's memory brings 18 bytes in
that time. So a byte is laid into the last bits of 2^23, where the last bit is worth one: made unsigned by adding 128
first, four at once; then 2^23 + 128 is taken off again.
"""

import triton
import triton.language as tl

from vitalrt_kernels.gpu.interpreted import INTERPRETED

WIDEN_FOUR = tl.constexpr("""{
    .reg .b32 four, one;
    xor.b32 four, $4, 0x80808080;
    prmt.b32 one, four, 0x4B000000, 0x7650;
    sub.f32 $0, one, 0f4B000080;
    prmt.b32 one, four, 0x4B000000, 0x7651;
    sub.f32 $1, one, 0f4B000080;
    prmt.b32 one, four, 0x4B000000, 0x7652;
    sub.f32 $2, one, 0f4B000080;
    prmt.b32 one, four, 0x4B000000, 0x7653;
    sub.f32 $3, one, 0f4B000080;
}""")


@triton.jit
def as_fp32(weight):
    """weight: int8 or floating point. Exact."""
    if INTERPRETED or weight.dtype != tl.int8:
        return weight.to(tl.float32)
    else:
        return tl.inline_asm_elementwise(WIDEN_FOUR, "=f,=f,=f,=f,r", [weight], dtype=tl.float32, is_pure=True, pack=4)
