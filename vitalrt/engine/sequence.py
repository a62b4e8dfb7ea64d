"""One request while it is in the engine.

T prompt tokens, K latent steps, d width.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Collection
from collections.abc import Sequence as Many
from typing import NamedTuple

import torch

from vitalrt.engine.feature_cache import VisionFeatures
from vitalrt.engine.prefix_cache import PrefixKey
from vitalrt.engine.request import Decoding, Terms, Timings
from vitalrt.engine.sampling import new_generator
from vitalrt.inputs.prompt import Picture, Prompt

_arrivals = itertools.count()


class Rank(NamedTuple):
    """Who goes first: the lowest. Priority, then what must be done earliest, then what came first."""

    priority: int
    deadline: float
    arrival: int


class Image:
    """One image of a prompt.  key: what its features are cached by.  Its tokens are start..stop - 1 of the prompt.

    features: kept from when the tower has run until the prompt is in the cache.
    """

    def __init__(self, key: bytes, picture: Picture, start: int, stop: int) -> None:
        self.key, self.picture, self.start, self.stop = key, picture, start, stop
        self.features: VisionFeatures | None = None


class Sequence:
    """waiting -> prefilling -> running (latent phase, then answer phase) -> finished, owned and changed by the engine.

    What it is fed, in order: its T prompt tokens, z_0 .. z_{K-1}, its answer's tokens. A preempted one waits again and
    is fed all of that anew, in one pass, save what the prefix cache still holds: thoughts and tokens are kept, not
    thought or sampled again.

    num_tokens: how many of its inputs are in the cache.  pages, slots [len(pages) * page_size] int64: where they are.
    thoughts: z_0, z_1, .. so far, each [d], given or its own.  cached_tokens: prompt tokens found in the prefix cache.
    key: its prompt and K latents as the prefix cache knows them; None where nothing is shared.
    """

    def __init__(
        self,
        prompt: Prompt,
        positions: torch.Tensor,
        next_position: int,
        decoding: Decoding,
        terms: Terms | None = None,
        key: PrefixKey | None = None,
        images: Many[Image] = (),
        given: Many[torch.Tensor] = (),
    ) -> None:
        """positions: [3, T] M-RoPE positions of the prompt.  next_position: of what follows it.

        given: z_1, z_2, .., at most K of them, to be taken for its own; it thinks on from there.
        """
        self.prompt = prompt
        self.positions = positions
        self.next_position = next_position
        self.decoding = decoding
        self.key = key
        self.images = images
        self.given = given
        self.generator = new_generator(decoding)
        self.num_tokens = 0
        self.pages: list[int] = []
        self.slots = torch.empty(0, dtype=torch.int64)
        self.thoughts: list[torch.Tensor] = []
        self.token_ids: list[int] = []
        self.logits: list[torch.Tensor] = []
        self.finish_reason: str | None = None
        self.num_completion_tokens = 0
        self.cached_tokens = 0
        self.num_preemptions = 0
        self._began: dict[str, float] = {}  # its phases, each when it first began
        self._submitted = self._finished = time.perf_counter()
        terms = terms or Terms()
        deadline = math.inf if terms.timeout_s is None else self._submitted + terms.timeout_s
        self.rank = Rank(terms.priority, deadline, next(_arrivals))

    @property
    def capacity(self) -> int:
        """Tokens it may come to hold: prompt, latents, and every answer token but the last, which is never fed back."""
        return self.prompt.num_tokens + self.decoding.k + self.decoding.max_new_tokens - 1

    @property
    def num_known(self) -> int:
        """Of its inputs, those that are known by now; the next one follows from the hidden state that these give."""
        return self.prompt.num_tokens + min(len(self.thoughts), self.decoding.k) + len(self.token_ids)

    @property
    def num_foreseen(self) -> int:
        """Its inputs that are known, and given thoughts, which are as soon as the prompt has been fed."""
        return max(self.num_known, self.prompt.num_tokens + len(self.given))

    @property
    def is_behind(self) -> bool:
        """Whether thoughts that were given are yet to be fed, so that it cannot go on from the newest."""
        return self.num_tokens - self.prompt.num_tokens < len(self.thoughts) - 1

    @property
    def position(self) -> int:
        """M-RoPE position, on all three axes, of the next input after the prompt."""
        return self.next_position + self.num_tokens - self.prompt.num_tokens

    @property
    def latents(self) -> list[torch.Tensor]:
        """z_1 .. so far."""
        return self.thoughts[1:]

    @property
    def num_latents_left(self) -> int:
        """Latent steps to go."""
        return max(0, 1 + self.decoding.k - len(self.thoughts))

    @property
    def is_thinking(self) -> bool:
        return self.num_latents_left > 0

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def is_overdue(self) -> bool:
        return time.perf_counter() > self.rank.deadline

    def whole_key(self) -> PrefixKey | None:
        """Of all inputs that are known or will be: prompt, K latents, the answer so far."""
        return self.key.then_tokens(self.token_ids) if self.key is not None and self.token_ids else self.key

    def token_range(self, start: int, stop: int) -> torch.Tensor:
        """Ids of inputs start .. stop - 1, [stop - start] int64; latent ones, which have none, are 0."""
        length, k = self.prompt.num_tokens, self.decoding.k
        if stop <= length:
            return self.prompt.input_ids[start:stop]
        ids = torch.cat((self.prompt.input_ids, torch.tensor([0] * k + self.token_ids, dtype=torch.int64)))
        return ids[start:stop]

    def position_range(self, start: int, stop: int) -> torch.Tensor:
        """M-RoPE positions of inputs start .. stop - 1, [3, stop - start] int64."""
        length = self.prompt.num_tokens
        after = torch.arange(max(start, length) - length, max(stop, length) - length) + self.next_position
        return torch.cat((self.positions[:, start:stop], after.expand(3, -1)), dim=1)

    def place(self, pages: list[int], slots: torch.Tensor) -> None:
        """More pages, after those it has."""
        self.slots = torch.cat((self.slots, slots)) if self.pages else slots
        self.pages = self.pages + pages

    def take_pages(self) -> list[int]:
        """Its pages, which it has no longer; what it was fed is no longer in the cache."""
        pages, self.pages = self.pages, []
        self.slots = self.slots[:0]
        self.num_tokens = 0
        return pages

    def take_in(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [d], what its last known input gave.  Returns the hidden state to go on from.

        A state that was thought before and has been computed once more is not the one to go on from: the old one is.
        After z_0 come the thoughts that were given, which are then known inputs like those of a preempted one.
        """
        if self.token_ids:
            return hidden
        if self.num_tokens - self.prompt.num_tokens >= len(self.thoughts):
            self.thoughts.append(hidden)
            if len(self.thoughts) == 1:
                self.thoughts += self.given
        return self.thoughts[-1]

    def say(self, token: int, stop_ids: Collection[int]) -> None:
        """token: the next of its answer, which may be its last."""
        self.num_completion_tokens += 1
        if token in stop_ids:
            self.finish("stop")
            return
        self.token_ids.append(token)
        if self.num_completion_tokens == self.decoding.max_new_tokens:
            self.finish("length")

    def mark(self, phase: str) -> None:
        """phase: "prefill", "latent" or "decode", which begins now unless it had begun before a preemption."""
        self._began.setdefault(phase, time.perf_counter())

    def finish(self, reason: str) -> None:
        """reason: "stop", "length", "timeout" or "cancelled"."""
        self.finish_reason = reason
        self._finished = time.perf_counter()

    def timings(self) -> Timings:
        decode = self._began.get("decode", self._finished)
        latent = self._began.get("latent", decode)
        prefill = self._began.get("prefill", latent)
        preprocess = self.prompt.preprocess_ms
        return Timings(
            preprocess=preprocess,
            prefill=(latent - prefill) * 1000,
            latent=(decode - latent) * 1000,
            decode=(self._finished - decode) * 1000,
            total=preprocess + (self._finished - self._submitted) * 1000,
        )
