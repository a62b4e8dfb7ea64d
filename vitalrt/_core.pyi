"""The C++ core (csrc/) as Python sees it."""

from collections.abc import Sequence

from vitalrt.errors import CapacityError

class OutOfBlocksError(CapacityError):
    """Fewer blocks are free than `BlockPool.allocate` was asked for; nothing was allocated."""

    requested: int
    free: int

class BlockPool:
    """A fixed pool of KV-cache blocks with reference counts. Not thread-safe beyond what the GIL gives.

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
