"""vitalrt's own step and prefill as the benchmark drives them: one placed row, or many."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from bench.gpu.shapes import BenchPrompt
from vitalrt.engine.device_prefill import DevicePrefill, DeviceVision, Inputs
from vitalrt.engine.device_step import DeviceStep, StepWeights
from vitalrt.engine.graphs import StepGraphs, TokenReader, answer_alone
from vitalrt.model.qwen3_vl import Qwen3VL
from vitalrt.transfers import pinned
from vitalrt_kernels.gpu import overlap

PAGE = 16
ENDLESS = 2**30  # a limit that is never reached


class Ours:
    """name: as tables show it."""

    name = "vitalrt"

    def __init__(self, model: Qwen3VL, num_rows: int, row_tokens: int, weights: StepWeights | None = None) -> None:
        """row_tokens: how many tokens of cache each row has.  weights: of the step, if not the model's own."""
        self.config = model.config
        config, embed = model.config.decoder, model.decoder.embed.weight
        self.device = embed.device
        self.pages_per_row = -(-row_tokens // PAGE)
        num_slots = num_rows * self.pages_per_row * PAGE
        shape = (2, config.num_hidden_layers, num_slots, config.num_key_value_heads, config.head_dim)
        caches = torch.zeros(shape, device=self.device, dtype=embed.dtype)
        own = StepWeights(model.decoder)
        self.vision = DeviceVision(model.vision)
        self.prefill = DevicePrefill(own, *caches, PAGE, len(model.config.vision.deepstack_visual_indexes))
        self.step = DeviceStep(weights or own, *caches, PAGE, num_rows)
        self.graphs = StepGraphs(self.step)
        self.reader = TokenReader(self.step.rows.tokens)

    def begin(self, prompt: BenchPrompt, k: int = 0, row: int = 0) -> None:
        """Prefill and place; nothing waits for the device."""
        first = row * self.pages_per_row
        pages = pinned(torch.arange(first, first + self.pages_per_row, dtype=torch.int32), self.device)
        slots = torch.arange(first * PAGE, first * PAGE + prompt.num_tokens, device=self.device)
        # All of it first: a copy from pageable memory waits for what was started before it.
        ids, positions = prompt.ids.to(self.device), prompt.positions.to(self.device)
        image_rows = (prompt.ids == self.config.image_token_id).nonzero().flatten().to(self.device)
        tokens, *deepstack = self.vision(prompt.pixels, [prompt.grid])
        embeddings = self.step.weights.embed[ids].index_copy(0, image_rows, tokens)
        [hidden] = self.prefill.begin(Inputs(embeddings, positions, image_rows, deepstack), slots)
        self.step.place(row, hidden, prompt.num_tokens, prompt.next_position, pages, k, ENDLESS)

    def go_on(self, prompt: BenchPrompt, count: int) -> torch.Tensor:
        """What a later question is: `count` tokens of text after a prompt that row 0 was begun with. Returns [d]."""
        start = prompt.num_tokens
        x = self.step.weights.embed[prompt.ids[-1:].to(self.device).expand(count)]
        positions = (torch.arange(count) + prompt.next_position).expand(3, count).to(self.device)
        slots = torch.arange(start, start + count, device=self.device)
        pages = torch.arange(self.pages_per_row, dtype=torch.int32).expand(count, -1).contiguous()
        reach = torch.arange(start + 1, start + count + 1, dtype=torch.int32)
        return self.prefill.go_on(Inputs(x, positions), slots, pages, reach)[-1]

    def latent_steps(self, count: int) -> None:
        """Of row 0, which was begun with at least as many."""
        for _ in range(count):
            self.graphs.step(1, answers=False)

    def answer_tokens(self, count: int) -> None:
        for _ in range(count):
            self.graphs.step(1, answers=True)

    def two_rows(self) -> None:
        """One step of both, after which any of them may have answered."""
        self.graphs.step(2, answers=True)

    def request(self, prompt: BenchPrompt, k: int, num_tokens: int) -> list[int]:
        """From patches on the host to tokens on the host."""
        self.begin(prompt, k)
        return list(answer_alone(self.graphs, self.reader, k, num_tokens, ()))


@contextmanager
def launched_in_turn() -> Iterator[None]:
    """What is captured inside does not overlap."""
    with mock.patch.object(overlap, "can_overlap", lambda device: False):
        yield


class InTurn(Ours):
    """The same, each launch beginning when the one before it has ended: what overlapping them is worth."""

    name = "vitalrt, in turn"
    begin = launched_in_turn()(Ours.begin)
    go_on = launched_in_turn()(Ours.go_on)
    latent_steps = launched_in_turn()(Ours.latent_steps)
    answer_tokens = launched_in_turn()(Ours.answer_tokens)
    two_rows = launched_in_turn()(Ours.two_rows)
    request = launched_in_turn()(Ours.request)
