"""One request while it is in the engine."""

from __future__ import annotations

import time

import torch

from vitalrt.engine.request import Decoding, Timings
from vitalrt.engine.sampling import new_generator
from vitalrt.inputs.prompt import Prompt


class Sequence:
    """waiting -> running (latent phase, then answer phase) -> finished, owned and changed by the engine alone.

    num_tokens: how many tokens of it are in the cache.  position: the next M-RoPE position.
    slots: [capacity] int64, where each of its tokens goes; None unless running.
    latents: z_1.. so far, each [d].  hidden is kept by the running batch, not here.
    """

    def __init__(self, prompt: Prompt, positions: torch.Tensor, next_position: int, decoding: Decoding) -> None:
        self.prompt = prompt
        self.positions = positions
        self.position = next_position
        self.decoding = decoding
        self.generator = new_generator(decoding)
        self.num_tokens = 0
        self.pages: list[int] = []
        self.slots: torch.Tensor | None = None
        self.latents: list[torch.Tensor] = []
        self.token_ids: list[int] = []
        self.logits: list[torch.Tensor] = []
        self.finish_reason: str | None = None
        self.num_completion_tokens = 0
        self._submitted = self._prefilling = self._thinking = self._answering = self._finished = time.perf_counter()

    @property
    def capacity(self) -> int:
        """Tokens it may come to hold: prompt, latents, and every answer token but the last, which is never fed back."""
        return self.prompt.num_tokens + self.decoding.k + self.decoding.max_new_tokens - 1

    @property
    def is_thinking(self) -> bool:
        return len(self.latents) < self.decoding.k

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    def mark_prefilling(self) -> None:
        self._prefilling = time.perf_counter()

    def mark_thinking(self) -> None:
        self._thinking = self._answering = time.perf_counter()

    def mark_answering(self) -> None:
        self._answering = time.perf_counter()

    def finish(self, reason: str) -> None:
        """reason: "stop", "length" or "cancelled"."""
        self.finish_reason = reason
        self._finished = time.perf_counter()

    def timings(self) -> Timings:
        preprocess = self.prompt.preprocess_ms
        return Timings(
            preprocess=preprocess,
            prefill=(self._thinking - self._prefilling) * 1000,
            latent=(self._answering - self._thinking) * 1000,
            decode=(self._finished - self._answering) * 1000,
            total=preprocess + (self._finished - self._submitted) * 1000,
        )
