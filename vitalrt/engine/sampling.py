"""Logits to tokens.  B sequences."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vitalrt.engine.request import Decoding


def new_generator(decoding: Decoding) -> torch.Generator | None:
    """One generator per request, so that a request samples alike in any batch; None where it is greedy."""
    if decoding.temperature == 0.0:
        return None
    generator = torch.Generator()
    if decoding.seed is None:
        generator.seed()
    else:
        generator.manual_seed(decoding.seed)
    return generator


def choose_tokens(
    logits: torch.Tensor, decodings: Sequence[Decoding], generators: Sequence[torch.Generator | None]
) -> list[int]:
    """logits: [B, vocab].  One host synchronisation for the whole batch."""
    tokens: list[int] = logits.argmax(-1).tolist()
    for row, (decoding, generator) in enumerate(zip(decodings, generators, strict=True)):
        if generator is not None:
            tokens[row] = _sample(logits[row].float().cpu(), decoding, generator)
    return tokens


def _sample(logits: torch.Tensor, decoding: Decoding, generator: torch.Generator) -> int:
    """logits: [vocab] fp32.  Temperature, then top-k, then top-p (the smallest set whose mass reaches top_p)."""
    logits = (logits - logits.max()).double() / decoding.temperature  # at most 0: no temperature overflows
    ordered, tokens = logits.sort(descending=True)
    if decoding.top_k:
        ordered = ordered[: decoding.top_k]
    probabilities = ordered.softmax(-1)
    mass_before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(mass_before >= decoding.top_p, 0.0)
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])
