"""Exported graphs against the torch engine: the same prompts, K = 0..8, batches of 1 to 9."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from vitalrt.engine import int8
from vitalrt.engine.request import Decoding
from vitalrt.engine.sequence import Sequence as Running
from vitalrt.errors import VitalError
from vitalrt.inputs.prompt import Prompt

MAX_STEPS = 8
MAX_NEW_TOKENS = 8
# Relative error of a latent. Every step feeds rounding back, and on random prompts it may grow without that telling
# anything about the graphs: in fp32 the largest error counts, in lower precisions the median.
TOLERANCES = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 1e-1, "int8": int8.TOLERANCE}


class AnyEngine(Protocol):
    """Engine or OnnxEngine."""

    def submit(self, prompt: Prompt, decoding: Decoding) -> Running: ...
    def advance(self) -> None: ...


@dataclass(frozen=True)
class Verification:
    """answers: compared, of MAX_NEW_TOKENS tokens each.  same_answers: of them, token for token equal.

    same_tokens: the share of equal tokens, each counted up to the first that differs in its answer.
    latent_error, median_latent_error: the largest and the median ‖z_k - z_k'‖ / ‖z_k‖ over all steps.
    tolerance: in fp32 of the largest, else of the median.
    """

    answers: int
    same_answers: int
    same_tokens: float
    latent_error: float
    median_latent_error: float
    tolerance: float

    def __str__(self) -> str:
        tokens = f"{self.same_answers} of {self.answers} answers identical ({self.same_tokens:.1%} of tokens)"
        errors = f"relative error of latents {self.median_latent_error:.2g}, at most {self.latent_error:.2g}"
        return f"{tokens}, {errors} (tolerance {self.tolerance:g})"


def compare(
    reference: AnyEngine, exported: Sequence[AnyEngine], prompts: Sequence[Prompt], precision: str
) -> Verification:
    """exported: engines over the same graphs that drive them differently; each answers everything.

    Raises VitalError if latents are out of tolerance or not numbers, or in fp32 if any token differs.
    """
    answers = same_answers = tokens = same_tokens = 0
    errors: list[float] = []
    for batch, steps in batches(prompts):
        expected = _run(reference, batch, steps)
        for engine in exported:
            for ours, theirs in zip(expected, _run(engine, batch, steps), strict=True):
                answers += 1
                same_answers += ours.token_ids == theirs.token_ids
                tokens += len(ours.token_ids)
                same_tokens += _common_prefix(ours.token_ids, theirs.token_ids)
                errors += map(_relative, ours.latents, theirs.latents)
    largest, median = (float(value) for value in (torch.tensor(errors).max(), torch.tensor(errors).median()))
    result = Verification(answers, same_answers, same_tokens / tokens, largest, median, TOLERANCES[precision])
    # Torch's maximum and median of what contains a NaN are NaN, and NaN is within no tolerance.
    within = (largest if precision == "fp32" else median) <= result.tolerance
    if not within or (precision == "fp32" and same_answers < answers):
        raise VitalError(f"verify: the graphs disagree with torch: {result}")
    return result


def batches(prompts: Sequence[Prompt]) -> Iterator[tuple[list[Prompt], list[int]]]:
    """Every K from 0 to 8 in batches of 1 to 4, then all K side by side, as often as it takes to ask every prompt."""
    for k in range(MAX_STEPS + 1):
        batch = [prompts[(k + row) % len(prompts)] for row in range(k % 4 + 1)]
        yield batch, [k] * len(batch)
    steps = list(range(MAX_STEPS + 1))
    for first in range(0, len(prompts), len(steps)):
        yield [prompts[(first + k) % len(prompts)] for k in steps], steps


def _run(engine: AnyEngine, prompts: Sequence[Prompt], steps: Sequence[int]) -> list[Running]:
    running = [engine.submit(prompt, Decoding(k, MAX_NEW_TOKENS)) for prompt, k in zip(prompts, steps, strict=True)]
    while not all(sequence.is_finished for sequence in running):
        engine.advance()
    return running


def _common_prefix(ours: Sequence[int], theirs: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours))


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.float() - theirs).norm() / ours.float().norm())
