"""Operations of the latent loop: a plain torch reference of each, one file per operation."""

from vitalrt_kernels.decode_attention import decode_attention
from vitalrt_kernels.kv_append import kv_append

__all__ = ["decode_attention", "kv_append"]
