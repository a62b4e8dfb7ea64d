"""What the vision tower made of an image, kept by the image's digest: the next question about it need not look again.

V visual tokens, d decoder width.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import torch

from vitalrt.errors import InputError


class VisionFeatures(NamedTuple):
    """One image's, as VisionTower.forward returns them.  tokens and each of deepstack: [V, d]."""

    tokens: torch.Tensor
    deepstack: tuple[torch.Tensor, ...]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.tokens, *self.deepstack))


@dataclass(frozen=True)
class FeatureCacheStatistics:
    """hits, misses, evictions: counts since construction.  num_bytes, num_images: of what is kept now."""

    hits: int
    misses: int
    evictions: int
    num_bytes: int
    num_images: int


class FeatureCache:
    """Features of the images used last, in at most max_bytes of the memory of the device they are on.

    Thread-safe. What get() returns is shared and must not be written to; it stays valid when it is evicted.
    """

    def __init__(self, max_bytes: int) -> None:
        """max_bytes: 0 keeps nothing. Raises InputError if negative."""
        if max_bytes < 0:
            raise InputError(f"max_bytes: expected at least 0, got {max_bytes}")
        self.max_bytes = max_bytes
        self._kept: OrderedDict[bytes, VisionFeatures] = OrderedDict()  # least recently used first
        self._num_bytes = self._hits = self._misses = self._evictions = 0
        self._lock = threading.Lock()

    def __contains__(self, key: bytes) -> bool:
        """Neither a hit nor a miss, and no use of it."""
        with self._lock:
            return key in self._kept

    def get(self, key: bytes) -> VisionFeatures | None:
        """key: the image's digest (Prompt.digests), which covers pixels, grid and preprocessing."""
        with self._lock:
            features = self._kept.get(key)
            if features is None:
                self._misses += 1
                return None
            self._hits += 1
            self._kept.move_to_end(key)
            return features

    def put(self, key: bytes, features: VisionFeatures) -> None:
        """Keep these in place of what the key had, at the cost of the least recently used.

        A view of a batch's features is copied, or it would keep the whole batch in memory. Features larger than
        max_bytes are not kept, and cost no others their place.
        """
        is_kept = features.num_bytes <= self.max_bytes
        own = VisionFeatures(_own(features.tokens), tuple(map(_own, features.deepstack))) if is_kept else None
        with self._lock:
            replaced = self._kept.pop(key, None)
            if replaced is not None:
                self._num_bytes -= replaced.num_bytes
            if own is None:
                return
            self._kept[key] = own
            self._num_bytes += own.num_bytes
            while self._num_bytes > self.max_bytes:
                _, evicted = self._kept.popitem(last=False)
                self._num_bytes -= evicted.num_bytes
                self._evictions += 1

    def statistics(self) -> FeatureCacheStatistics:
        with self._lock:
            return FeatureCacheStatistics(self._hits, self._misses, self._evictions, self._num_bytes, len(self._kept))


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """With no graph behind it and no memory but its own."""
    tensor = tensor.detach()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
