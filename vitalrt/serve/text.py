"""Tokens to text that may be shown: whole characters only, and never a part of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from vitalrt.api import REPLACEMENT

Note = TypeVar("Note")


class TextStream(Generic[Note]):
    """Feed it tokens as they come; what it gives back joins to the answer, cut before the first stop string.

    First is the one that is complete first, so that the cut does not depend on how tokens arrive. Each token may carry
    a note (its log probability), which is given back together with the last of the token's text, and never if that is
    cut off.

    num_tokens: taken so far; none is after the stop string, which sets is_stopped.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self.num_tokens = 0
        self.is_stopped = False
        self._decode = decode
        self._stops = tuple(stops)
        self._undecoded: list[int] = []
        self._held = ""  # decoded, but perhaps the beginning of a stop string
        self._num_shown = self._num_decoded = 0  # characters
        self._undated: list[Note] = []  # of tokens that are not decoded yet
        self._notes: list[tuple[int, Note]] = []  # and the number of characters up to the end of their token

    def push(self, token_ids: Sequence[int], is_last: bool, notes: Sequence[Note] = ()) -> tuple[str, list[Note]]:
        """Text and notes that may be shown now.  notes: one per token, or none at all."""
        shown = ""
        for position, token in enumerate(token_ids):
            if self.is_stopped:
                break
            self.num_tokens += 1
            self._undecoded.append(token)
            self._undated += notes[position : position + 1]
            text = self._decode(self._undecoded)
            if not text.endswith(REPLACEMENT):
                shown += self._take(text)
        if is_last and not self.is_stopped:
            shown += self._take(self._decode(self._undecoded))
            if not self.is_stopped:
                shown, self._held = shown + self._held, ""
        self._num_shown += len(shown)
        ready = [note for end, note in self._notes if end <= self._num_shown]
        self._notes = [(end, note) for end, note in self._notes if end > self._num_shown]
        return shown, ready

    def _take(self, text: str) -> str:
        """Returns what can be no part of a stop string any more."""
        self._undecoded.clear()
        self._num_decoded += len(text)
        self._notes += [(self._num_decoded, note) for note in self._undated]
        self._undated.clear()
        self._held += text
        found = [(start + len(stop), start) for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if found:
            shown = self._held[: min(found)[1]]
            self._held, self.is_stopped = "", True
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`, and is not all of it."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-size:])), 0)
