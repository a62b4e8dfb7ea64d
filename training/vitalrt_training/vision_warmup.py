"""Teach the vision tower to see before anyone asks it questions.

A tower that starts from noise learns slowly from answers of one or two tokens. Masks say far more per image: each
visual token predicts which targets cover its square, and where in the image the square is, from the merged features and
from every deepstack level. The linear heads that read the prediction are dropped afterwards.

P patches, V visual tokens, d decoder width, C classes (background first).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, interpolate, mse_loss
from transformers import PreTrainedTokenizerFast, Qwen3VLForConditionalGeneration

from vitalrt.inputs.processor import PatchOptions, patchify
from vitalrt.model.rope import Grid
from vitalrt_training.data.modalities import KINDS
from vitalrt_training.data.phantom import Phantom

PLACE_WEIGHT = 4.0
PLACE_LOUDNESS = 3.0
UNIFORM_STD = 12**-0.5  # of a place between 0 and 1
CLASS_OF_NAME = {name: index for index, name in enumerate(KINDS, start=1)}
NUM_CLASSES = 1 + len(CLASS_OF_NAME)


class SegmentingTower(nn.Module):
    """The model's own tower with one linear head on each of its outputs."""

    def __init__(self, model: Qwen3VLForConditionalGeneration) -> None:
        super().__init__()
        self.tower = model.model.visual
        width = model.config.get_text_config().hidden_size
        num_outputs = 1 + len(self.tower.deepstack_visual_indexes)
        self.heads = nn.ModuleList([nn.Linear(width, NUM_CLASSES + 2) for _ in range(num_outputs)])

    def forward(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> list[torch.Tensor]:
        """pixel_values: [P, patch_dim].  Returns per output [V, C + 2]: class logits, then row and column."""
        encoded = self.tower(pixel_values, grid_thw=grid_thw)
        features = (encoded.pooler_output, *encoded.deepstack_features)
        return [head(output) for head, output in zip(self.heads, features, strict=True)]


@torch.no_grad()
def name_what_is_seen(tower: SegmentingTower, embedding: nn.Embedding, tokenizer: PreTrainedTokenizerFast) -> None:
    """Set the embeddings of every target's name to the direction in which the tower shows that target, in place.

    Words and visual tokens then start out alike, so that attention has one thing to learn (look at what is alike)
    rather than one for every name. The scale of the embeddings is kept.
    """
    scale = embedding.weight.std()
    directions = cast(nn.Linear, tower.heads[0]).weight[:NUM_CLASSES]
    directions = directions - directions.mean(0)
    for name, index in CLASS_OF_NAME.items():
        direction = directions[index] / directions[index].std() * scale
        for spelling in (name, f" {name}"):
            embedding.weight[tokenizer(spelling)["input_ids"]] = direction


@torch.no_grad()
def say_places_loudly(tower: SegmentingTower) -> None:
    """Scale what the tower's outputs say about place to a standard deviation of PLACE_LOUDNESS, in place.

    Squared error is content with places told in a whisper, a thirtieth of a feature's length, that only a head made for
    it can hear. The last linear map of each output is changed along the two directions of its head, so that the middle
    of the image lies at 0 there.
    """
    for head, merger in zip(tower.heads, (tower.tower.merger, *tower.tower.deepstack_merger_list), strict=True):
        reading = cast(nn.Linear, head)
        directions, offset = reading.weight[NUM_CLASSES:], reading.bias[NUM_CLASSES:]
        basis = torch.linalg.qr(directions.T).Q  # [d, 2]
        middle = torch.linalg.solve(directions @ basis, 0.5 - offset)
        gain = PLACE_LOUDNESS * directions.norm(dim=-1).mean() / UNIFORM_STD
        louder = torch.eye(len(basis)) + (gain - 1) * basis @ basis.T
        output = merger.linear_fc2
        output.weight.copy_(louder @ output.weight)
        output.bias.copy_(louder @ output.bias - gain * basis @ middle)


def segmentation_loss(tower: SegmentingTower, phantoms: Sequence[Phantom], options: PatchOptions) -> torch.Tensor:
    """Cross entropy with the share of each visual token's square that a target covers, and error of its place."""
    patches, grids, shares, places = [], [], [], []
    for phantom in phantoms:
        values, grid = patchify(phantom.image, options)
        patches.append(values)
        grids.append(grid)
        shares.append(class_shares(phantom, grid, options.merge_size))
        places.append(centers(grid, options.merge_size))
    outputs = tower(torch.from_numpy(np.concatenate(patches)), torch.tensor(grids))
    share, place = torch.cat(shares), torch.cat(places)
    losses = [
        cross_entropy(output[:, :NUM_CLASSES], share) + PLACE_WEIGHT * mse_loss(output[:, NUM_CLASSES:], place)
        for output in outputs
    ]
    return torch.stack(losses).mean()


def centers(grid: Grid, merge: int) -> torch.Tensor:
    """[V, 2]: row and column of each visual token's square, from 0 to 1 over the image."""
    rows, columns = grid[1] // merge, grid[2] // merge
    axes = torch.meshgrid((torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns, indexing="ij")
    return torch.stack(axes, dim=-1).flatten(0, 1)


def class_shares(phantom: Phantom, grid: Grid, merge: int) -> torch.Tensor:
    """[V, C], rows sum to 1: the area of each visual token's square by class; of two that overlap the smaller."""
    labels = np.zeros(phantom.image.shape[:2], np.int64)
    for target in sorted(phantom.targets, key=lambda target: -target.mask.sum()):
        labels[target.mask] = CLASS_OF_NAME[target.name]
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(labels), NUM_CLASSES).permute(2, 0, 1)[None].float()
    size = (grid[1] // merge, grid[2] // merge)
    return interpolate(one_hot, size, mode="area")[0].flatten(1).T
