"""Attention of one token over its slots, against float64 arithmetic one head at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitalrt_kernels import decode_attention

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
SIZES = {"groups": st.integers(1, 4), "kv_heads": st.integers(1, 3), "dim": st.sampled_from([2, 8, 13, 32])}


def attend_slowly(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: list[int]) -> torch.Tensor:
    """q: [H, D].  Returns [H, D] float64; query head h reads key/value head h // (H / G)."""
    group = len(q) // k_cache.shape[1]
    rows = []
    for head, query in enumerate(q.double()):
        keys, values = (cache[slots, head // group].double() for cache in (k_cache, v_cache))
        rows.append((keys @ query / query.shape[0] ** 0.5).softmax(0) @ values)
    return torch.stack(rows)


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 19), min_size=1, max_size=5), seed=st.integers(0, 999), **SIZES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_sequences_of_different_lengths(dtype, lengths, seed, groups, kv_heads, dim) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_slots = sum(lengths) + 3
    k_cache, v_cache = torch.randn(2, num_slots, kv_heads, dim, generator=generator).to(dtype)
    q = torch.randn(len(lengths), groups * kv_heads, dim, generator=generator).to(dtype)
    owned = [slots.tolist() for slots in torch.randperm(num_slots, generator=generator).split([*lengths, 3])[:-1]]
    context = torch.tensor([slots + slots[:1] * (max(lengths) - len(slots)) for slots in owned])
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    got = decode_attention(q, k_cache, v_cache, context, mask[:, None, None])
    assert got.dtype == dtype
    for row, slots in enumerate(owned):
        expected = attend_slowly(q[row], k_cache, v_cache, slots)
        torch.testing.assert_close(got[row].double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@settings(max_examples=40, deadline=None)
@given(start=st.integers(0, 9), length=st.integers(1, 19), seed=st.integers(0, 999), **SIZES)
def test_a_slice_reads_what_its_slots_would(start, length, seed, groups, kv_heads, dim) -> None:
    generator = torch.Generator().manual_seed(seed)
    k_cache, v_cache = torch.randn(2, 40, kv_heads, dim, generator=generator)
    outside = [slot for slot in range(40) if not start <= slot < start + length]
    k_cache[outside] = v_cache[outside] = float("nan")
    q = torch.randn(1, groups * kv_heads, dim, generator=generator)
    sliced = decode_attention(q, k_cache, v_cache, slice(start, start + length), None)
    gathered = decode_attention(q, k_cache, v_cache, torch.arange(start, start + length)[None], None)
    torch.testing.assert_close(sliced, gathered, atol=1e-6, rtol=1e-6)
    expected = attend_slowly(q[0], k_cache, v_cache, list(range(start, start + length)))
    torch.testing.assert_close(sliced[0].double(), expected, atol=1e-5, rtol=1e-5)
