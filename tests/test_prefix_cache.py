"""The prefix cache against a dictionary of prefixes; what may be shared and what never; its errors one by one."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import vitalrt
from vitalrt import _core
from vitalrt._core import BlockPool, OutOfBlocksError
from vitalrt.config import ModelConfig
from vitalrt.engine.prefix_cache import IMAGE, LATENT, PrefixCache, PrefixKey, namespace_digest
from vitalrt.errors import InputError

CONFIG = ModelConfig.from_directory(Path(vitalrt.__file__).parent / "assets" / "phantom")
NAMESPACES = [namespace_digest("model", adapter) for adapter in (None, "adapter")]
IMAGES = [bytes([number]) * 32 for number in (1, 2)]
PAGE = 2

# One position in words of the test's own: ("text", id), ("image", digest, index) or ("latent", index).
Position = tuple[object, ...]
Prefix = tuple[object, ...]  # the namespace, then positions


def text(*ids: int) -> list[Position]:
    return [("text", token_id) for token_id in ids]


def image(digest: bytes, length: int) -> list[Position]:
    return [("image", digest, index) for index in range(length)]


def latents(count: int) -> list[Position]:
    return [("latent", index) for index in range(1, count + 1)]


def key_of(namespace: bytes, positions: list[Position]) -> PrefixKey:
    """A prompt of text and images, then latents, then an answer, through the interface that the engine uses."""
    num_prompt = next((at for at, one in enumerate(positions) if one[0] == "latent"), len(positions))
    key = prompt_key(namespace, positions[:num_prompt])
    num_latents = sum(one[0] == "latent" for one in positions)
    answer = [one[1] for one in positions[num_prompt + num_latents :]]
    return key.then_latents(num_latents).then_tokens(answer)


def prompt_key(namespace: bytes, positions: list[Position]) -> PrefixKey:
    """The prompt's images have one row of visual tokens each."""
    ids = [CONFIG.image_token_id if one[0] == "image" else one[1] for one in positions]
    starts = [at for at, one in enumerate(positions) if one[0] == "image" and one[2] == 0]
    if not positions:
        return PrefixKey(namespace, np.empty(0, np.uint32))
    if not starts:
        return PrefixKey.of_prompt(namespace, vitalrt.Prompt(ids), CONFIG)
    merge = CONFIG.vision.spatial_merge_size
    lengths = [run_length(positions, start) for start in starts]
    grid = torch.tensor([(1, merge, merge * length) for length in lengths])
    pixels = torch.zeros(int(grid.prod(-1).sum()), 1)
    prompt = vitalrt.Prompt(ids, pixels, grid, digests=[positions[start][1] for start in starts])
    return PrefixKey.of_prompt(namespace, prompt, CONFIG)


def run_length(positions: list[Position], start: int) -> int:
    end = start + 1
    while end < len(positions) and positions[end] == ("image", positions[start][1], end - start):
        end += 1
    return end - start


