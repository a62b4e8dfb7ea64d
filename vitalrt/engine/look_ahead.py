"""Answering without waiting for the device: the host looks at a token while the step that it is fed to is under way."""

from __future__ import annotations

from collections.abc import Sequence as Many

from vitalrt.engine.graphs import StepGraphs, TokenReader
from vitalrt.engine.sequence import Sequence
from vitalrt.engine.step import RunningBatch


class LookAhead:
    """Steps of batches whose tokens the device takes itself.

    A step is queued before the token that it is fed has been looked at. Where that turns out to be a stop token, the
    step was for nothing: it has written to pages of the sequence's own, which are given back.
    """

    def __init__(self, graphs: StepGraphs) -> None:
        self._device_step = graphs.device_step
        self._reader = TokenReader(graphs.device_step.rows.tokens, depth=2)
        self._begun: Many[Sequence] | None = None

    @staticmethod
    def suits(sequences: Many[Sequence]) -> bool:
        """Whether nobody needs logits on the host."""
        return all(s.decoding.temperature == 0 and not s.decoding.return_logits for s in sequences)

    def begin(self, batch: RunningBatch) -> None:
        """See to it that the tokens of the batch's present hidden states are taken. Does nothing while it only steps.

        A batch that somebody has joined or left is another one.
        """
        if self._begun is batch.sequences:
            return
        self._reader.drop()
        if not all(sequence.is_thinking for sequence in batch.sequences):
            self._device_step.answer(0, len(batch.sequences))
        self._reader.post()
        self._begun = batch.sequences

    def step(self, batch: RunningBatch) -> None:
        """Queue the next step. Those who have all their inputs already do not move."""
        batch.step_on_device(answers=any(sequence.num_latents_left < 2 for sequence in batch.sequences))
        self._reader.post()

    def take(self) -> list[int]:
        """Tokens of all rows from before the newest step, of no meaning where a row was thinking."""
        return self._reader.take()
