"""One thread owns the engine; everything else is asyncio.

Requests go to the thread as small commands that it runs between two steps; tokens come back in one call into the event
loop per step, for all requests together.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from vitalrt.engine.request import Decoding, Terms, Timings, Usage
from vitalrt.engine.scheduler import Engine
from vitalrt.engine.sequence import Sequence as Running
from vitalrt.errors import VitalError
from vitalrt.export.runtime import OnnxEngine
from vitalrt.inputs.prompt import Prompt
from vitalrt.serve.errors import ApiError, deadline_passed, place_of, queue_full

logger = logging.getLogger("vitalrt.serve")


@dataclass(frozen=True, eq=False)
class Finished:
    """reason: "stop", "length", "timeout", "abort" (nobody waits for it any more) or "error" (a step failed).

    has_started: its prefill has begun.  latents: [K, d] float32 on the CPU.
    time_to_first_token_s, total_s: since the request arrived; the first is None without a token.
    """

    reason: str
    has_started: bool
    usage: Usage
    timings: Timings
    latents: torch.Tensor
    time_to_first_token_s: float | None
    total_s: float


@dataclass(frozen=True, eq=False)
class Progress:
    """What one step brought to one choice.  logits: [vocab] float32 per token, where they were asked for."""

    index: int
    has_just_started: bool
    token_ids: list[int]
    logits: list[torch.Tensor]
    finished: Finished | None


@dataclass(frozen=True)
class Deadline:
    """at: on the event loop's clock, `seconds` after the request arrived."""

    at: float
    seconds: float

    @property
    def seconds_left(self) -> float:
        return max(0.0, self.at - asyncio.get_running_loop().time())

    def passed(self) -> ApiError:
        return deadline_passed(self.seconds)


class Job:
    """One HTTP request: choices that answer the same prompt. Lives on the event loop."""

    def __init__(self, num_choices: int, deadline: Deadline) -> None:
        self.num_choices = num_choices
        self.deadline = deadline
        self.num_waiting = num_choices
        self.arrived = time.perf_counter()
        self.updates: asyncio.Queue[Progress] = asyncio.Queue()


@dataclass(eq=False)
class _Choice:
    """A sequence in the engine, as the thread keeps it."""

    job: Job
    index: int
    sequence: Running
    has_started: bool = False
    num_reported: int = 0
    cancelled_as: str = "error"
    first_token_s: float | None = None

    def progress(self) -> Progress | None:
        """What is new since the last call, or None."""
        sequence = self.sequence
        has_just_started = not self.has_started and sequence.num_tokens > 0
        token_ids = sequence.token_ids[self.num_reported :]
        if not (has_just_started or token_ids or sequence.is_finished):
            return None
        self.has_started |= has_just_started
        self.num_reported += len(token_ids)
        if token_ids and self.first_token_s is None:
            self.first_token_s = time.perf_counter() - self.job.arrived
        logits, sequence.logits = sequence.logits, []  # a row is as wide as the vocabulary: not kept
        finished = self._finished() if sequence.is_finished else None
        return Progress(self.index, has_just_started, token_ids, logits, finished)

    def _finished(self) -> Finished:
        sequence = self.sequence
        reason = sequence.finish_reason or "error"
        return Finished(
            reason=self.cancelled_as if reason == "cancelled" else reason,
            has_started=self.has_started,
            usage=Usage(
                prompt_tokens=sequence.prompt.num_tokens,
                cached_tokens=sequence.cached_tokens,
                latent_steps=len(sequence.latents),
                completion_tokens=sequence.num_completion_tokens,
            ),
            timings=sequence.timings(),
            latents=torch.stack(sequence.latents).float().cpu() if sequence.latents else torch.empty(0, 0),
            time_to_first_token_s=self.first_token_s,
            total_s=time.perf_counter() - self.job.arrived,
        )


