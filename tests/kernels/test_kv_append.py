"""Appending to the cache: what is written, what is not, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitalrt_kernels import kv_append


@settings(max_examples=60, deadline=None)
@given(data=st.data(), heads=st.integers(1, 3), dim=st.integers(1, 9), num_slots=st.integers(1, 37))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_writes_its_slots_and_no_other(dtype, data, heads, dim, num_slots) -> None:
    slots = data.draw(st.lists(st.integers(0, num_slots - 1), unique=True))
    caches = [torch.full((num_slots, heads, dim), float("nan"), dtype=dtype) for _ in "kv"]
    pointers = [cache.data_ptr() for cache in caches]
    k, v = torch.randn(2, len(slots), heads, dim).to(dtype)
    kv_append(*caches, k, v, torch.tensor(slots, dtype=torch.int64))
    untouched = sorted(set(range(num_slots)) - set(slots))
    for cache, pointer, new in zip(caches, pointers, (k, v), strict=True):
        assert cache.data_ptr() == pointer
        assert torch.equal(cache[slots], new)
        assert bool(cache[untouched].isnan().all())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": torch.zeros(2, 3, 5)}, "k, v: expected"),
        ({"v": torch.zeros(3, 3, 4)}, "k, v: expected"),
        ({"v_cache": torch.zeros(7, 3, 4)}, "k, v: expected"),
        ({"k": torch.zeros(2, 3, 4, dtype=torch.float16)}, "k, v: expected dtype torch.float32 of the cache"),
        ({"slots": torch.tensor([1, 2], dtype=torch.int32)}, "slots: expected int64"),
        ({"slots": torch.tensor([1, 2, 3])}, "slots: expected int64"),
    ],
)
def test_refuses_what_does_not_fit(changes, message) -> None:
    cache = torch.zeros(8, 3, 4)
    arguments = {"k_cache": cache, "v_cache": cache.clone(), "slots": torch.tensor([1, 2])}
    arguments |= {"k": torch.ones(2, 3, 4), "v": torch.ones(2, 3, 4)} | changes
    with pytest.raises(ValueError, match=message):
        kv_append(**arguments)
    assert not bool(cache.any())
