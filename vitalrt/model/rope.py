"""Rotary positions: M-RoPE for the decoder, axial for the vision tower, and the vision tower's learned grid.

T tokens, P patches, D head dim, I images.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from vitalrt.config import DecoderConfig, ModelConfig, VisionConfig
from vitalrt.errors import InputError

Grid = tuple[int, int, int]


def mrope_positions(input_ids: torch.Tensor, grids: Sequence[Grid], config: ModelConfig) -> tuple[torch.Tensor, int]:
    """Time, height and width position of every token, and the next free position.

    input_ids: [T] int64.  grids: patches per image (time, height, width).  Returns [3, T] int64 and an int.
    Text advances all three axes together; an image counts rows and columns from where it starts and then takes as many
    positions as its longer side (Qwen3-VL).  Raises InputError if placeholders and grids disagree.
    """
    merge = config.vision.spatial_merge_size
    ids = input_ids.numpy()
    is_image = ids == config.image_token_id
    if (ids == config.video_token_id).any():
        raise InputError("input_ids: expected text and images, got video placeholders")
    for token_id in (int(ids.min()), int(ids.max())):
        if not 0 <= token_id < config.decoder.vocab_size:
            raise InputError(f"input_ids: expected ids from 0 to {config.decoder.vocab_size - 1}, got {token_id}")
    num_expected = sum(t * h * w // merge**2 for t, h, w in grids)
    if int(is_image.sum()) != num_expected:
        raise InputError(
            f"input_ids: expected {num_expected} image placeholders for {len(grids)} images, got {int(is_image.sum())}"
        )
    positions = np.empty((3, len(ids)), np.int64)
    cursor = position = 0
    starts = is_image.nonzero()[0]
    taken = 0
    for t, h, w in grids:
        if h % merge or w % merge:
            raise InputError(f"image_grid_thw: expected height and width in multiples of {merge}, got {[t, h, w]}")
        rows, columns = h // merge, w // merge
        start = int(starts[taken])
        end = start + t * rows * columns
        taken += end - start
        if starts[taken - 1] != end - 1:
            raise InputError("input_ids: expected each image's placeholders in one run")
        positions[:, cursor:start] = np.arange(position, position + start - cursor)
        position += start - cursor
        positions[:, start:end] = np.indices((t, rows, columns)).reshape(3, -1) + position
        position += max(rows, columns)
        cursor = end
    positions[:, cursor:] = np.arange(position, position + len(ids) - cursor)
    return torch.from_numpy(positions), int(positions.max()) + 1


class MRope(torch.nn.Module):
    """Cosines and sines of interleaved M-RoPE: frequency i turns with time, height or width as i mod 3 says."""

    inverse_frequencies: torch.Tensor
    axis_of_frequency: torch.Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        # On the CPU whatever the default device: a model may be built on "meta", where these would be lost.
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
        axis = torch.zeros(config.head_dim // 2, dtype=torch.int64, device="cpu")
        for offset in (1, 2):
            axis[offset : config.mrope_section[offset] * 3 : 3] = offset
        self.register_buffer("inverse_frequencies", 1.0 / config.rope_theta**exponents, persistent=False)
        self.register_buffer("axis_of_frequency", axis, persistent=False)

    def forward(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """positions: [3, T] (or [1, T], equal axes).  Returns cos, sin [T, 1, D], computed in fp32, cast to dtype."""
        if positions.shape[0] == 1:
            of_frequency = positions[0, :, None].float()
        else:
            of_frequency = positions.T.float().index_select(1, self.axis_of_frequency)
        angles = of_frequency * self.inverse_frequencies
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


class GridTables(NamedTuple):
    """What the vision tower needs to know about the places of P patches: as grid_taps and vision_rope return it."""

    indices: torch.Tensor
    weights: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor


@functools.lru_cache(maxsize=8)
def grid_tables(grids: tuple[Grid, ...], config: VisionConfig, device: torch.device) -> GridTables:
    """The tables of these images, one after the other. Images of one size come again and again: the last few stay."""
    with torch.inference_mode(False):  # whoever asks first: the next call may record gradients
        coordinates = patch_coordinates(grids, config.spatial_merge_size, device)
        return GridTables(*grid_taps(coordinates, grids, config), *vision_rope(coordinates, config))


def patch_coordinates(grids: Sequence[Grid], merge: int, device: torch.device) -> torch.Tensor:
    """Row and column of every patch in merge-block order: [2, P] int64."""
    coordinates = []
    for t, h, w in grids:
        axes = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
        for_image = torch.stack(axes).reshape(2, h // merge, merge, w // merge, merge)
        coordinates.append(for_image.transpose(2, 3).reshape(2, 1, -1).expand(2, t, -1).reshape(2, -1))
    return torch.cat(coordinates, dim=1)


def vision_rope(coordinates: torch.Tensor, config: VisionConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """coordinates: [2, P].  Returns fp32 cos, sin [P, 1, D]: the first quarter of frequencies turns with the row."""
    spatial_dim = config.head_dim // 2
    exponents = torch.arange(0, spatial_dim, 2, dtype=torch.float32, device=coordinates.device) / spatial_dim
    angles = coordinates[:, :, None].float() * (1.0 / config.rope_theta**exponents)
    angles = torch.cat((angles[0], angles[1], angles[0], angles[1]), dim=-1).unsqueeze(1)
    return angles.cos(), angles.sin()


def grid_taps(
    coordinates: torch.Tensor, grids: Sequence[Grid], config: VisionConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bilinear taps (corners aligned) into the learned square position grid for every patch.

    coordinates: [2, P].  Returns indices [P, 4] int64 and weights [P, 4] fp32.
    """
    side = int(config.num_position_embeddings**0.5)
    sizes = torch.cat([torch.tensor([[h], [w]]).expand(2, t * h * w) for t, h, w in grids], dim=1)
    exact = coordinates.float() * (side - 1) / (sizes.to(coordinates.device) - 1).clamp(min=1)
    low = exact.floor().long().clamp(max=side - 1)
    high = (low + 1).clamp(max=side - 1)
    above = exact - low
    rows, columns = torch.stack((low[0], high[0]), -1), torch.stack((low[1], high[1]), -1)
    row_weights, column_weights = torch.stack((1 - above[0], above[0]), -1), torch.stack((1 - above[1], above[1]), -1)
    indices = (rows[:, :, None] * side + columns[:, None, :]).flatten(1)
    weights = (row_weights[:, :, None] * column_weights[:, None, :]).flatten(1)
    return indices, weights
