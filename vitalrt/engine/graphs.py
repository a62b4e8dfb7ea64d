"""Steps captured in CUDA graphs, and their tokens read by the host without holding up the device.

A step is a few hundred launches of some microseconds each: called from Python, most of its time would be the host's.
Captured once, it is one call. Without CUDA the very same functions are called as they are.
"""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterator
from typing import NamedTuple

import torch

from vitalrt.engine.device_step import DeviceStep

MODE = "thread_local"  # what other threads do meanwhile (a server reads images) is no part of a capture


class _Means(NamedTuple):
    """stream: that captures.  dry_run_stream: that runs before.  first: a graph, whose pool of memory is everybody's.
    lock: one thread at a time.

    All graphs of a device share these: they are replayed one after the other. cuBLAS keeps a workspace for each stream,
    allocated where it is first called, and graphs hold its address: with a stream that only captures, it lies in their
    pool, which the first graph keeps alive.
    """

    stream: torch.cuda.Stream
    dry_run_stream: torch.cuda.Stream
    first: torch.cuda.CUDAGraph
    lock: threading.Lock


@functools.cache
def _means_of(device: torch.device) -> _Means:
    stream, first = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    with torch.cuda.graph(first, stream=stream, capture_error_mode=MODE):
        torch.zeros(1, device=device)
    return _Means(stream, torch.cuda.Stream(device), first, threading.Lock())


class Graphs:
    """Functions of no argument, each captured when it is first called and replayed from then on.

    A function works on tensors that stay where they are, and nothing it allocates may be used after it: all share one
    pool of memory. Its dry run compiles kernels and must leave no trace.
    """

    def __init__(self, device: torch.device) -> None:
        self.is_captured = device.type == "cuda"
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._means = _means_of(device) if self.is_captured else None

    def __call__(self, key: Hashable, function: Callable[[], None], dry_run: Callable[[], None]) -> None:
        """dry_run: calls function without consequences."""
        if not self.is_captured:
            function()
            return
        self.prepare(key, function, dry_run)
        self._graphs[key].replay()

    def prepare(self, key: Hashable, function: Callable[[], None], dry_run: Callable[[], None]) -> None:
        """So that a later call does not have to wait for the capture."""
        if self.is_captured and key not in self._graphs:
            self._graphs[key] = self._capture(function, dry_run)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._graphs

    def drop(self, key: Hashable) -> None:
        del self._graphs[key]

    def _capture(self, function: Callable[[], None], dry_run: Callable[[], None]) -> torch.cuda.CUDAGraph:
        assert self._means is not None
        stream, dry_run_stream, first, lock = self._means
        caller = torch.cuda.current_stream()
        graph = torch.cuda.CUDAGraph()
        with lock:
            dry_run_stream.wait_stream(caller)
            with torch.cuda.stream(dry_run_stream):
                dry_run()
            caller.wait_stream(dry_run_stream)
            try:
                with torch.cuda.graph(graph, pool=first.pool(), stream=stream, capture_error_mode=MODE):
                    function()
            except BaseException:
                torch.cuda.set_stream(caller)  # which torch leaves behind where the end of a capture fails
                raise
        return graph


class StepGraphs:
    """A DeviceStep, by number of rows, kind and splits of contexts; a lone row's whole thinking is one graph."""

    def __init__(self, device_step: DeviceStep) -> None:
        self.device_step = device_step
        self._graphs = Graphs(device_step.k_cache.device)

    def step(self, num_rows: int, answers: bool) -> None:
        """As DeviceStep.step, of the next larger number of rows that is captured: 1, 2, 4, 8, .. max_batch.

        The first of a kind is captured for all numbers of splits: no answer is to stop where it gets long.
        """
        num_captured = min(1 << (num_rows - 1).bit_length(), self.device_step.max_batch)
        key, *functions = self._step_of(num_captured, answers, self.device_step.splits(num_captured))
        if key not in self._graphs:
            for splits in self.device_step.all_splits(num_captured):
                self._graphs.prepare(*self._step_of(num_captured, answers, splits))
        self._graphs(key, *functions)
        self.device_step.has_stepped(num_captured)

    def think(self, k: int) -> None:
        """As DeviceStep.think."""
        splits = self.device_step.splits(1, k)

        def think() -> None:
            self.device_step.think(k, splits)

        self._graphs(("think", k, splits), think, self._while_idle(think))
        self.device_step.has_stepped(1, k)

    def _step_of(
        self, num_rows: int, answers: bool, splits: int
    ) -> tuple[Hashable, Callable[[], None], Callable[[], None]]:
        """As Graphs takes it."""

        def step() -> None:
            self.device_step.step(num_rows, answers, splits)

        return ("step", num_rows, answers, splits), step, self._while_idle(step)

    def _while_idle(self, function: Callable[[], None]) -> Callable[[], None]:
        """The function, but all rows are idle, so that no slot is written, and are afterwards as they were."""

        def dry_run() -> None:
            kept = [tensor.clone() for tensor in self.device_step.rows]
            self.device_step.rows.limits.zero_()
            function()
            for tensor, value in zip(self.device_step.rows, kept, strict=True):
                tensor.copy_(value)

        return dry_run


class TokenReader:
    """Tokens on their way to the host. post() follows each step; take() waits for the oldest, not for what came after.

    The copies land in pinned memory and have an event each, so steps may be queued ahead while tokens are looked at.
    """

    def __init__(self, tokens: torch.Tensor, depth: int = 4) -> None:
        """tokens: [B] int64, which every step overwrites.  depth: how many may be on their way."""
        self._tokens = tokens
        self._is_cuda = tokens.device.type == "cuda"
        self._buffers = torch.empty(depth, len(tokens), dtype=torch.int64, pin_memory=self._is_cuda)
        self._on_their_way: deque[tuple[int, torch.cuda.Event | None]] = deque()
        self._next = 0

    def post(self) -> None:
        if len(self._on_their_way) == len(self._buffers):
            raise RuntimeError(f"expected at most {len(self._buffers)} posts that are not taken, got one more")
        self._buffers[self._next].copy_(self._tokens, non_blocking=True)
        event = None
        if self._is_cuda:
            event = torch.cuda.Event()
            event.record()
        self._on_their_way.append((self._next, event))
        self._next = (self._next + 1) % len(self._buffers)

    def take(self) -> list[int]:
        """[B], of the oldest post."""
        buffer, event = self._on_their_way.popleft()
        if event is not None:
            event.synchronize()
        tokens: list[int] = self._buffers[buffer].tolist()
        return tokens

    def drop(self) -> None:
        """Forget what is on its way. It still arrives, in order, before anything that is posted later."""
        self._on_their_way.clear()


def answer_alone(
    graphs: StepGraphs, reader: TokenReader, k: int, max_new_tokens: int, stop_ids: Collection[int]
) -> Iterator[int]:
    """Tokens of the sequence that was placed in row 0, alone, the stop token included; k as it was placed with.

    One step is always queued ahead of the token that the host looks at: after a stop token the device does one step of
    an idle row for nothing, and never waits for the host. A caller who does not exhaust this closes it.
    """
    if k:
        graphs.think(k)
    reader.post()
    num_posted = 1
    try:
        for num_taken in range(1, max_new_tokens + 1):
            if num_posted < max_new_tokens:
                graphs.step(1, answers=True)
                reader.post()
                num_posted += 1
            token = reader.take()[0]
            yield token
            if token in stop_ids or num_taken == max_new_tokens:
                return
    finally:
        graphs.device_step.clear(0)
        reader.drop()
