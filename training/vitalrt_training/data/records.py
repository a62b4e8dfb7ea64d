"""What passes between the parts of the phantom generator, and on to training: Target, Phantom, Sample."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Target:
    """One organ or lesion. type: "organ" or "lesion"; mask: bool [H, W], of the whole thing even where another one
    lies inside it."""

    name: str
    type: str
    mask: np.ndarray


@dataclass(frozen=True)
class Phantom:
    """image: uint8 [H, W, 3]; layout: "spread" or "nested", see scene.compose_scene."""

    image: np.ndarray
    modality: str
    targets: tuple[Target, ...]
    layout: str
    split: str
    seed: int
    index: int


@dataclass(frozen=True)
class Sample:
    """One question about a phantom, its answer and the reasoning steps that lead there. closed: answers are compared
    word for word; an open answer is a sentence."""

    question: str
    answer: str
    question_type: str
    target_name: str
    target_type: str
    chain: tuple[str, ...]
    closed: bool

    @property
    def num_steps(self) -> int:
        """K, the number of latent steps this sample asks for."""
        return len(self.chain)


def make_rng(split: str, seed: int, index: int, stream: int) -> np.random.Generator:
    """A generator of its own for every (split, seed, index, stream). stream 0 draws images, 1 chooses questions."""
    return np.random.default_rng(np.random.SeedSequence((SPLITS.index(split), seed, index, stream)))
