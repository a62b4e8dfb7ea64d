"""Runs as functions that return a frozen config."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from vitalrt.config import MAX_LATENT_STEPS
from vitalrt.errors import VitalError


@dataclass(frozen=True)
class Recipe:
    """A training run on phantoms from scratch: the vision tower on masks, then everything on written reasoning chains,
    then everything on answers with the latent loop.

    vision_steps, aloud_steps, steps: optimiser steps of the stages, each with its own warm-up and cosine decay.
    images_per_batch: fresh phantoms per step, each with all its questions.
    k_weights: how often a step uses k = 0, 1, 2, ... latent steps, so that one checkpoint serves every k.
    default_k: written to vital.json.  tokenizer_images: phantoms whose text the tokenizer is learnt from.
    checkpoint_every, validate_every: in steps.  threads: of torch on the CPU; sums, and so losses, depend on it.
    """

    seed: int
    vision_steps: int
    vision_images_per_batch: int
    vision_learning_rate: float
    aloud_steps: int
    steps: int
    images_per_batch: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    k_weights: tuple[float, ...]
    default_k: int
    vocab_size: int
    tokenizer_images: int
    validation_images: int
    checkpoint_every: int
    validate_every: int
    threads: int

    def __post_init__(self) -> None:
        for name in (
            "vision_steps",
            "vision_images_per_batch",
            "steps",
            "images_per_batch",
            "checkpoint_every",
            "validate_every",
            "threads",
            "tokenizer_images",
        ):
            if getattr(self, name) < 1:
                raise VitalError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 1 <= len(self.k_weights) <= MAX_LATENT_STEPS + 1 or sum(self.k_weights) <= 0 or min(self.k_weights) < 0:
            raise VitalError(f"k_weights: expected non-negative weights for k = 0, 1, ..., got {self.k_weights}")

    def with_settings(self, settings: dict[str, str]) -> Recipe:
        """Values given as text, e.g. {"steps": "100"}.  Raises VitalError on unknown names and bad values."""
        changes: dict[str, Any] = {}
        for name, text in settings.items():
            if name not in {f.name for f in fields(self)}:
                raise VitalError(f"--set: unknown setting {name!r}; expected one of {[f.name for f in fields(self)]}")
            current = getattr(self, name)
            try:
                if isinstance(current, tuple):
                    changes[name] = tuple(float(part) for part in text.split(","))
                else:
                    changes[name] = type(current)(text)
            except ValueError as error:
                raise VitalError(f"--set: {name}: expected {type(current).__name__}, got {text!r}") from error
        return replace(self, **changes)


def phantom() -> Recipe:
    """The bundled checkpoint: about an hour on two CPU cores."""
    return Recipe(
        seed=0,
        vision_steps=200,
        vision_images_per_batch=48,
        vision_learning_rate=2e-3,
        aloud_steps=600,
        steps=1200,
        images_per_batch=16,
        learning_rate=1e-3,
        warmup_steps=100,
        weight_decay=0.05,
        max_grad_norm=1.0,
        k_weights=(1.0, 1.0, 1.0, 1.0, 4.0),
        default_k=4,
        vocab_size=640,
        tokenizer_images=1500,
        validation_images=64,
        checkpoint_every=100,
        validate_every=200,
        threads=1,
    )


RECIPES = {"phantom": phantom}
