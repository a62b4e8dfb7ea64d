"""Linear maps whose weights are held in 8 bits.

N outputs, d inputs.
"""

from __future__ import annotations

import torch
from torch import nn

from vitalrt.model.decoder import Decoder
from vitalrt_kernels import Int8Weight, linear_decode, quantise_int8


class Int8Linear(nn.Module):
    """A linear map without bias: int8 weights, one fp32 scale per output channel, rows in their own dtype."""

    values: torch.Tensor
    scale: torch.Tensor

    def __init__(self, weight: torch.Tensor) -> None:
        """weight: [N, d], of which nothing is kept."""
        super().__init__()
        values, scale = quantise_int8(weight.detach())
        self.register_buffer("values", values)
        self.register_buffer("scale", scale)

    @property
    def int8(self) -> Int8Weight:
        return Int8Weight(self.values, self.scale)

    @property
    def weight(self) -> torch.Tensor:
        """[N, d] fp32, made anew each time: what the map multiplies by."""
        return self.values.float() * self.scale[:, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [T, d].  Returns [T, N]."""
        return linear_decode(x.contiguous(), self.int8)


def quantise_linear_maps(decoder: Decoder) -> None:
    """Replace all linear maps of a decoder, its head included, one after the other, in place. Embeddings stay."""
    parents = [(layer, name) for layer in decoder.layers for name in ("qkv", "o", "gate_up", "down")]
    for parent, name in [*parents, (decoder, "head")]:
        module = getattr(parent, name)
        assert isinstance(module, nn.Linear)
        setattr(parent, name, Int8Linear(module.weight))
