"""Prompts to hold one form of a model against another: an export against torch, 8 bits against 16."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch

from vitalrt.config import ModelConfig
from vitalrt.errors import CheckpointError
from vitalrt.inputs.options import ReadOptions
from vitalrt.inputs.processor import Processor
from vitalrt.inputs.prompt import Prompt


def random_prompts(config: ModelConfig, seed: int = 0) -> list[Prompt]:
    """Random tokens around random pictures: none, one, several, square, wide, tall, and one with two frames."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    merge = config.vision.spatial_merge_size
    special = {config.image_token_id, config.video_token_id}
    prompts = []
    for grids in ([(1, 2, 2)], [], [(1, 1, 5), (1, 4, 3)], [(2, 3, 1)], [(1, 6, 6)], [(1, 1, 1)] * 3):
        ids: list[int] = []
        for time, rows, columns in grids:
            ids += _text(draw, config.decoder.vocab_size, special) + [config.image_token_id] * (time * rows * columns)
        ids += _text(draw, config.decoder.vocab_size, special)
        grid = torch.tensor(grids, dtype=torch.int64).reshape(-1, 3) * torch.tensor([1, merge, merge])
        pixels = torch.randn(int(grid.prod(-1).sum()), config.vision.patch_dim, generator=generator)
        prompts.append(Prompt(ids, pixels, grid) if grids else Prompt(ids))
    return prompts


def probe_prompts(config: ModelConfig, directory: Path) -> list[Prompt]:
    """Random prompts, and real ones where the directory can prepare them."""
    try:
        return [*random_prompts(config), *real_prompts(Processor(directory))]
    except CheckpointError:
        return random_prompts(config)


def real_prompts(processor: Processor) -> list[Prompt]:
    """Questions about drawn pictures of two shapes, through the directory's own preprocessing."""
    y, x = np.mgrid[0:96, 0:128]
    disc = (255 * np.exp(-((x - 70) ** 2 + (y - 40) ** 2) / 900)).astype(np.uint8)
    read = ReadOptions()
    return [
        processor.prepare(disc, "Is the liver visible?", read),
        processor.prepare([disc.T.copy(), disc], "Where is the lesion, and what changed?", read),
    ]


def _text(draw: random.Random, vocab_size: int, special: set[int]) -> list[int]:
    ids = [draw.randrange(vocab_size) for _ in range(draw.randint(1, 12))]
    return [token for token in ids if token not in special] or [0]
