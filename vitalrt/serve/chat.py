"""POST /v1/chat/completions, from the body's bytes to the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from vitalrt.api import Model
from vitalrt.engine.request import Decoding, Terms
from vitalrt.errors import CapacityError, VitalError
from vitalrt.inputs.prompt import Prompt
from vitalrt.serve.access import REQUEST_ID
from vitalrt.serve.answering import Answering, EventStream
from vitalrt.serve.audit import AuditLog
from vitalrt.serve.conversation import PromptMaker
from vitalrt.serve.errors import ApiError, bad_request
from vitalrt.serve.models import Catalog
from vitalrt.serve.protocol import ChatRequest, VitalOptions, parse
from vitalrt.serve.reply import Reply
from vitalrt.serve.settings import ServeConfig
from vitalrt.serve.worker import Deadline, Job, Worker

READING_THREADS = 2  # images are decoded and texts tokenized beside the event loop
T = TypeVar("T")


class Chat:
    """Answers requests; holds what they share."""

    def __init__(
        self,
        model: Model,
        config: ServeConfig,
        catalog: Catalog,
        worker: Worker,
        prompts: PromptMaker,
        audit: AuditLog | None,
    ) -> None:
        self.model = model
        self.config = config
        self.catalog = catalog
        self.worker = worker
        self.prompts = prompts
        self.audit = audit
        self._threads = ThreadPoolExecutor(READING_THREADS, thread_name_prefix="vitalrt-read")

    async def answer(self, request: Request) -> Response:
        """Raises ApiError."""
        answering = await self._admit(request)
        return EventStream(answering) if answering.asked.stream else await answering.whole(request)

    def close(self) -> None:
        """Read no more requests."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _admit(self, request: Request) -> Answering:
        """Read, check and prepare the request and hand it to the engine."""
        arrived = asyncio.get_running_loop().time()
        deadline = Deadline(arrived + self.config.deadline_s, self.config.deadline_s)
        self.worker.require_room()  # before the body is read
        try:
            async with asyncio.timeout_at(deadline.at) as limit:
                body = await read_body(request, self.config.max_body_bytes)
                asked = await self._in_thread(parse, body)
                if asked.vital.deadline_s is not None and asked.vital.deadline_s < deadline.seconds:
                    deadline = Deadline(arrived + asked.vital.deadline_s, asked.vital.deadline_s)
                    limit.reschedule(deadline.at)
                decodings = self._decodings(asked)
                job = self.worker.open(len(decodings), deadline)
                try:
                    prompt = await self._in_thread(self.prompts.make, asked)
                    await self._submit(job, prompt, decodings, asked.vital)
                except BaseException:
                    self.worker.close(job)
                    raise
        except TimeoutError:
            raise deadline.passed() from None
        texts = _texts(asked)
        asked.messages.clear()  # their images may be large, and are in the prompt now
        reply = Reply(asked, prompt, job, self.worker, self.model.processor)
        request_id = request.scope[REQUEST_ID]

        def close(outcome: str) -> None:
            self.worker.close(job)
            self._record(request_id, outcome, asked, texts, reply, decodings[0].k)

        return Answering(asked, reply, request_id, close)

    def _record(
        self, request_id: str, outcome: str, asked: ChatRequest, texts: list[list[str]], reply: Reply, k: int
    ) -> None:
        """A line of the audit file, where there is one."""
        if self.audit is None:
            return
        options = self.model.processor.patch_options if reply.prompt.digests else None
        self.audit.write(
            request_id,
            reply.prompt,
            outcome,
            {"messages": texts},
            reply.texts,
            k=k,
            preprocessing={
                "window": asked.vital.window,
                "frame": asked.vital.frame,
                "patches": None if options is None else asdict(options),
            },
        )

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    def _decodings(self, asked: ChatRequest) -> list[Decoding]:
        """One per choice; where there is a seed, choice i has seed + i."""
        k = self._steps(asked)
        limit = self.config.max_completion_tokens
        name = "max_tokens" if asked.max_completion_tokens is None else "max_completion_tokens"
        wanted = asked.max_completion_tokens or asked.max_tokens or min(limit, self.config.default_max_tokens)
        if wanted > limit:
            raise bad_request(f"{name}: expected at most {limit}, this server's limit, got {wanted}", name)
        num_choices = asked.n or 1
        most = min(self.config.max_choices, self.config.max_queue)
        if num_choices > most:
            raise bad_request(f"n: expected at most {most}, this server's limit, got {num_choices}", "n")
        return [
            Decoding(
                k,
                wanted,
                temperature=asked.temperature or 0.0,
                top_p=1.0 if asked.top_p is None else asked.top_p,
                seed=None if asked.seed is None else (asked.seed + index) % 2**63,
                return_logits=bool(asked.logprobs),
            )
            for index in range(num_choices)
        ]

    def _steps(self, asked: ChatRequest) -> int:
        fixed = self.catalog.alias_steps(asked.model)
        wanted = asked.vital.latent_steps
        if fixed is not None and wanted not in (None, fixed):
            raise bad_request(f"vital.latent_steps: expected {fixed} as the model's name says", "vital.latent_steps")
        return next((k for k in (fixed, wanted) if k is not None), self.catalog.default_k)

    async def _submit(self, job: Job, prompt: Prompt, decodings: list[Decoding], wanted: VitalOptions) -> None:
        needed = prompt.num_tokens + decodings[0].k + decodings[0].max_new_tokens
        most = self.catalog.max_model_len
        if needed > most:
            came = f"prompt, latent steps and answer may take {needed} tokens, the model's context has {most}"
            raise bad_request(f"messages: {came}", "messages", "context_length_exceeded")
        terms = Terms(wanted.priority, job.deadline.seconds_left, wanted.cache_salt)
        try:
            await self.worker.submit(job, prompt, decodings, terms)
        except CapacityError:
            trouble = "prompt, latent steps and answer exceed the engine's cache"
            raise bad_request(f"messages: {trouble}", "messages", "context_length_exceeded") from None
        except VitalError as error:
            raise bad_request(f"messages: {error}", "messages") from None


def _texts(asked: ChatRequest) -> list[list[str]]:
    """[role, text, text, ...] of each message."""
    return [[message.role, *(part.text for part in message.parts() if part.text)] for message in asked.messages]


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Raises ApiError: not JSON by its header, too large, or cut short."""
    too_large = ApiError(413, f"the body exceeds this server's limit of {max_bytes:,} bytes", code="body_too_large")
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "expected Content-Type: application/json", code="unsupported_media_type")
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_bytes:
                raise too_large
    except ClientDisconnect:
        raise bad_request("the body ended early") from None
    return bytes(body)
