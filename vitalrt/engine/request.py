"""What goes into the engine and what comes out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from vitalrt.config import MAX_LATENT_STEPS
from vitalrt.errors import VitalError
from vitalrt.inputs.image import ReadOptions

RESEARCH_NOTICE = "Research use only, not for clinical decisions."


@dataclass(frozen=True)
class Decoding:
    """How one answer is made.  k: latent steps.  temperature 0 is greedy.  top_p, top_k: 1.0 and 0 keep every token.

    seed: makes sampling repeatable, whatever else is in the batch.  Raises VitalError on values out of range.
    """

    k: int
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    return_logits: bool = False

    def __post_init__(self) -> None:
        _check_int("k", self.k, 0, MAX_LATENT_STEPS)
        _check_int("max_new_tokens", self.max_new_tokens, 1, 2**31)
        _check_int("top_k", self.top_k, 0, 2**31)
        _check_number("temperature", self.temperature, 0.0, 100.0)
        _check_number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise VitalError("top_p: expected a number above 0, got 0")
        if self.seed is not None:
            _check_int("seed", self.seed, 0, 2**63 - 1)


@dataclass(frozen=True)
class Terms:
    """On what terms a request waits and runs, whatever its answer.

    priority: lower goes first, and takes its place from who has less of it if need be.  timeout_s: from when it was
    submitted; an answer that is not whole by then ends with what there is, finish_reason "timeout"; of equal priority,
    who must be done earlier goes first.  cache_salt: requests share cached prefixes and images only with the same salt
    (one tenant's).  Raises VitalError on values out of range.
    """

    priority: int = 0
    timeout_s: float | None = None
    cache_salt: str | None = None

    def __post_init__(self) -> None:
        _check_int("priority", self.priority, -(2**31), 2**31 - 1)
        if self.timeout_s is not None:
            _check_number("timeout_s", self.timeout_s, 0.0, 1e9)
        if self.cache_salt is not None and not isinstance(self.cache_salt, str):
            raise VitalError(f"cache_salt: expected text or None, got {type(self.cache_salt).__name__}")


@dataclass(frozen=True)
class Request:
    """One question about one image (or a list of images, or None); see Model.generate and Terms for the arguments."""

    image: Any
    question: str
    k: int | None = None
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    read: ReadOptions = field(default_factory=ReadOptions)
    terms: Terms = field(default_factory=Terms)


@dataclass(frozen=True)
class Usage:
    """Tokens of one request. completion_tokens counts the end token where the model wrote one.

    cached_tokens: of the prompt's, those whose keys and values another request had left in the cache.
    """

    prompt_tokens: int
    cached_tokens: int
    latent_steps: int
    completion_tokens: int


@dataclass(frozen=True)
class Timings:
    """Milliseconds of one request; in a batch, of wall time that it shared. total includes waiting."""

    preprocess: float
    prefill: float
    latent: float
    decode: float
    total: float


@dataclass(frozen=True, eq=False)
class Answer:
    """str(answer) is its text.

    token_ids: without the end token.  finish_reason: "stop", "length", or "timeout" under terms with a time limit.
    latents: z_1..z_K, [K, d] float32 on the CPU.
    logits: [completion_tokens, vocab] float32 on the CPU, the end token's included; None unless asked for.
    Research use only, not for clinical decisions.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    latents: torch.Tensor
    usage: Usage
    timings: Timings
    logits: torch.Tensor | None = None
    notice: str = RESEARCH_NOTICE

    def __str__(self) -> str:
        return self.text


def _check_int(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        limit = f"{low}..{high}" if high < 2**31 else f"at least {low}"
        raise VitalError(f"{name}: expected an int, {limit}, got {value!r}")


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:
        raise VitalError(f"{name}: expected a number, {low}..{high}, got {value!r}")
