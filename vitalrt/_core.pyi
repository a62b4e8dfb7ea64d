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

class CpuStep:
    """One decoder step of a running batch on one CPU core, in float32; vitalrt.engine.cpu_step is its caller.

    Takes addresses of contiguous memory (torch.Tensor.data_ptr) and keeps nothing alive. layers: input_norm, qkv,
    qk_norm, o, post_norm, gate_up and down of each. csrc/cpu_step.hpp has the shapes. Raises ValueError on sizes that
    make no decoder.
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
        k_cache: int,
        v_cache: int,
        num_slots: int,
    ) -> None: ...
    def run(
        self, batch: int, row_length: int, slots: int, lengths: int, positions: int, inputs: int, hidden: int
    ) -> None:
        """Append one token per row to the cache and write hidden, in place. Any number of threads; releases the GIL.

        Raises IndexError, touching nothing, where a row has no slot left or a slot is not in the cache.
        """
