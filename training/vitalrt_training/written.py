"""Thoughts that are written out before an answer, as a chain of thought is."""

from __future__ import annotations

from collections.abc import Sequence

END_OF_THOUGHT = "</think>"
"""Stands between thought and answer. Qwen3's tokenizers have one token for it, which decoding keeps."""


def write_out(steps: Sequence[str], answer: str) -> str:
    """What a model learns to say: a line a step, the end of the thought, the answer; without steps, the answer."""
    return "\n".join((*steps, END_OF_THOUGHT, answer)) if steps else answer


def answer_of(text: str) -> str:
    """What a text says after its thought; all of it where no thought ends in it."""
    return text.rpartition(END_OF_THOUGHT)[2].lstrip("\n")
