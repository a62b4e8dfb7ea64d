"""The training cache beside concatenation, and what recomputing keeps alive.

G groups, N samples, H heads, T tokens, D head dim, d width.
"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from vitalrt_training.training_cache import TrainingCache, recomputing

GROUPS, HEADS, HEAD_DIM = 3, 2, 4


def states(num_rows, num_tokens):
    return torch.randn(num_rows, HEADS, num_tokens, HEAD_DIM, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("group_of_sample", [[0, 1, 2], [1, 1, 0, 1], [2]], ids=str)
def test_equals_selecting_and_concatenating(group_of_sample):
    """Values and gradients, a group without samples included; every read, not only the last, feeds the loss."""
    torch.manual_seed(0)
    group_of_sample = torch.tensor(group_of_sample)
    prefix = states(GROUPS, 5)
    chunks = [states(len(group_of_sample), num_tokens) for num_tokens in (3, 1, 1, 2)]
    cache = TrainingCache(num_layers=1)
    assert cache.get_mask_sizes(5, 0) == (5, 0)
    keys, values = cache.update(prefix, 2 * prefix, 0)
    assert keys is prefix
    cache.spread(group_of_sample, num_more=7)
    past = prefix[group_of_sample]
    ours, theirs = [values.sum()], [2 * prefix.sum()]
    for number, chunk in enumerate(chunks):
        assert cache.get_seq_length() == past.shape[2]
        assert cache.get_mask_sizes(chunk.shape[2], 0) == (past.shape[2] + chunk.shape[2], 0)
        keys, values = cache.update(chunk, 2 * chunk, 0)
        past = torch.cat((past, chunk), dim=2)
        assert torch.equal(keys, past) and torch.equal(values, 2 * past)
        weight = torch.randn_like(past)
        ours.append((weight * keys.sin() * values**2).sum() * (number + 1))
        theirs.append((weight * past.sin() * (2 * past) ** 2).sum() * (number + 1))
    inputs = [prefix, *chunks]
    expected = torch.autograd.grad(torch.stack(theirs).sum(), inputs)
    for actual, other in zip(torch.autograd.grad(torch.stack(ours).sum(), inputs), expected, strict=True):
        torch.testing.assert_close(actual, other, rtol=1e-12, atol=1e-12)


def test_appends_in_place():
    cache = TrainingCache(num_layers=1)
    cache.update(states(1, 5), states(1, 5), 0)
    cache.spread(torch.tensor([0, 0]), num_more=3)
    first = [tensor.data_ptr() for tensor in (cache.layers[0].keys, cache.layers[0].values)]
    for _ in range(3):
        grown = cache.update(states(2, 1), states(2, 1), 0)
        assert [tensor.data_ptr() for tensor in grown] == first
    with pytest.raises(ValueError, match="room for 9"):
        cache.update(states(2, 1), states(2, 1), 0)


class Attention(nn.Module):
    """As little of a decoder layer as uses a cache: [N, T, HEADS * HEAD_DIM] to the same."""

    def __init__(self, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        self.project = nn.Linear(HEADS * HEAD_DIM, 3 * HEADS * HEAD_DIM, dtype=torch.float64)
        self.num_calls = 0

    def forward(self, hidden, past_key_values):
        self.num_calls += 1
        query, key, value = self.project(hidden).unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        keys, values = past_key_values.update(key, value, self.layer_idx)
        read = nn.functional.scaled_dot_product_attention(query, keys, values)
        return hidden + nn.functional.dropout(read, 0.2).transpose(1, 2).flatten(2)


def think(layers, hidden, num_steps):
    """A prefix for two samples and then a loop over the last output."""
    cache = TrainingCache(len(layers))
    outputs = []
    for step in range(1 + num_steps):
        for layer in layers:
            hidden = layer(hidden, past_key_values=cache)
        if step == 0:
            cache.spread(torch.tensor([0, 0]), num_steps)
            hidden = hidden.expand(2, -1, -1)
        hidden = hidden[:, -1:]
        outputs.append(hidden)
    return torch.cat(outputs, dim=1)


def test_recomputing_changes_no_bit_and_ends():
    torch.manual_seed(0)
    layers = nn.ModuleList([Attention(0), Attention(1)])
    prefix = torch.randn(1, 5, HEADS * HEAD_DIM, dtype=torch.float64)
    torch.manual_seed(1)
    kept = think(layers, prefix, 3)
    expected = torch.autograd.grad(kept.square().sum(), list(layers.parameters()))
    torch.manual_seed(1)
    with recomputing(layers):
        recomputed = think(layers, prefix, 3)
    assert torch.equal(recomputed, kept)
    calls = layers[0].num_calls
    actual = torch.autograd.grad(recomputed.square().sum(), list(layers.parameters()))
    assert layers[0].num_calls == calls + 4, "backward should have computed every call again"
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    with pytest.raises(RuntimeError), recomputing(layers):
        raise RuntimeError
    assert not any("forward" in vars(layer) for layer in layers)


def test_a_loop_without_backward_is_freed():
    """Nothing that backward would recompute from may hold on to the graph that holds it."""
    layers = nn.ModuleList([Attention(0), Attention(1)])
    prefix = torch.randn(1, 5, HEADS * HEAD_DIM, dtype=torch.float64)
    with recomputing(layers):
        hidden = think(layers, prefix, 2)
    held = weakref.ref(prefix)  # by the first call, until backward or the end of the graph
    del prefix
    assert held() is not None
    del hidden
    gc.collect()
    assert held() is None
