"""Qwen3-VL's language model, packed: every tensor holds the tokens of all sequences one after the other, unpadded.

T tokens (of all sequences), d width, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F

from vitalrt.config import DecoderConfig
from vitalrt.model.rope import MRope
from vitalrt_kernels import rotate


class Attend(Protocol):
    """What the engine supplies: store this layer's keys and values, and attend with its queries."""

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q: [T, H, D]; k, v: [T, G, D].  Returns [T, H, D]."""
        ...


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, statistics in fp32 (as Qwen3-VL: cast back before the weight)."""

    def __init__(self, shape: int | Sequence[int], eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


class DecoderLayer(nn.Module):
    """One layer with fused projections: qkv is [q | k | v], gate_up is [gate | up], qk_norm covers q and k heads."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.num_qk_heads = self.num_heads + self.num_kv_heads
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.qkv = nn.Linear(config.hidden_size, (self.num_qk_heads + self.num_kv_heads) * self.head_dim, bias=False)
        self.qk_norm = RMSNorm((self.num_qk_heads, self.head_dim), config.rms_norm_eps)
        self.o = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=False)
        self.post_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        attend: Attend,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x: [T, d].  rows: int64, whose hidden states are wanted; None for all.  Returns [T, d] or [len(rows), d]."""
        qkv = self.qkv(self.input_norm(x)).view(len(x), -1, self.head_dim)
        qk, v = qkv.split((self.num_qk_heads, self.num_kv_heads), dim=1)
        q, k = rotate(self.qk_norm(qk), cos, sin).split((self.num_heads, self.num_kv_heads), dim=1)
        attended = attend(self.layer, q, k, v).flatten(1)
        if rows is not None:
            x, attended = x[rows], attended[rows]
        x = x + self.o(attended)
        gate, up = self.gate_up(self.post_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Decoder(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([DecoderLayer(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.head.weight = self.embed.weight
        self.rope = MRope(config)

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        attend: Attend,
        image_rows: torch.Tensor | None = None,
        deepstack: Sequence[torch.Tensor] = (),
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x: [T, d] input embeddings.  positions: [3, T], or [1, T] where the three axes agree.

        image_rows: [V] int64, which of the T rows are visual tokens.  deepstack: features [V, d] added to those rows
        after layer 0, 1, ...  rows: int64, whose hidden states are wanted; None for all.  Returns them before the final
        norm, [T, d] or [len(rows), d].
        """
        cos, sin = self.rope(positions, x.dtype)
        # The last layer need not finish the other rows, unless deepstack still adds to them there.
        is_cut = rows is not None and len(deepstack) < len(self.layers)
        for index, layer in enumerate(self.layers):
            x = layer(x, cos, sin, attend, rows if is_cut and index == len(self.layers) - 1 else None)
            if image_rows is not None and index < len(deepstack):
                x = x.index_add(0, image_rows, deepstack[index].to(x.dtype))
        return x if rows is None or is_cut else x[rows]
