"""The line of requests that wait for the engine, in the order in which they are to go."""

from __future__ import annotations

import bisect
from collections.abc import Iterator

from vitalrt.engine.sequence import Sequence
from vitalrt.errors import CapacityError


class WaitingLine:
    """Sequences by rank. Not thread-safe: an engine's lock guards it."""

    def __init__(self, limit: int | None) -> None:
        """limit: how many may wait; None for any number."""
        self._limit = limit
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        """Over those that wait now, whoever leaves meanwhile."""
        return iter(self._sequences.copy())

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._sequences

    def join(self, sequence: Sequence) -> None:
        """Raises CapacityError if the line is full."""
        if self._limit is not None and len(self) >= self._limit:
            raise CapacityError(f"max_waiting: expected at most {self._limit} requests in the line, which is full")
        self.rejoin(sequence)

    def rejoin(self, sequence: Sequence) -> None:
        """For one that was in the engine already: the limit is not for it."""
        bisect.insort(self._sequences, sequence, key=lambda waiting: waiting.rank)

    def leave(self, sequence: Sequence) -> None:
        self._sequences.remove(sequence)
