"""Whether Triton's interpreter runs the kernels, which knows no assembly."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
