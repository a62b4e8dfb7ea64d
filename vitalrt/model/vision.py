"""Qwen3-VL's vision tower: patches to visual tokens and deepstack features.

P patches, V = P / merge^2 visual tokens, C tower width, d decoder width, H heads, D head dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from vitalrt.config import VisionConfig
from vitalrt.model.rope import Grid, grid_tables
from vitalrt_kernels import turn_heads

EPS = 1e-6


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.fc1 = nn.Linear(width, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, width)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, frame_lengths: Sequence[int]
    ) -> torch.Tensor:
        """x: [P, C]; attention stays within a frame."""
        qkv = self.qkv(self.norm1(x)).view(len(x), 3 * self.num_heads, -1)
        q, k = turn_heads(qkv, 2 * self.num_heads, cos, sin).chunk(2, dim=1)
        x = x + self.proj(_attend_within(q, k, qkv[:, 2 * self.num_heads :], frame_lengths))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))


def _attend_within(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """q, k, v: [P, H, D], frames one after the other.  Returns [P, H * D]. Neighbours of one size go together."""
    runs = [(length, len(list(run))) for length, run in itertools.groupby(lengths)]
    if len(runs) == 1:
        return _attend_each(q, k, v, len(lengths))
    counts = [length * num_frames for length, num_frames in runs]
    pieces = zip(q.split(counts), k.split(counts), v.split(counts), runs, strict=True)
    return torch.cat([_attend_each(*of_run[:3], of_run[3][1]) for of_run in pieces])


def _attend_each(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_frames: int) -> torch.Tensor:
    """The same for frames of one size."""
    q, k, v = (tensor.view(num_frames, -1, *tensor.shape[1:]).transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1)


class PatchMerger(nn.Module):
    """Folds merge x merge neighbours into one visual token of the decoder's width."""

    def __init__(self, config: VisionConfig, *, norm_after_fold: bool) -> None:
        super().__init__()
        self.folded = config.hidden_size * config.spatial_merge_size**2
        self.norm_after_fold = norm_after_fold
        self.norm = nn.LayerNorm(self.folded if norm_after_fold else config.hidden_size, eps=EPS)
        self.fc1 = nn.Linear(self.folded, self.folded)
        self.fc2 = nn.Linear(self.folded, config.out_hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [P, C].  Returns [V, d]."""
        x = self.norm(x.view(-1, self.folded)) if self.norm_after_fold else self.norm(x).view(-1, self.folded)
        return self.fc2(F.gelu(self.fc1(x)))


class VisionTower(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = nn.Linear(config.patch_dim, config.hidden_size)
        self.pos_embed = nn.Embedding(config.num_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList([VisionBlock(config) for _ in range(config.depth)])
        self.merger = PatchMerger(config, norm_after_fold=False)
        self.deepstack_mergers = nn.ModuleList(
            [PatchMerger(config, norm_after_fold=True) for _ in config.deepstack_visual_indexes]
        )

    def forward(self, pixel_values: torch.Tensor, grids: Sequence[Grid]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """pixel_values: [P, patch_dim], images one after the other.

        Returns visual tokens [V, d] and, per deepstack layer, features [V, d] for the decoder's first layers.
        """
        config = self.config
        indices, weights, cos, sin = grid_tables(tuple(grids), config, pixel_values.device)
        x = self.patch_embed(pixel_values.to(self.patch_embed.weight.dtype))
        x = x + (self.pos_embed(indices) * weights[:, :, None]).sum(1).to(x.dtype)
        frame_lengths = [h * w for t, h, w in grids for _ in range(t)]
        deepstack = []  # in the order of the layers, whatever the order of the indexes
        for layer, block in enumerate(self.blocks):
            x = block(x, cos, sin, frame_lengths)
            if layer in config.deepstack_visual_indexes:
                merger = self.deepstack_mergers[config.deepstack_visual_indexes.index(layer)]
                deepstack.append(merger(x))
        return self.merger(x), deepstack
