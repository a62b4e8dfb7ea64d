"""The KV cache of the loop with gradients: per layer one storage for keys and one for values, appended to in place.

G groups, N samples, H key and value heads, P prefix tokens, T tokens so far, D head dim, d width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache, DynamicLayer

from vitalrt_kernels import rotate
from vitalrt_kernels.cache_grow import cache_grow

KeysAndValues = tuple[torch.Tensor, torch.Tensor]


class PrefixLayer(DynamicLayer):
    """A layer's keys and values of the prefix, [G, H, P, D], as its one call of the decoder computed them."""

    keys: torch.Tensor
    values: torch.Tensor

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> KeysAndValues:
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states


class SampleLayer(DynamicLayer):
    """A layer's keys and values of every sample, [N, H, T, D]: the filled part of two storages.

    update writes the new tokens behind it, in place; what earlier calls read stays as it was, for their backward.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, prefix: PrefixLayer, group_of_sample: torch.Tensor, capacity: int) -> None:
        super().__init__()
        self.storages, (self.keys, self.values) = zip(
            *(_spread(states, group_of_sample, capacity) for states in (prefix.keys, prefix.values)), strict=True
        )
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> KeysAndValues:
        self.keys = cache_grow(self.storages[0], self.keys, key_states)
        self.values = cache_grow(self.storages[1], self.values, value_states)
        return self.keys, self.values


class TrainingCache(Cache):
    """Takes one call of the decoder over the prefix of every group, then `spread`, then any number over all samples."""

    layers: list[Any]  # PrefixLayers, then SampleLayers; transformers' own type has layers without keys, too

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[PrefixLayer() for _ in range(num_layers)])

    def spread(self, group_of_sample: torch.Tensor, num_more: int) -> None:
        """Every sample gets its group's prefix and room for num_more tokens.  group_of_sample: [N] int64."""
        self.layers = [SampleLayer(layer, group_of_sample, layer.keys.shape[2] + num_more) for layer in self.layers]


class SpreadRows(torch.autograd.Function):
    """rows[group_of_sample], written straight into the storage's first tokens; backward sums over a group's samples."""

    @staticmethod
    def forward(ctx: Any, storage: torch.Tensor, rows: torch.Tensor, group_of_sample: torch.Tensor) -> torch.Tensor:
        ctx.num_groups = len(rows)
        ctx.save_for_backward(group_of_sample)
        # .data: growing the cache later must not count as a change of what was read before (see CacheGrow).
        filled = storage.data[:, :, : rows.shape[2]]
        return torch.index_select(rows, 0, group_of_sample, out=filled)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor, None]:
        (group_of_sample,) = ctx.saved_tensors
        return None, grad.new_zeros(ctx.num_groups, *grad.shape[1:]).index_add_(0, group_of_sample, grad), None


def _spread(rows: torch.Tensor, group_of_sample: torch.Tensor, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
    """rows: [G, H, P, D].  Returns a storage [N, H, capacity, D] and its first P tokens, filled."""
    storage = rows.new_empty(len(group_of_sample), rows.shape[1], capacity, rows.shape[3])
    return storage, SpreadRows.apply(storage, rows, group_of_sample)


@contextmanager
def recomputing(layers: nn.ModuleList) -> Iterator[None]:
    """Within, a decoder layer's call keeps only its input [N, T, d] and backward computes the rest again.

    layers: the decoder's, in order, called with a TrainingCache by name. Transformers' own checkpointing runs such a
    layer without any cache. Here each call goes from (input, keys and values so far) to (output, grown keys and
    values) and has no other effect: run again, it starts where it started, whatever the cache has become since, and
    writes the same numbers to the same places. Dropout repeats too.
    """
    for index, layer in enumerate(layers):
        # `forward`, not the module: hooks, which may gather or free weights, stay outside.
        layer.forward = _recomputed(layer.forward, index)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _recomputed(forward: Callable[..., torch.Tensor], index: int) -> Callable[..., torch.Tensor]:
    def call(hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        # past_key_values; `cache` since transformers 5.24.
        name = next(name for name, value in kwargs.items() if isinstance(value, TrainingCache))
        layer = kwargs.pop(name).layers[index]
        # Backward must not hold the layer itself: its keys, once grown, lead back to this call.
        start = copy(layer)

        def pure(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            growing = copy(start)
            out = forward(hidden, **{name: _OneLayer(growing)}, **kwargs)
            return out, growing.keys, growing.values

        out, layer.keys, layer.values = checkpoint(pure, hidden, use_reentrant=False)
        layer.is_initialized = True
        return out

    return call


@contextmanager
def storing_only(layer: Any, cache_layer: DynamicLayer) -> Iterator[None]:
    """Within, a decoder layer's call stores its input's keys and values and returns the input.

    That is all that anybody needs of the last layer where no hidden state is read off, as in a prefix.
    """
    attention = layer.self_attn
    replaced = vars(layer).get("forward")

    def store(hidden: torch.Tensor, position_embeddings: KeysAndValues, **kwargs: Any) -> torch.Tensor:
        normed = layer.input_layernorm(hidden)
        of_heads = (*normed.shape[:-1], -1, attention.head_dim)
        cos, sin = (table.unsqueeze(2) for table in position_embeddings)
        keys = rotate(attention.k_norm(attention.k_proj(normed).view(of_heads)), cos, sin)
        values = attention.v_proj(normed).view(of_heads)
        cache_layer.update(keys.transpose(1, 2), values.transpose(1, 2))
        return hidden

    layer.forward = store
    try:
        yield
    finally:
        del layer.forward
        if replaced is not None:
            layer.forward = replaced


class _OneLayer:
    """What a decoder layer sees of a cache."""

    def __init__(self, layer: DynamicLayer) -> None:
        self.layer = layer

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, **kwargs: Any
    ) -> KeysAndValues:
        return self.layer.update(key_states, value_states)
