"""The prefix cache: pages of keys and values that a later sequence with the same beginning takes over.

csrc/prefix_cache.hpp is the cache itself; here is what a sequence's positions look like to it. One call serves a whole
batch and crosses into C++ once. All calls are thread-safe and release the GIL.

T positions, N pages.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitalrt._core import BlockPool, PrefixCacheStatistics
from vitalrt._core import PrefixCache as NativeCache
from vitalrt._core import PrefixKey as NativeKey
from vitalrt.config import ModelConfig
from vitalrt.errors import InputError
from vitalrt.inputs.prompt import Prompt

# A position is 32 bits: its kind in the highest two, and which one of that kind (csrc/prefix_cache.hpp, Kind).
KIND_SHIFT = 30
TEXT, IMAGE, LATENT = (kind << KIND_SHIFT for kind in range(3))
LARGEST = (1 << KIND_SHIFT) - 1
DIGEST_BYTES = 32

Pages = NDArray[np.int32]


def namespace_digest(model: str, adapter: str | None = None, cache_salt: str | None = None) -> bytes:
    """32 bytes. Sequences of different models, adapters or salts (tenants) never share a page.

    model, adapter: whatever identifies the weights and how they are run.
    """
    return hashlib.sha256(json.dumps([model, adapter, cache_salt]).encode()).digest()


class PrefixKey(NativeKey):
    """What a sequence holds, position by position. Two sequences share a page when all positions up to its end agree.

    PrefixKey(digests, positions) copies both and never changes. digests: the namespace's, then one per image, 32 bytes
    each.  positions: [T] uint32.  Raises ValueError on a position of no kind, or too few digests.

    A latent is known by its prefix and its index alone: z_1, z_2 of a request with K = 2 are the first two of one with
    K = 4. A token after them is of another kind than a third latent, so answers are shared between equal K only.
    """

    __slots__ = ()

    @classmethod
    def of_prompt(cls, namespace: bytes, prompt: Prompt, config: ModelConfig) -> PrefixKey:
        """namespace: from namespace_digest.  Image placeholders become (image's digest, index within the image).

        Raises InputError if placeholders and images disagree, or a digest is not of 32 bytes.
        """
        if any(len(digest) != DIGEST_BYTES for digest in (namespace, *prompt.digests)):
            raise InputError(f"digests: expected {DIGEST_BYTES} bytes each for the namespace and every image")
        ids = prompt.input_ids.numpy()
        is_image = ids == config.image_token_id
        patches_per_token = config.vision.spatial_merge_size**2
        lengths = [t * h * w // patches_per_token for t, h, w in prompt.grids()]
        if is_image.sum() != sum(lengths):
            raise InputError(f"input_ids: expected {sum(lengths)} image placeholders, got {is_image.sum()}")
        positions = _text_positions(ids)
        if lengths:
            positions[is_image] = IMAGE + np.concatenate([np.arange(length, dtype=np.uint32) for length in lengths])
        return cls(namespace + b"".join(prompt.digests), positions)

    def then_latents(self, count: int) -> PrefixKey:
        """With `count` latent steps more; they go on counting where the sequence ends with a latent."""
        last = int(self.positions[-1]) if len(self.positions) else TEXT
        num_before = last - LATENT if last >= LATENT else 0
        latents = np.arange(num_before + 1, num_before + count + 1, dtype=np.uint32) + np.uint32(LATENT)
        return PrefixKey(self.digests, np.concatenate([self.positions, latents]))

    def then_tokens(self, token_ids: Sequence[int]) -> PrefixKey:
        """With these tokens more. Raises InputError on ids out of range."""
        return PrefixKey(self.digests, np.concatenate([self.positions, _text_positions(np.asarray(token_ids))]))


class Branch(NamedTuple):
    """pages: [N], the branch's own references.  copy: (from, to), pages whose contents are still to be copied."""

    pages: Pages
    copy: tuple[int, int] | None


class PrefixCache:
    """Full pages of past and running sequences, held in a pool beside them.

    A sequence's pages come from match(), from fork() or from the pool's allocate(), and go back through release() here,
    never through the pool: a page's last holder must be known to be gone before it may be evicted.

    Whatever else belongs to a page is kept by its number; the latents that go on from it above all, which keys and
    values do not contain. Wrong arguments raise ValueError, and then nothing has changed.
    """

    def __init__(self, pool: BlockPool, page_size: int) -> None:
        self.page_size = page_size
        self._core = NativeCache(pool, page_size)

    def match(self, keys: Sequence[PrefixKey]) -> list[Pages]:
        """For each key, the cached pages it begins with; the caller now holds them.

        Never all of its positions: the last one must be computed, for its hidden state is what the sequence goes on
        from.
        """
        return self._core.match(keys)

    def insert(self, keys: Sequence[PrefixKey], pages: Sequence[Pages | Sequence[int]]) -> int:
        """Cache each key's full pages, which must have been written; pages beyond them are left alone.

        The caller keeps holding its pages. A page whose equal is cached already stays its holder's own. Returns how
        many pages are now cached that were not.
        """
        return self._core.insert(keys, pages)

    def release(self, pages: Sequence[Pages | Sequence[int]]) -> int:
        """Let go of each sequence's pages. Cached ones stay in the cache. Returns how many became free."""
        return self._core.release(pages)

    def fork(self, pages: Sequence[Pages | Sequence[int]], num_tokens: Sequence[int]) -> list[Branch]:
        """For each sequence, the pages of a second one that goes on from its first num_tokens tokens.

        Full pages are shared; a partial one is the branch's own, to be copied. The same sequence may be named several
        times. Raises OutOfBlocksError where the pool has too few pages.
        """
        forked = self._core.fork(pages, num_tokens)
        return [Branch(one, None if source < 0 else (source, target)) for one, source, target in forked]

    def evict(self, count: int) -> int:
        """Free up to `count` pages that no sequence holds, least recently used first. Returns how many."""
        return self._core.evict(count)

    def statistics(self) -> PrefixCacheStatistics:
        return self._core.statistics()

    def check_integrity(self) -> None:
        """For tests. Raises RuntimeError where anything that is kept in two places disagrees."""
        self._core.check_integrity()


def _text_positions(ids: NDArray[np.integer]) -> NDArray[np.uint32]:
    if len(ids) and not (ids.min() >= 0 and ids.max() <= LARGEST):
        raise InputError(f"input_ids: expected ids from 0 to {LARGEST}, got {ids.min()} to {ids.max()}")
    return ids.astype(np.uint32)
