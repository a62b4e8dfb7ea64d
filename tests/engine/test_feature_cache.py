"""The cache of vision features against a list of what was used last; its memory; its threads."""

from __future__ import annotations

import random
import threading

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from vitalrt.engine.feature_cache import FeatureCache, VisionFeatures
from vitalrt.errors import InputError

KEYS = [bytes([number]) * 32 for number in range(5)]
WIDTH = 2
TOKEN_BYTES = WIDTH * 4


def features(num_tokens: int, num_levels: int = 1, value: float = 0.0) -> VisionFeatures:
    """Of num_tokens * (1 + num_levels) * TOKEN_BYTES bytes."""
    tokens, *deepstack = (torch.full((num_tokens, WIDTH), value, dtype=torch.float32) for _ in range(1 + num_levels))
    return VisionFeatures(tokens, tuple(deepstack))


class FeatureCacheMachine(RuleBasedStateMachine):
    """The model is (key, value, bytes) of what is kept, least recently used first; every value is put once only."""

    @initialize(max_tokens=st.integers(0, 12))
    def start(self, max_tokens: int) -> None:
        self.max_bytes = max_tokens * TOKEN_BYTES
        self.cache = FeatureCache(self.max_bytes)
        self.kept: list[tuple[bytes, float, int]] = []
        self.num_put = self.hits = self.misses = self.evictions = 0

    @rule(key=st.sampled_from(KEYS), num_tokens=st.integers(0, 4), num_levels=st.integers(0, 1))
    def put(self, key: bytes, num_tokens: int, num_levels: int) -> None:
        self.num_put += 1
        num_bytes = num_tokens * (1 + num_levels) * TOKEN_BYTES
        self.cache.put(key, features(num_tokens, num_levels, float(self.num_put)))
        self.kept = [one for one in self.kept if one[0] != key]
        if num_bytes <= self.max_bytes:
            self.kept.append((key, float(self.num_put), num_bytes))
        while sum(one[2] for one in self.kept) > self.max_bytes:
            del self.kept[0]
            self.evictions += 1

    @rule(key=st.sampled_from(KEYS))
    def get(self, key: bytes) -> None:
        found = self.cache.get(key)
        expected = next((one for one in self.kept if one[0] == key), None)
        if expected is None:
            self.misses += 1
            assert found is None
            return
        self.hits += 1
        self.kept.sort(key=lambda one: one[0] == key)  # stable: the others keep their order
        assert found is not None and found.num_bytes == expected[2]
        assert all(bool((tensor == expected[1]).all()) for tensor in (found.tokens, *found.deepstack))

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "cache"):
            return
        statistics = self.cache.statistics()
        assert statistics.num_bytes == sum(one[2] for one in self.kept) <= self.max_bytes
        assert statistics.num_images == len(self.kept)
        assert (statistics.hits, statistics.misses) == (self.hits, self.misses)
        assert statistics.evictions == self.evictions
        assert [key for key in KEYS if key in self.cache] == [
            key for key in KEYS if any(key == one[0] for one in self.kept)
        ]


TestFeatureCache = FeatureCacheMachine.TestCase
TestFeatureCache.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_the_least_recently_used_goes_first() -> None:
    cache = FeatureCache(4 * TOKEN_BYTES)
    cache.put(KEYS[0], features(1))
    cache.put(KEYS[1], features(1))
    cache.get(KEYS[0])
    cache.put(KEYS[2], features(1))
    assert [cache.get(key) is None for key in KEYS[:3]] == [False, True, False]


def test_one_image_of_a_batch_does_not_keep_the_batch() -> None:
    batch = features(1000, num_levels=2, value=1.0)
    cache = FeatureCache(1 << 20)
    cache.put(KEYS[0], VisionFeatures(batch.tokens[:3], tuple(level[:3] for level in batch.deepstack)))
    batch.tokens.fill_(2.0)
    kept = cache.get(KEYS[0])
    assert kept is not None and bool((kept.tokens == 1).all())
    tensors = (kept.tokens, *kept.deepstack)
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == cache.statistics().num_bytes


def test_nothing_of_a_graph_is_kept() -> None:
    tokens = torch.ones(3, WIDTH, requires_grad=True) * 2
    cache = FeatureCache(1 << 20)
    cache.put(KEYS[0], VisionFeatures(tokens, ()))
    kept = cache.get(KEYS[0])
    assert kept is not None and kept.tokens.grad_fn is None and not kept.tokens.requires_grad


def test_what_was_got_outlives_its_eviction() -> None:
    cache = FeatureCache(6 * TOKEN_BYTES)
    cache.put(KEYS[0], features(3, value=1.0))
    kept = cache.get(KEYS[0])
    cache.put(KEYS[1], features(3, value=2.0))
    assert cache.get(KEYS[0]) is None
    assert kept is not None and bool((kept.tokens == 1).all())


def test_a_budget_is_not_negative() -> None:
    with pytest.raises(InputError, match="max_bytes: expected at least 0, got -1"):
        FeatureCache(-1)


def test_threads_share_a_cache() -> None:
    cache = FeatureCache(20 * TOKEN_BYTES)
    faults: list[BaseException] = []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        try:
            for _ in range(500):
                number = draw.randrange(len(KEYS))
                found = cache.get(KEYS[number])
                if found is None:
                    cache.put(KEYS[number], features(number + 1, value=number))
                else:
                    assert bool((found.tokens == number).all())
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    statistics = cache.statistics()
    assert statistics.hits + statistics.misses == 2000
    kept = [found for found in map(cache.get, KEYS) if found is not None]
    assert statistics.num_bytes == sum(found.num_bytes for found in kept) <= cache.max_bytes
    assert statistics.num_images == len(kept)
