"""An answer on its way out: in one piece, or as server-sent events."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

import vitalrt
from vitalrt.serve.errors import ApiError, internal_error, place_of
from vitalrt.serve.protocol import (
    AnswerMessage,
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    Choice,
    ChunkChoice,
    ContentLogprob,
    Delta,
    Logprobs,
)
from vitalrt.serve.reply import Reply

logger = logging.getLogger("vitalrt.serve")


class Answering:
    """One request that is in the engine. Whoever makes one sees to it that close() is called.

    on_close: is given the outcome, "done" or why there is no whole answer.
    """

    def __init__(
        self,
        asked: ChatRequest,
        reply: Reply,
        request_id: str,
        on_close: Callable[[str], None],
    ) -> None:
        self.asked = asked
        self.reply = reply
        self.request_id = request_id
        self._on_close = on_close
        self._outcome = "disconnected"  # until it turns out otherwise
        self._created = int(time.time())

    async def whole(self, request: Request) -> Response:
        """The answer in one piece; given up as soon as the client is gone.  Raises ApiError."""
        gone = asyncio.create_task(_until_gone(request))
        collected = asyncio.create_task(self._collect())
        try:
            await asyncio.wait({gone, collected}, return_when=asyncio.FIRST_COMPLETED)
            if not collected.done():
                return Response(status_code=499)  # which nobody reads
            completion = collected.result()
            self._outcome = "done"
            return Response(completion.model_dump_json(), media_type="application/json")
        except Exception as error:
            self._outcome = (error.code if isinstance(error, ApiError) else None) or "error"
            raise
        finally:
            gone.cancel()
            collected.cancel()
            self.close()

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events; an error on the way is an event of its own, and the last."""
        try:
            for index in range(len(self.reply.texts)):
                yield self._event(ChunkChoice(index=index, delta=Delta(role="assistant", content="")))
            async for piece in self.reply.pieces():
                if piece.text or (piece.logprobs and piece.logprobs.content):
                    delta = Delta(content=piece.text)
                    yield self._event(ChunkChoice(index=piece.index, delta=delta, logprobs=piece.logprobs))
                if piece.finish_reason is not None:
                    yield self._event(
                        ChunkChoice(
                            index=piece.index, delta=Delta(), finish_reason=piece.finish_reason, vital=piece.vital
                        )
                    )
            if self.asked.stream_options is not None and self.asked.stream_options.include_usage:
                yield _sse(ChatChunk(**self._envelope(), choices=[], usage=self.reply.usage()))
            self._outcome = "done"
        except Exception as error:
            if not isinstance(error, ApiError):
                logger.error("%s failed: %s", self.request_id, place_of(error))
                error = internal_error()
            self._outcome = error.code or "error"
            yield f"data: {json.dumps(error.body())}\n\n"
        yield "data: [DONE]\n\n"

    def close(self) -> None:
        self._on_close(self._outcome)

    async def _collect(self) -> ChatCompletion:
        choices: list[Choice] = []
        logprobs: list[list[ContentLogprob]] = [[] for _ in self.reply.texts]
        async for piece in self.reply.pieces():
            index = piece.index
            if piece.logprobs is not None:
                logprobs[index] += piece.logprobs.content
            if piece.finish_reason is not None:
                choices.append(
                    Choice(
                        index=index,
                        message=AnswerMessage(content=self.reply.texts[index]),
                        logprobs=Logprobs(content=logprobs[index]) if self.asked.logprobs else None,
                        finish_reason=piece.finish_reason,
                        vital=piece.vital,
                    )
                )
        choices.sort(key=lambda choice: choice.index)
        return ChatCompletion(**self._envelope(), choices=choices, usage=self.reply.usage())

    def _event(self, choice: ChunkChoice) -> str:
        return _sse(ChatChunk(**self._envelope(), choices=[choice]))

    def _envelope(self) -> dict[str, Any]:
        return {
            "id": self.request_id,
            "created": self._created,
            "model": self.asked.model,
            "system_fingerprint": f"vitalrt-{vitalrt.__version__}",
        }


class EventStream(StreamingResponse):
    """Closes the answering even where the client is gone before the first event was asked for."""

    def __init__(self, answering: Answering) -> None:
        super().__init__(answering.events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._answering = answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answering.close()


def _sse(chunk: BaseModel) -> str:
    return f"data: {chunk.model_dump_json()}\n\n"


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
