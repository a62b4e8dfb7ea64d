"""The block pool against a dictionary of reference counts, and its errors one by one."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vitalrt._core import BlockPool, OutOfBlocksError
from vitalrt.errors import CapacityError


def free_runs(num_blocks: int, counts: dict[int, int]) -> list[list[int]]:
    """Maximal runs of free blocks, ascending; `counts` holds the blocks in use."""
    runs: list[list[int]] = []
    for block in range(num_blocks):
        if block in counts:
            continue
        if runs and runs[-1][-1] == block - 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs


class BlockPoolMachine(RuleBasedStateMachine):
    """Drives a pool and its model side by side; the model is {block in use: reference count}."""

    @initialize(num_blocks=st.integers(1, 24))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.num_blocks = num_blocks
        self.counts: dict[int, int] = {}

    @rule(count=st.integers(0, 10))
    def allocate(self, count: int) -> None:
        runs = free_runs(self.num_blocks, self.counts)
        num_free = sum(map(len, runs))
        if count > num_free:
            with pytest.raises(OutOfBlocksError) as caught:
                self.pool.allocate(count)
            assert (caught.value.requested, caught.value.free) == (count, num_free)
            return
        fitting = min((run for run in runs if len(run) >= count), key=len, default=None)
        source = fitting if fitting is not None else [block for run in runs for block in run]
        expected = source[:count]
        assert self.pool.allocate(count) == expected
        self.counts.update(dict.fromkeys(expected, 1))

    @precondition(lambda self: self.counts)
    @rule(data=st.data())
    def retain(self, data: st.DataObject) -> None:
        blocks = self.draw_held(data)
        self.pool.retain(blocks)
        for block in blocks:
            self.counts[block] += 1

    @precondition(lambda self: self.counts)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        blocks = self.draw_held(data)
        freed = 0
        for block in blocks:
            self.counts[block] -= 1
            if self.counts[block] == 0:
                del self.counts[block]
                freed += 1
        assert self.pool.release(blocks) == freed

    @rule(
        verb=st.sampled_from(["retain", "release"]), fault=st.sampled_from(["free", "unknown", "twice"]), data=st.data()
    )
    def misuse(self, verb: str, fault: str, data: st.DataObject) -> None:
        """A list with one bad block among good ones is refused whole; the invariants see that nothing changed."""
        blocks = self.draw_held(data) if self.counts else []
        if fault == "free":
            free = [block for block in range(self.num_blocks) if block not in self.counts]
            bad = data.draw(st.sampled_from(free)) if free else self.num_blocks
        elif fault == "twice" and blocks:
            bad = data.draw(st.sampled_from(blocks))
        else:
            bad = data.draw(st.sampled_from([-1, self.num_blocks]))
        blocks.insert(data.draw(st.integers(0, len(blocks))), bad)
        with pytest.raises(ValueError, match=str(bad)):
            getattr(self.pool, verb)(blocks)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check_integrity()
        runs = free_runs(self.num_blocks, self.counts)
        assert self.pool.num_blocks == self.num_blocks
        assert self.pool.num_free == self.num_blocks - len(self.counts)
        assert self.pool.largest_run() == max(map(len, runs), default=0)
        assert [self.pool.ref_count(b) for b in range(self.num_blocks)] == [
            self.counts.get(b, 0) for b in range(self.num_blocks)
        ]

    def draw_held(self, data: st.DataObject) -> list[int]:
        return data.draw(st.lists(st.sampled_from(sorted(self.counts)), unique=True))


TestBlockPool = BlockPoolMachine.TestCase
TestBlockPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_allocation_prefers_the_shortest_run_that_fits() -> None:
    pool = BlockPool(12)
    pool.allocate(12)
    pool.release([0, 1, 2, 3, 6, 7, 10, 11])
    assert pool.allocate(2) == [6, 7]
    assert pool.allocate(5) == [0, 1, 2, 3, 10]
    assert pool.num_free == 1


def test_a_shared_block_outlives_its_first_owner() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(2)
    pool.retain(blocks[:1])
    assert pool.release(blocks) == 1
    assert [pool.ref_count(block) for block in blocks] == [1, 0]
    assert pool.release(blocks[:1]) == 1


def test_out_of_blocks_is_a_capacity_error_with_both_counts() -> None:
    with pytest.raises(CapacityError, match="4 requested, 3 free"):
        BlockPool(3).allocate(4)


@pytest.mark.parametrize("num_blocks", [0, -1])
def test_a_pool_has_at_least_one_block(num_blocks: int) -> None:
    with pytest.raises(ValueError, match="num_blocks: expected at least 1"):
        BlockPool(num_blocks)


def test_a_negative_count_is_refused() -> None:
    with pytest.raises(ValueError, match="count: expected at least 0, got -1"):
        BlockPool(3).allocate(-1)


@pytest.mark.parametrize("block", [-1, 3])
def test_ref_count_knows_its_blocks(block: int) -> None:
    with pytest.raises(ValueError, match=f"expected 0 to 2, got {block}"):
        BlockPool(3).ref_count(block)
