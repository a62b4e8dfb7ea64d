"""Operations of the latent loop, one file each: the mathematics, a plain torch reference, checks, choice of form.

Triton forms live under the same names in vitalrt_kernels.gpu and are imported only where tensors are on a CUDA device,
so a machine without triton imports and runs everything. docs/numerics.md has a heading for each operation.
"""

from vitalrt_kernels.backend import why_not_triton
from vitalrt_kernels.begin_step import Rows, StepInputs, begin_step
from vitalrt_kernels.cache_grow import cache_grow
from vitalrt_kernels.decode_attention import decode_attention
from vitalrt_kernels.head_argmax import head_argmax
from vitalrt_kernels.kv_append import kv_append
from vitalrt_kernels.latent_projector import ProjectorWeights, latent_projector
from vitalrt_kernels.linear_decode import Int8Weight, Norm, linear_decode, quantise_int8
from vitalrt_kernels.norm_rope_append import Rope, norm_rope_append
from vitalrt_kernels.paged_attention import Append, num_splits, paged_attention, splits_up_to
from vitalrt_kernels.rms_norm import rms_norm
from vitalrt_kernels.swiglu import swiglu
from vitalrt_kernels.tickets import new_tickets
from vitalrt_kernels.turn_heads import rotate, turn_heads

__all__ = [
    "Append",
    "Int8Weight",
    "Norm",
    "ProjectorWeights",
    "Rope",
    "Rows",
    "StepInputs",
    "begin_step",
    "cache_grow",
    "decode_attention",
    "head_argmax",
    "kv_append",
    "latent_projector",
    "linear_decode",
    "new_tickets",
    "norm_rope_append",
    "num_splits",
    "paged_attention",
    "quantise_int8",
    "rms_norm",
    "rotate",
    "splits_up_to",
    "swiglu",
    "turn_heads",
    "why_not_triton",
]
