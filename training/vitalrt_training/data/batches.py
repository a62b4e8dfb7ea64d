"""Phantoms to tensors. Batch i of a run is a function of (seed, i) alone, so a resumed run sees the same data.

N samples, T prefix tokens, A answer tokens, I images, P patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from vitalrt.config import ModelConfig
from vitalrt.inputs.processor import Processor, patchify
from vitalrt.model.rope import Grid, mrope_positions
from vitalrt_training.data.phantom import Phantom, Sample, ask, draw_phantom


@dataclass(frozen=True)
class Batch:
    """input_ids, attention_mask: [N, T], left-padded.  position_ids: [3, N, T].  next_position: [N].

    answer_ids: [N, A], the end token included, right-padded with -100.
    pixel_values: [P, patch_dim].  image_grid_thw: [I, 3].  image_of_sample: N indices into the I images.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    next_position: torch.Tensor
    answer_ids: torch.Tensor
    pixel_values: torch.Tensor
    image_grid_thw: torch.Tensor
    image_of_sample: list[int]


class PhantomBatches:
    """Training batches of `images_per_batch` fresh phantoms with all their questions."""

    def __init__(self, directory: Path, seed: int, images_per_batch: int) -> None:
        """directory: tokenizer, preprocessor and config files of the model being trained."""
        self.processor = Processor(directory)
        self.config = ModelConfig.from_directory(directory)
        self.seed = seed
        self.images_per_batch = images_per_batch
        self._prompt = lru_cache(maxsize=65536)(self._tokenize)

    def draw(self, index: int) -> Batch:
        first = index * self.images_per_batch
        phantoms = [draw_phantom("train", self.seed, first + i) for i in range(self.images_per_batch)]
        return self.collate([(phantom, ask(phantom)) for phantom in phantoms])

    def collate(self, asked: Sequence[tuple[Phantom, Sequence[Sample]]]) -> Batch:
        patches, grids, prompts, answers, image_of_sample = [], [], [], [], []
        for image, (phantom, samples) in enumerate(asked):
            values, grid = patchify(phantom.image, self.processor.patch_options)
            patches.append(values)
            grids.append(grid)
            for sample in samples:
                prompts.append(self._prompt(sample.question, grid))
                answers.append(self._answer(sample.answer))
                image_of_sample.append(image)
        longest = max(len(ids) for ids, _, _ in prompts)
        pad = self.processor.tokenizer.pad_token_id
        input_ids = torch.full((len(prompts), longest), pad)
        attention_mask = torch.zeros_like(input_ids)
        position_ids = torch.zeros(3, len(prompts), longest, dtype=torch.int64)
        answer_ids = torch.full((len(prompts), max(map(len, answers))), -100)
        for row, ((ids, positions, _), answer) in enumerate(zip(prompts, answers, strict=True)):
            input_ids[row, longest - len(ids) :] = ids
            attention_mask[row, longest - len(ids) :] = 1
            position_ids[:, row, longest - len(ids) :] = positions
            answer_ids[row, : len(answer)] = torch.tensor(answer)
        return Batch(
            input_ids,
            attention_mask,
            position_ids,
            torch.tensor([following for _, _, following in prompts]),
            answer_ids,
            torch.from_numpy(np.concatenate(patches)),
            torch.tensor(grids),
            image_of_sample,
        )

    def _tokenize(self, question: str, grid: Grid) -> tuple[torch.Tensor, torch.Tensor, int]:
        ids = torch.tensor(self.processor.tokenize(question, [grid]))
        return ids, *mrope_positions(ids, [grid], self.config)

    def _answer(self, answer: str) -> list[int]:
        tokenizer = self.processor.tokenizer
        return tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]
