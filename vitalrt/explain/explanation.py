"""What `Model.explain` returns. K latent steps, R, C rows and columns of the encoder's patches."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitalrt.engine.request import RESEARCH_NOTICE, Answer
from vitalrt.explain.page import write_page
from vitalrt.explain.roi_index import Neighbour

NOTICE = (
    f"{RESEARCH_NOTICE} What is shown was read from the latents afterwards, by modules that the answer does not depend"
    " on: it is not a faithful trace of how the answer came about."
)


@dataclass(frozen=True, eq=False)
class Step:
    """What z_k shows.

    text: what the text decoder reads from it, with text_probability, the product over its tokens; None where there are
    no words to be had.
    heatmaps: of each picture, float32 [R, C], the cosine of every patch with the projected latent; patches are 1/R of
    the picture's height and 1/C of its width.  Empty where there are no pictures to be had.
    neighbours: regions of the training set most like the projected latent, the likest first.
    """

    text: str | None
    text_probability: float | None
    heatmaps: tuple[torch.Tensor, ...]
    neighbours: tuple[Neighbour, ...]

    @property
    def heatmap(self) -> torch.Tensor | None:
        """Of the only picture, or the first of several."""
        return self.heatmaps[0] if self.heatmaps else None


@dataclass(frozen=True, eq=False)
class Explanation:
    """An answer, and what can be read from the latents that led to it; str() is the answer's text.

    steps: one for each latent.  pictures: uint8 RGB [H, W, 3], as they were asked about.
    missing: what could not be shown ("words", "pictures", "neighbours"), and why.
    provenance: the model's, as its vital.json tells it.
    Research use only, not for clinical decisions.
    """

    question: str
    answer: Answer
    steps: tuple[Step, ...]
    pictures: tuple[np.ndarray, ...]
    missing: Mapping[str, str]
    provenance: str = ""
    notice: str = NOTICE

    def __str__(self) -> str:
        return self.answer.text

    def save(self, path: str | os.PathLike[str]) -> Path:
        """A page of its own, which needs no other file; it replaces `path` whole or not at all.

        It holds the pictures, the question and the answer: it is as confidential as they are.  Raises VitalError where
        it cannot be written.
        """
        return write_page(self, path)

    def as_dict(self) -> dict[str, Any]:
        """What it adds to the answer, for JSON; without pictures."""
        return {
            "steps": [
                {
                    "text": step.text,
                    "text_probability": step.text_probability,
                    "heatmaps": [heatmap.tolist() for heatmap in step.heatmaps],
                    "neighbours": [asdict(neighbour) for neighbour in step.neighbours],
                }
                for step in self.steps
            ],
            "missing": dict(self.missing),
            "notice": self.notice,
        }
