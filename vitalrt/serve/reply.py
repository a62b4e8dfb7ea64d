"""What the engine makes of one request, as text: all its choices, as they come or complete."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal

import torch

from vitalrt.inputs.processor import Processor
from vitalrt.inputs.prompt import Prompt
from vitalrt.serve.errors import internal_error
from vitalrt.serve.protocol import (
    ChatRequest,
    ChatUsage,
    ChoiceExtras,
    ContentLogprob,
    Latents,
    Logprobs,
    PromptDetails,
    TokenLogprob,
)
from vitalrt.serve.text import TextStream
from vitalrt.serve.worker import Finished, Job, Progress, Worker

LOWEST_LOGPROB = -9999.0  # JSON knows no infinity
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, eq=False)
class Piece:
    """New text of one choice.  finish_reason: set in its last piece, and so is vital, where it was asked for."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: FinishReason | None
    vital: ChoiceExtras | None


class Reply:
    """texts: of each choice, so far."""

    def __init__(self, asked: ChatRequest, prompt: Prompt, job: Job, worker: Worker, processor: Processor) -> None:
        self.asked = asked
        self.prompt = prompt
        self.job = job
        self.texts = [""] * job.num_choices
        self._worker = worker
        self._processor = processor
        self._streams: list[TextStream[ContentLogprob]] = [
            TextStream(processor.decode, asked.stops()) for _ in self.texts
        ]
        self._finished: dict[int, Finished] = {}

    async def pieces(self) -> AsyncIterator[Piece]:
        """Until every choice has finished.  Raises ApiError when the job's deadline passes or a step fails."""
        while len(self._finished) < self.job.num_choices:
            try:
                async with asyncio.timeout_at(self.job.deadline.at):
                    progress = await self.job.updates.get()
            except TimeoutError:
                raise self.job.deadline.passed() from None
            piece = self._piece(progress)
            if piece is not None:
                yield piece

    def usage(self) -> ChatUsage:
        """Of the whole request, once it is complete: the prompt counts once, answers up to their stop string."""
        usages = [finished.usage for finished in self._finished.values()]
        num_completion = sum(
            self._streams[index].num_tokens if self._streams[index].is_stopped else finished.usage.completion_tokens
            for index, finished in self._finished.items()
        )
        return ChatUsage(
            prompt_tokens=self.prompt.num_tokens,
            completion_tokens=num_completion,
            total_tokens=self.prompt.num_tokens + num_completion,
            latent_steps=sum(usage.latent_steps for usage in usages),
            prompt_tokens_details=PromptDetails(cached_tokens=min(usage.cached_tokens for usage in usages)),
        )

    def _piece(self, progress: Progress) -> Piece | None:
        index, finished = progress.index, progress.finished
        stream = self._streams[index]
        was_stopped = stream.is_stopped
        notes = [] if was_stopped else self._logprobs(progress)
        text, ready = stream.push(progress.token_ids, finished is not None, notes)
        self.texts[index] += text
        reason: FinishReason | None = None
        vital = None
        if finished is not None:
            self._finished[index] = finished
            if stream.is_stopped or finished.reason == "stop":
                reason = "stop"
            elif finished.reason == "length":
                reason = "length"
            else:
                raise self.job.deadline.passed() if finished.reason == "timeout" else internal_error()
            if self.asked.vital.return_latents:
                vital = ChoiceExtras(latents=_encode(finished.latents))
        elif stream.is_stopped and not was_stopped:
            self._worker.cancel(self.job, index, "stop")
        if not (text or ready or reason):
            return None
        return Piece(index, text, Logprobs(content=ready) if self.asked.logprobs else None, reason, vital)

    def _logprobs(self, progress: Progress) -> list[ContentLogprob]:
        """One per token; the end token, whose logits come too, is no part of the answer."""
        pairs = zip(progress.token_ids, progress.logits, strict=False)
        return [self._token_logprobs(token, logits) for token, logits in pairs]

    def _token_logprobs(self, token: int, logits: torch.Tensor) -> ContentLogprob:
        """logits: [vocab]."""
        values = logits.log_softmax(-1)
        best = values.topk(min(self.asked.top_logprobs or 0, len(values)))
        return ContentLogprob(
            **self._entry(token, values[token].item()).model_dump(),
            top_logprobs=[self._entry(*pair) for pair in zip(best.indices.tolist(), best.values.tolist(), strict=True)],
        )

    def _entry(self, token: int, logprob: float) -> TokenLogprob:
        text: str = self._processor.tokenizer.decode([token])
        is_whole = "\ufffd" not in text
        return TokenLogprob(
            token=text, logprob=max(logprob, LOWEST_LOGPROB), bytes=list(text.encode()) if is_whole else None
        )


def _encode(latents: torch.Tensor) -> Latents:
    """latents: [K, d] float32."""
    data = latents.numpy().astype("<f4").tobytes()
    return Latents(shape=list(latents.shape), data=base64.b64encode(data).decode())