@dataclass(eq=False)
class Sequence:
    """A running sequence as the test knows it."""

    namespace: bytes
    positions: list[Position]
    pages: list[int] = field(default_factory=list)

    @property
    def key(self) -> PrefixKey:
        return key_of(self.namespace, self.positions)

    def prefixes(self, num_positions: int) -> list[Prefix]:
        return [(self.namespace, *self.positions[: (page + 1) * PAGE]) for page in range(max(0, num_positions) // PAGE)]


PIECES = st.one_of(
    st.lists(st.sampled_from(text(0, 1)), min_size=1, max_size=4),
    st.builds(image, st.sampled_from(IMAGES), st.integers(3, 8)),
)
PROMPTS = st.lists(PIECES, min_size=1, max_size=3).map(lambda pieces: [*chain.from_iterable(pieces)])
CONTINUATIONS = st.builds(
    lambda k, answer: latents(k) + text(*answer), st.integers(0, 3), st.lists(st.integers(0, 1), max_size=4)
)


class PrefixCacheMachine(RuleBasedStateMachine):
    """Drives a cache and its model side by side.

    The model is the running sequences, {prefix: page} for what is cached, and the list of idle prefixes, oldest first.
    """

    @initialize(num_pages=st.integers(4, 24))
    def start(self, num_pages: int) -> None:
        self.pool = BlockPool(num_pages)
        self.cache = PrefixCache(self.pool, PAGE)
        self.sequences: list[Sequence] = []
        self.cached: dict[Prefix, int] = {}
        self.idle: list[Prefix] = []
        self.counts: dict[str, int] = dict.fromkeys(("queried", "hit", "inserted", "duplicate", "evicted"), 0)

    @rule(
        requests=st.lists(st.tuples(st.sampled_from(NAMESPACES), PROMPTS, CONTINUATIONS), min_size=1, max_size=3),
        cached_at_once=st.booleans(),
    )
    def arrive(self, requests: list[tuple[bytes, list[Position], list[Position]]], cached_at_once: bool) -> None:
        """A batch is matched; those that still find room get their own pages, the others leave again."""
        batch = [Sequence(namespace, prompt + rest) for namespace, prompt, rest in requests]
        matched = self.cache.match([sequence.key for sequence in batch])
        for sequence, pages in zip(batch, matched, strict=True):
            prefixes = sequence.prefixes(len(sequence.positions) - 1)
            hits = prefixes[: next((at for at, one in enumerate(prefixes) if one not in self.cached), len(prefixes))]
            assert pages.tolist() == [self.cached[prefix] for prefix in hits]
            self.counts["queried"] += len(prefixes)
            self.counts["hit"] += len(hits)
            sequence.pages = pages.tolist()
        self.sequences += batch
        self.settle()
        for sequence in batch:
            missing = -(-len(sequence.positions) // PAGE) - len(sequence.pages)
            if missing > self.pool.num_free:
                self.leave([sequence])
            else:
                sequence.pages += self.pool.allocate(missing)
        if cached_at_once:
            self.insert([sequence for sequence in batch if sequence in self.sequences])

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def cache_some(self, data: st.DataObject) -> None:
        self.insert(self.draw(data))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), ids=st.lists(st.integers(0, 1), min_size=1, max_size=3))
    def go_on(self, data: st.DataObject, ids: list[int]) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        missing = -(-(len(sequence.positions) + len(ids)) // PAGE) - len(sequence.pages)
        if missing <= self.pool.num_free:
            sequence.positions = sequence.positions + text(*ids)
            sequence.pages += self.pool.allocate(missing)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), num_branches=st.integers(1, 3))
    def fork(self, data: st.DataObject, num_branches: int) -> None:
        trunk = data.draw(st.sampled_from(self.sequences))
        num_tokens = data.draw(st.integers(0, len(trunk.positions)))
        num_full, rest = divmod(num_tokens, PAGE)
        call = [trunk.pages] * num_branches, [num_tokens] * num_branches
        if rest and num_branches > self.pool.num_free:
            with pytest.raises(OutOfBlocksError):
                self.cache.fork(*call)
            return
        for branch in self.cache.fork(*call):
            pages = branch.pages.tolist()
            assert pages[:num_full] == trunk.pages[:num_full] and len(pages) == num_full + bool(rest)
            assert branch.copy == ((trunk.pages[num_full], pages[-1]) if rest else None)
            self.sequences.append(Sequence(trunk.namespace, trunk.positions[:num_tokens], pages))
        self.settle()

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def leave_some(self, data: st.DataObject) -> None:
        self.leave(self.draw(data))

    @rule(count=st.integers(0, 6))
    def evict(self, count: int) -> None:
        expected = self.idle[:count]
        assert self.cache.evict(count) == len(expected)
        for prefix in expected:
            del self.cached[prefix]
        del self.idle[:count]
        self.counts["evicted"] += len(expected)

    @rule(verb=st.sampled_from(["insert", "release", "fork"]), fault=st.sampled_from(["not held", "unknown"]))
    def misuse(self, verb: str, fault: str) -> None:
        """A batch with one bad request after a good one is refused whole; the invariants see that nothing changed."""
        held = {page for sequence in self.sequences for page in sequence.pages}
        others = [page for page in range(self.pool.num_blocks) if page not in held]
        bad = others[0] if fault == "not held" and others else self.pool.num_blocks
        good = self.sequences[:1]
        batch = [*good, Sequence(NAMESPACES[0], text(*[7] * PAGE), [bad])]
        pages = [sequence.pages for sequence in batch]
        with pytest.raises(ValueError, match=str(bad)):
            if verb == "insert":
                self.cache.insert([sequence.key for sequence in batch], pages)
            elif verb == "release":
                self.cache.release(pages)
            else:
                self.cache.fork(pages, [len(sequence.positions) for sequence in batch])

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.cache.check_integrity()
        references = [page for sequence in self.sequences for page in sequence.pages] + list(self.cached.values())
        assert [self.pool.ref_count(page) for page in range(self.pool.num_blocks)] == [
            references.count(page) for page in range(self.pool.num_blocks)
        ]
        statistics = self.cache.statistics()
        assert statistics.pages_cached == len(self.cached) and statistics.pages_idle == len(self.idle)
        assert statistics.pages_queried == self.counts["queried"] and statistics.pages_hit == self.counts["hit"]
        assert statistics.tokens_hit == self.counts["hit"] * PAGE
        assert statistics.pages_inserted == self.counts["inserted"]
        assert statistics.pages_duplicate == self.counts["duplicate"]
        assert statistics.pages_evicted == self.counts["evicted"]

    def draw(self, data: st.DataObject) -> list[Sequence]:
        chosen = data.draw(st.lists(st.integers(0, len(self.sequences) - 1), min_size=1, max_size=3, unique=True))
        return [self.sequences[index] for index in chosen]

    def insert(self, batch: list[Sequence]) -> None:
        num_new = 0
        for sequence in batch:
            for page, prefix in zip(sequence.pages, sequence.prefixes(len(sequence.positions)), strict=False):
                self.counts["duplicate"] += self.cached.get(prefix, page) != page
                num_new += prefix not in self.cached
                self.cached.setdefault(prefix, page)
        self.counts["inserted"] += num_new
        assert self.cache.insert([one.key for one in batch], [one.pages for one in batch]) == num_new
        self.settle()

    def leave(self, batch: list[Sequence]) -> None:
        free_before = self.pool.num_free
        for sequence in batch:
            self.sequences = [one for one in self.sequences if one is not sequence]
        released = self.cache.release([sequence.pages for sequence in batch])
        for at, sequence in enumerate(batch):  # the model lets go page by page, from the end, as the cache promises to
            for num_left in reversed(range(len(sequence.pages))):
                remaining = Sequence(sequence.namespace, sequence.positions, sequence.pages[:num_left])
                self.settle([remaining, *batch[at + 1 :]])
        references = {page for one in self.sequences for page in one.pages} | set(self.cached.values())
        expected = len({page for one in batch for page in one.pages} - references)
        assert released == expected == self.pool.num_free - free_before

    def settle(self, also: list[Sequence] | None = None) -> None:
        """Brings the idle list up to date: what is busy leaves it, what became idle joins it, children first."""
        held = {page for sequence in [*self.sequences, *(also or [])] for page in sequence.pages}
        busy = {
            prefix[: 1 + length]
            for prefix, page in self.cached.items()
            if page in held
            for length in range(PAGE, len(prefix), PAGE)
        }
        self.idle = [prefix for prefix in self.idle if prefix not in busy]
        fresh = [prefix for prefix in self.cached if prefix not in busy and prefix not in self.idle]
        self.idle += sorted(fresh, key=len, reverse=True)


