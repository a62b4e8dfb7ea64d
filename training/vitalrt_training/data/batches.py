"""Phantoms to tensors. Batch i of a run is a function of (seed, i) alone, so a resumed run sees the same data.

G groups (questions about the same images), N samples, P prefix tokens, Q question tokens, A answer tokens, I images.
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
from vitalrt_training.data.records import make_rng
from vitalrt_training.data.scene_captions import CAPTION_STREAM, REQUEST, describe_scene
from vitalrt_training.losses import IGNORED


@dataclass(frozen=True)
class Tokens:
    """R rows of tokens, padded on either side.  ids, mask: [R, T], mask 0 where padded.  positions: [3, R, T]."""

    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor

    @classmethod
    def pad_left(cls, rows: Sequence[tuple[torch.Tensor, torch.Tensor]], pad_id: int) -> Tokens:
        """rows: (ids [T], positions [3, T]) of each prompt."""
        longest = max(len(ids) for ids, _ in rows)
        padded = cls(
            torch.full((len(rows), longest), pad_id),
            torch.zeros(len(rows), longest, dtype=torch.int64),
            torch.zeros(3, len(rows), longest, dtype=torch.int64),
        )
        for row, (ids, positions) in enumerate(rows):
            padded.ids[row, longest - len(ids) :] = ids
            padded.mask[row, longest - len(ids) :] = 1
            padded.positions[:, row, longest - len(ids) :] = positions
        return padded


@dataclass(frozen=True)
class Batch:
    """prefix: [G, P], up to and with the images, which all questions of a group share: computed once per group.

    question: [N, Q], the rest of the prompt.  group_of_sample: [N].  next_position: [N], of what follows the prompt.
    answer_ids: [N, A], the end token included, IGNORED where padded (on the right).
    pixel_values: [patches, patch_dim] and image_grid_thw: [I, 3], in the order of the groups.
    """

    prefix: Tokens
    question: Tokens
    group_of_sample: torch.Tensor
    next_position: torch.Tensor
    answer_ids: torch.Tensor
    pixel_values: torch.Tensor
    image_grid_thw: torch.Tensor

    @property
    def num_samples(self) -> int:
        return len(self.answer_ids)


@dataclass(frozen=True)
class Asked:
    """Pictures (uint8 [H, W, 3]) and the questions about them together, each with the answer to be learnt."""

    pictures: Sequence[np.ndarray]
    questions: Sequence[tuple[str, str]]


class Collator:
    """Questions about pictures to a Batch, in the way of one checkpoint directory."""

    def __init__(self, directory: Path) -> None:
        """directory: tokenizer, preprocessor and config files of the model being trained."""
        self.processor = Processor(directory)
        self.config = ModelConfig.from_directory(directory)
        self._prompt = lru_cache(maxsize=65536)(self._tokenize)

    def collate(self, asked: Sequence[Asked]) -> Batch:
        """One group per entry; every entry has at least one picture and one question."""
        patches, answers, following, group_of_sample = [], [], [], []
        grids: list[Grid] = []
        prefixes: list[tuple[torch.Tensor, torch.Tensor]] = []
        questions: list[tuple[torch.Tensor, torch.Tensor]] = []
        for group, one in enumerate(asked):
            found = [patchify(picture, self.processor.patch_options) for picture in one.pictures]
            patches += [values for values, _ in found]
            own_grids = tuple(grid for _, grid in found)
            grids += own_grids
            for question, answer in one.questions:
                ids, positions, next_position = self._prompt(question, own_grids)
                shared = int((ids == self.config.image_token_id).nonzero()[-1]) + 1
                if len(prefixes) == group:
                    prefixes.append((ids[:shared], positions[:, :shared]))
                questions.append((ids[shared:], positions[:, shared:]))
                answers.append(self.processor.tokenizer(answer)["input_ids"] + [self.processor.tokenizer.eos_token_id])
                following.append(next_position)
                group_of_sample.append(group)
        pad_id = self.processor.tokenizer.pad_token_id
        return Batch(
            Tokens.pad_left(prefixes, pad_id),
            Tokens.pad_left(questions, pad_id),
            torch.tensor(group_of_sample),
            torch.tensor(following),
            pad_targets(answers),
            torch.from_numpy(np.concatenate(patches)),
            torch.tensor(grids),
        )

    def _tokenize(self, question: str, grids: tuple[Grid, ...]) -> tuple[torch.Tensor, torch.Tensor, int]:
        ids = torch.tensor(self.processor.tokenize(question, grids))
        return ids, *mrope_positions(ids, grids, self.config)


def pad_targets(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """[rows, longest] int64, IGNORED on the right of shorter ones."""
    padded = torch.full((len(rows), max(map(len, rows), default=0)), IGNORED)
    for row, ids in enumerate(rows):
        padded[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
    return padded


class PhantomBatches:
    """Training batches of `images_per_batch` fresh phantoms, with all their questions or with descriptions."""

    def __init__(self, directory: Path, seed: int, images_per_batch: int) -> None:
        self.collator = Collator(directory)
        self.seed = seed
        self.images_per_batch = images_per_batch

    def draw(self, index: int) -> Batch:
        return self.collate([(phantom, ask(phantom)) for phantom in self._phantoms(index)])

    def draw_scenes(self, index: int) -> Batch:
        """Every phantom described twice, in two orders."""
        asked = []
        for phantom in self._phantoms(index):
            order = make_rng(phantom.split, phantom.seed, phantom.index, CAPTION_STREAM)
            asked.append(Asked([phantom.image], [(REQUEST, describe_scene(phantom, order)) for _ in range(2)]))
        return self.collator.collate(asked)

    def collate(self, asked: Sequence[tuple[Phantom, Sequence[Sample]]]) -> Batch:
        return self.collator.collate(
            [Asked([phantom.image], [(s.question, s.answer) for s in samples]) for phantom, samples in asked]
        )

    def _phantoms(self, index: int) -> list[Phantom]:
        first = index * self.images_per_batch
        return [draw_phantom("train", self.seed, first + i) for i in range(self.images_per_batch)]
