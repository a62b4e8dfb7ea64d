"""The C++ core (csrc/) as Python sees it."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vitalrt.errors import CapacityError

class OutOfBlocksError(CapacityError):
    """Fewer blocks are free than `BlockPool.allocate` was asked for; nothing was allocated."""

    requested: int
    free: int

class BlockPool:
    """A fixed pool of KV-cache blocks with reference counts. Thread-safe.

    Blocks are the integers 0 to num_blocks - 1, all free at first. Raises ValueError unless num_blocks >= 1.
    """

    def __init__(self, num_blocks: int) -> None: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def num_free(self) -> int: ...
    def allocate(self, count: int) -> list[int]:
        """`count` distinct free blocks, ascending, each now with reference count 1.

        One contiguous run if any is long enough (the shortest such, the lowest of equals), otherwise the lowest free
        blocks. All or nothing: raises OutOfBlocksError when fewer are free, ValueError when `count` is negative.
        """

    def retain(self, blocks: Sequence[int]) -> None:
        """One more reference to each block.

        Raises ValueError, changing nothing, when a block is unknown, free or listed twice.
        """

    def release(self, blocks: Sequence[int]) -> int:
        """One reference less to each block; returns how many became free. Raises as `retain` does."""

    def ref_count(self, block: int) -> int:
        """0 for a free block. Raises ValueError when the block is unknown."""

    def largest_run(self) -> int:
        """Length of the longest run of free blocks; 0 when none is free."""

    def check_integrity(self) -> None:
        """For tests. Raises RuntimeError when free runs and reference counts disagree."""

class CpuDecoder:
    """A small decoder's forward pass on the CPU, in float32; vitalrt.engine.cpu_decoder is its caller.

    Takes addresses of contiguous memory (torch.Tensor.data_ptr), copies matrices and keeps nothing alive. layers:
    input_norm, qkv, qk_norm, o, post_norm, gate_up and down of each. csrc/cpu_decoder.hpp has the shapes. Raises
    ValueError on sizes that make no decoder.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        intermediate_size: int,
        rms_norm_eps: float,
        layers: Sequence[Sequence[int]],
        final_norm: int,
        inverse_frequencies: int,
        axes: int,
        k_cache: int,
        v_cache: int,
        num_slots: int,
    ) -> None: ...
    @property
    def num_bytes(self) -> int:
        """Of its copies of the matrices."""

    def run(
        self,
        batch: int,
        row_length: int,
        slots: int,
        lengths: int,
        counts: int,
        num_axes: int,
        positions: int,
        inputs: int,
        hidden: int,
        num_image_rows: int,
        image_rows: int,
        deepstack: Sequence[int],
        start_threads: int,
        num_threads: int,
    ) -> None:
        """Append the new tokens to the cache and write hidden, in place. Any number of threads; releases the GIL.

        start_threads: address of what starts num_threads threads that share the sequences out, as GOMP_parallel does;
        0 for the caller's thread alone.

        Raises IndexError, touching nothing, where a row has no slot left, a slot is not in the cache, or an image row
        is not among the new tokens.
        """

class PrefixCacheStatistics:
    """Counts since construction, except pages_cached and pages_idle. Pages queried and not hit are misses.

    pages_duplicate: offered while an equal page was cached already.  pages_idle: cached and free to be evicted.
    """

    requests: int
    pages_queried: int
    pages_hit: int
    tokens_hit: int
    pages_inserted: int
    pages_duplicate: int
    pages_evicted: int
    pages_cached: int
    pages_idle: int

class PrefixKey:
    """What a sequence holds; vitalrt.engine.prefix_cache.PrefixKey says more. Immutable: it has its own copy of all."""

    def __init__(self, digests: bytes, positions: NDArray[np.uint32]) -> None: ...
    @property
    def digests(self) -> bytes: ...
    @property
    def positions(self) -> NDArray[np.uint32]:
        """[T], not writeable."""

    def num_shared(self, other: PrefixKey) -> int:
        """How many positions, from the first on, hold the same in both."""

class PrefixCache:
    """A tree of cached pages over a pool, which it keeps alive; vitalrt.engine.prefix_cache is its caller.

    csrc/prefix_cache.hpp says what every call promises. One entry per request: its key; its pages, int32 [N] or what
    makes one. Thread-safe; calls release the GIL. Raises ValueError, changing nothing, on a fault in any request.
    """

    def __init__(self, pool: BlockPool, page_size: int) -> None: ...
    def match(self, keys: Sequence[PrefixKey]) -> list[NDArray[np.int32]]: ...
    def insert(self, keys: Sequence[PrefixKey], pages: Sequence[NDArray[np.int32] | Sequence[int]]) -> int: ...
    def release(self, pages: Sequence[NDArray[np.int32] | Sequence[int]]) -> int: ...
    def fork(
        self, pages: Sequence[NDArray[np.int32] | Sequence[int]], num_tokens: Sequence[int]
    ) -> list[tuple[NDArray[np.int32], int, int]]: ...
    def evict(self, count: int) -> int: ...
    def statistics(self) -> PrefixCacheStatistics: ...
    def check_integrity(self) -> None:
        """For tests. Raises RuntimeError where anything that is kept in two places disagrees."""