@dataclass
class _Mailbox:
    """What the event loop has asked of the thread. is_closing ends the thread once nothing runs."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    commands: list[Callable[[], None]] = field(default_factory=list)
    is_closing: bool = False


class Worker:
    """max_queue: choices that may wait for the engine; more are refused.  on_finish: called on the event loop, once for
    every choice that the engine ever took, whatever became of it."""

    def __init__(self, engine: Engine | OnnxEngine, max_queue: int, on_finish: Callable[[Finished], None]) -> None:
        self.engine = engine
        self.max_queue = max_queue
        self._on_finish = on_finish
        self._jobs: set[Job] = set()
        self._choices: list[_Choice] = []  # the thread's
        self._mailbox = _Mailbox()
        self._thread = threading.Thread(target=self._work, name="vitalrt-engine", daemon=True)

    def start(self) -> None:
        """Call on the event loop that will use it."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Cancel what still runs and end the thread."""
        for job in list(self._jobs):
            self.close(job)
        with self._mailbox.changed:
            self._mailbox.is_closing = True
            self._mailbox.changed.notify()
        await asyncio.to_thread(self._thread.join)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def num_waiting(self) -> int:
        """Choices whose prefill has not begun, those that are still being read and tokenized among them."""
        return sum(job.num_waiting for job in self._jobs)

    @property
    def num_running(self) -> int:
        return sum(choice.has_started and not choice.sequence.is_finished for choice in list(self._choices))

    def open(self, num_choices: int, deadline: Deadline) -> Job:
        """A place in the queue, until close().  Raises ApiError if it is full."""
        self.require_room(num_choices)
        job = Job(num_choices, deadline)
        self._jobs.add(job)
        return job

    def require_room(self, num_choices: int = 1) -> None:
        """Raises ApiError if the queue has no room for so many."""
        if self.num_waiting + num_choices > self.max_queue:
            raise queue_full(self.max_queue)

    async def submit(self, job: Job, prompt: Prompt, decodings: Sequence[Decoding], terms: Terms) -> None:
        """All choices or none.  Raises InputError or CapacityError."""
        done: Future[None] = Future()

        def submit() -> None:
            choices: list[_Choice] = []
            try:
                for index, decoding in enumerate(decodings):
                    choices.append(_Choice(job, index, self.engine.submit(prompt, decoding, terms)))
            except Exception as error:
                for choice in choices:
                    self.engine.cancel(choice.sequence)
                done.set_exception(error)
            else:
                self._choices += choices
                done.set_result(None)

        self._send(submit)
        # Shielded: a command that was sent is run; close(), which comes after it, takes the choices out again.
        await asyncio.shield(asyncio.wrap_future(done))

    def cancel(self, job: Job, index: int | None = None, reason: str = "abort") -> None:
        """Take one choice, or all of a job, out of the engine before its next step, which frees their pages."""

        def cancel() -> None:
            for choice in self._choices:
                if choice.job is job and index in (None, choice.index) and not choice.sequence.is_finished:
                    choice.cancelled_as = reason
                    self.engine.cancel(choice.sequence)

        self._send(cancel)

    def close(self, job: Job) -> None:
        """Give up the job's place, and cancel what is left of it. Does nothing the second time."""
        if job in self._jobs:
            self._jobs.discard(job)
            self.cancel(job)

    def _send(self, command: Callable[[], None]) -> None:
        with self._mailbox.changed:
            self._mailbox.commands.append(command)
            self._mailbox.changed.notify()

    def _work(self) -> None:
        mailbox = self._mailbox
        while True:
            with mailbox.changed:
                while not (mailbox.commands or self._choices or mailbox.is_closing):
                    mailbox.changed.wait()
                commands, mailbox.commands = mailbox.commands, []
            for command in commands:
                command()
            if self._choices:
                self._step()
            elif mailbox.is_closing:
                return

    def _step(self) -> None:
        try:
            self.engine.advance()
        except Exception as error:  # the engine has cancelled whoever was in that step; the others go on
            level = logging.WARNING if isinstance(error, VitalError) else logging.ERROR
            logger.log(level, "a step of the engine failed: %s", place_of(error))
        updates = [(choice.job, progress) for choice in self._choices if (progress := choice.progress()) is not None]
        self._choices = [choice for choice in self._choices if not choice.sequence.is_finished]
        if updates:
            self._loop.call_soon_threadsafe(self._deliver, updates)

    def _deliver(self, updates: list[tuple[Job, Progress]]) -> None:
        for job, progress in updates:
            if progress.has_just_started:
                job.num_waiting -= 1
            if progress.finished is not None:
                self._on_finish(progress.finished)
            job.updates.put_nowait(progress)