TestPrefixCache = PrefixCacheMachine.TestCase
TestPrefixCache.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def cached(namespace: bytes, positions: list[Position], pool_pages: int = 64) -> PrefixCache:
    """A cache that holds the full pages of one sequence, which is gone."""
    pool = BlockPool(pool_pages)
    cache = PrefixCache(pool, PAGE)
    pages = pool.allocate(len(positions) // PAGE)
    cache.insert([key_of(namespace, positions)], [pages])
    assert cache.release([pages]) == 0
    return cache


def num_matched(cache: PrefixCache, namespace: bytes, positions: list[Position]) -> int:
    """How many of these positions the cache has (with one more after them, since the last is never matched)."""
    (pages,) = cache.match([key_of(namespace, [*positions, *text(0)])])
    cache.release([pages])
    return len(pages) * PAGE


PROMPT = text(5) + image(IMAGES[0], 3) + text(6, 7)


@pytest.mark.parametrize(
    "namespace",
    [
        namespace_digest("other model", "adapter", "tenant"),
        namespace_digest("model", "other adapter", "tenant"),
        namespace_digest("model", None, "tenant"),
        namespace_digest("model", "adapter", "other tenant"),
        namespace_digest("model", "adapter", None),
        namespace_digest("model", "adapter", ""),
    ],
)
def test_models_adapters_and_tenants_share_nothing(namespace: bytes) -> None:
    own = namespace_digest("model", "adapter", "tenant")
    cache = cached(own, PROMPT)
    assert num_matched(cache, namespace, PROMPT) == 0
    statistics = cache.statistics()
    assert (statistics.pages_queried, statistics.pages_hit, statistics.tokens_hit) == (3, 0, 0)
    assert num_matched(cache, own, PROMPT) == len(PROMPT)


def test_images_share_only_what_comes_before_them() -> None:
    prompt = text(1, 2) + image(IMAGES[0], 3) + text(3)
    cache = cached(NAMESPACES[0], prompt)
    assert num_matched(cache, NAMESPACES[0], prompt) == 6
    assert num_matched(cache, NAMESPACES[0], text(1, 2) + image(IMAGES[1], 3) + text(3)) == 2


@pytest.mark.parametrize("byte", [0, 7, 8, 31])
def test_every_byte_of_a_digest_counts(byte: int) -> None:
    digest = bytearray(IMAGES[0])
    digest[byte] ^= 1
    cache = cached(NAMESPACES[0], image(IMAGES[0], 4))
    assert num_matched(cache, NAMESPACES[0], image(bytes(digest), 4)) == 0


def test_equal_placeholders_of_different_images_never_meet() -> None:
    """Two images in one page, swapped, doubled, or one long one: same ids, same length, different positions."""
    first, second = (image(digest, 2) for digest in IMAGES)
    cache = cached(NAMESPACES[0], text(1) + first + second + text(1))
    for other in (second + first, first + first, image(IMAGES[0], 4)):
        assert num_matched(cache, NAMESPACES[0], text(1) + other + text(1)) == (2 if other[:1] == first[:1] else 0)


def test_no_page_is_keyed_by_a_placeholder_id() -> None:
    key = key_of(NAMESPACES[0], PROMPT + latents(2))
    assert CONFIG.image_token_id not in key.positions
    assert key.positions.tolist() == [5, IMAGE, IMAGE + 1, IMAGE + 2, 6, 7, LATENT + 1, LATENT + 2]
    assert key.digests == NAMESPACES[0] + IMAGES[0]


def test_latents_of_a_short_thought_are_the_first_of_a_long_one() -> None:
    cache = cached(NAMESPACES[0], PROMPT + latents(2))
    assert num_matched(cache, NAMESPACES[0], PROMPT + latents(4)) == len(PROMPT) + 2
    assert num_matched(cache, NAMESPACES[1], PROMPT + latents(4)) == 0
    longer = cached(NAMESPACES[0], PROMPT + latents(4))
    assert num_matched(longer, NAMESPACES[0], PROMPT + latents(2)) == len(PROMPT) + 2


@pytest.mark.parametrize("k", [0, 1, 2, 3, 5])
def test_answers_are_shared_between_equal_k_only(k: int) -> None:
    answer = text(1, 1, 1, 1)
    cache = cached(NAMESPACES[0], PROMPT + latents(4) + answer)
    assert num_matched(cache, NAMESPACES[0], PROMPT + latents(4) + answer) == len(PROMPT) + 8
    common = len(PROMPT) + min(k, 4) // PAGE * PAGE
    assert num_matched(cache, NAMESPACES[0], PROMPT + latents(k) + answer) == common


def test_a_latent_is_not_the_token_of_its_number() -> None:
    cache = cached(NAMESPACES[0], PROMPT + latents(4))
    assert num_matched(cache, NAMESPACES[0], PROMPT + text(1, 2, 3, 4)) == len(PROMPT)


def test_latents_go_on_counting() -> None:
    prompt = prompt_key(NAMESPACES[0], PROMPT)
    assert (prompt.then_latents(2).then_latents(2).positions == prompt.then_latents(4).positions).all()
    assert prompt.then_latents(1).then_tokens([3]).then_latents(1).positions[-1] == LATENT + 1


def test_the_last_position_is_never_matched() -> None:
    cache = cached(NAMESPACES[0], text(1, 2, 3, 4))
    (pages,) = cache.match([key_of(NAMESPACES[0], text(1, 2, 3, 4))])
    assert len(pages) == 1
    (pages,) = cache.match([PrefixKey(NAMESPACES[0], np.empty(0, np.uint32))])
    assert len(pages) == 0


def test_a_page_in_use_is_never_evicted() -> None:
    cache = cached(NAMESPACES[0], text(*range(8)))
    held = cache.match([key_of(NAMESPACES[0], text(*range(5)))])
    assert cache.evict(64) == 2
    assert cache.evict(64) == 0
    assert cache.release(held) == 0
    assert cache.evict(64) == 2
    assert cache.statistics().pages_cached == 0


def test_the_least_recently_used_chain_goes_first_and_from_its_end() -> None:
    pool = BlockPool(8)
    cache = PrefixCache(pool, PAGE)
    chains = [pool.allocate(2) for _ in range(3)]
    keys = [key_of(NAMESPACES[0], text(first, 0, 0, 0)) for first in range(3)]
    cache.insert(keys, chains)
    for index in (1, 0, 2):
        cache.release([chains[index]])
    cache.release(cache.match([keys[1].then_tokens([0])]))
    order = []
    while cache.evict(1):
        order.append(
            next(page for chain in chains for page in chain if pool.ref_count(page) == 0 and page not in order)
        )
    assert order == [chains[0][1], chains[0][0], chains[2][1], chains[2][0], chains[1][1], chains[1][0]]


def test_a_page_used_alone_outlives_an_older_page_after_it() -> None:
    """What a leaf-only list gets wrong: a parent keeps its own time of use when its last child goes."""
    pool = BlockPool(8)
    cache = PrefixCache(pool, PAGE)
    shared, other = pool.allocate(2), pool.allocate(1)
    cache.insert([key_of(NAMESPACES[0], text(1, 1, 1, 1)), key_of(NAMESPACES[0], text(2, 2))], [shared, other])
    cache.release([shared, other])
    cache.release(cache.match([key_of(NAMESPACES[0], text(1, 1, 3))]))
    assert cache.evict(2) == 2
    assert [pool.ref_count(page) for page in (*shared, *other)] == [1, 0, 0]


def test_a_duplicate_stays_its_owners_and_is_freed_with_it() -> None:
    pool = BlockPool(8)
    cache = PrefixCache(pool, PAGE)
    first, second = pool.allocate(2), pool.allocate(3)
    keys = [key_of(NAMESPACES[0], text(0, 0, 0, 0)), key_of(NAMESPACES[0], text(0, 0, 0, 0, 1, 1))]
    assert cache.insert(keys, [first, second]) == 3
    assert cache.release([first]) == 0
    assert cache.evict(8) == 0  # the second sequence's last page needs the first one's
    assert cache.release([second]) == 2
    assert cache.evict(8) == 3


def test_a_pool_outlives_its_cache_and_gets_its_pages_back() -> None:
    pool = BlockPool(4)
    cache = PrefixCache(pool, PAGE)
    pages = pool.allocate(2)
    cache.insert([key_of(NAMESPACES[0], text(1, 2, 3, 4))], [pages])
    cache.release([pages[1:]])
    del cache
    assert [pool.ref_count(page) for page in pages] == [1, 0]
    pool.check_integrity()


def test_one_page_for_two_places_is_refused_whole() -> None:
    pool = BlockPool(4)
    cache = PrefixCache(pool, PAGE)
    page, other = pool.allocate(2)
    keys = [key_of(NAMESPACES[0], text(number, 1, 2, 3)) for number in range(2)]
    with pytest.raises(ValueError, match=f"page {page} is cached with other contents"):
        cache.insert(keys, [[page, other], [page, other]])
    cache.check_integrity()
    assert cache.statistics().pages_cached == 0
    assert cache.insert(keys[:1], [[page, other]]) == 2


KEY = PrefixKey(bytes(32), np.zeros(2, np.uint32))


def test_image_positions_outside_of_an_image_are_no_part_of_it() -> None:
    """Pages inside an image are known by their parent alone: nothing else may pass for one, nor they for another."""
    image_words = [IMAGE + index for index in range(8)]
    whole = PrefixKey(bytes(64), np.array([*image_words, 0], np.uint32))
    pool = BlockPool(16)
    cache = PrefixCache(pool, PAGE)
    cache.insert([whole], [pool.allocate(4)])
    for at in range(2, 8):
        others = [*image_words, 0]
        for other in (IMAGE + at + 1, IMAGE + at - 1, IMAGE, at):
            others[at] = other
            (pages,) = cache.match([PrefixKey(bytes(64) + bytes(32), np.array(others, np.uint32))])
            assert len(pages) == at // PAGE
        gapless = [*image_words[:at], *image_words[at + 1 :], 0]
        (pages,) = cache.match([PrefixKey(bytes(64), np.array(gapless, np.uint32))])
        assert len(pages) == at // PAGE
    assert len(cache.match([whole])[0]) == 4
    stray = PrefixKey(bytes(32), np.array([5, 6, *image_words[2:], 0], np.uint32))
    assert cache.insert([stray], [pool.allocate(4)]) == 4
    assert len(cache.match([stray])[0]) == 4
    cache.check_integrity()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda core: core.match([None]), TypeError, "keys: expected PrefixKey, got NoneType"),
        (lambda core: core.match([b"key"]), TypeError, "keys: expected PrefixKey, got bytes"),
        (lambda core: core.match([KEY, PrefixKey.__new__(PrefixKey)]), TypeError, "keys: expected PrefixKey, got"),
        (lambda core: core.insert([KEY], [[]]), ValueError, "pages: expected 1 for request 0, got 0"),
        (lambda core: core.insert([KEY], [[[0]]]), ValueError, "pages: expected one axis, got 2"),
        (lambda core: core.insert([KEY], [["page"]]), ValueError, "invalid literal"),
        (lambda core: core.insert([KEY], []), ValueError, "one list per request"),
        (lambda core: core.fork([np.zeros(1, np.int32)], [3]), ValueError, "num_tokens: expected 0 to 2, got 3"),
        (lambda core: core.fork([np.zeros(1, np.int32)], [-1]), ValueError, "num_tokens: expected 0 to 2, got -1"),
        (lambda core: core.fork([np.zeros(1, np.int32)], []), ValueError, "expected as many, got 1 and 0"),
        (lambda core: core.evict(-1), ValueError, "count: expected at least 0, got -1"),
        (lambda core: core.release([np.array([-1], np.int32)]), ValueError, "expected 0 to 3, got -1"),
    ],
)
def test_wrong_arguments(call, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call(_core.PrefixCache(BlockPool(4), PAGE))


def test_a_page_has_at_least_one_position() -> None:
    with pytest.raises(ValueError, match="page_size: expected at least 1, got 0"):
        PrefixCache(BlockPool(4), 0)


def test_prompts_that_cannot_be_keyed() -> None:
    with pytest.raises(InputError, match="expected 0 image placeholders, got 1"):
        PrefixKey.of_prompt(NAMESPACES[0], vitalrt.Prompt([1, CONFIG.image_token_id]), CONFIG)
    with pytest.raises(InputError, match="ids from 0 to 1073741823, got -1"):
        PrefixKey.of_prompt(NAMESPACES[0], vitalrt.Prompt([1, -1]), CONFIG)
    with pytest.raises(InputError, match="expected 32 bytes"):
        PrefixKey.of_prompt(b"namespace", vitalrt.Prompt([1]), CONFIG)


def test_integrity_check_sees_a_reference_that_went_past_the_cache() -> None:
    pool = BlockPool(4)
    cache = PrefixCache(pool, PAGE)
    pages = pool.allocate(1)
    cache.insert([key_of(NAMESPACES[0], text(1, 2))], [pages])
    pool.release(pages)
    with pytest.raises(RuntimeError, match="it is idle and not listed"):
        cache.check_integrity()


def test_threads_share_a_cache_and_its_pool() -> None:
    pool = BlockPool(2000)  # more than all pages that these sequences can differ in
    cache = PrefixCache(pool, PAGE)
    faults: list[BaseException] = []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        try:
            for _ in range(300):
                keys = [key_of(NAMESPACES[0], text(*draw.choices(range(2), k=10))) for _ in range(4)]
                held = [pages.tolist() for pages in cache.match(keys)]
                for pages in held:
                    pages += pool.allocate(5 - len(pages))
                cache.insert(keys, held)
                cache.release(held)
                cache.evict(draw.randrange(20))
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    cache.check_integrity()
    cache.evict(2000)
    assert pool.num_free == 2000
