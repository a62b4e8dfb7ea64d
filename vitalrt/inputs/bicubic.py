"""Bicubic resizing in torch, on any device, to the very bytes that Pillow gives.

Pillow resizes one axis after the other. Along an axis, each pixel is a sum of N source pixels (taps) times weights in
fixed point, rounded to 8 bits before the other axis is looked at. Integers add up to the same on every device, in any
order, whatever TF32 is set to. (torch's own bicubic filters are other ones.)

H, W pixels; C channels; N taps: about 4, and as many times more as a picture shrinks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import PIL
import torch

from vitalrt.transfers import sent

FRACTION_BITS = 22  # of a weight; 8 of a pixel, a sign, and sums slightly above 255 fill up int32
RADIUS = 2.0  # of the filter, in pixels of the source or the result, whichever has fewer
PILLOW = tuple(int(number) for number in PIL.__version__.split(".")[:2])


def resize_bicubic(picture: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """What Image.resize((width, height), BICUBIC) of the installed Pillow makes of a picture.

    picture: uint8 [H, W, C].  Returns uint8 [height, width, C] on its device: picture itself where nothing changes.
    """
    size = (height, width)
    for axis in (0, 1) if _is_height_first(picture.shape, size) else (1, 0):
        picture = _resize_axis(picture, axis, size[axis])
    return picture


def _is_height_first(before: Sequence[int], after: Sequence[int]) -> bool:
    """The order in which Pillow goes shows in the result. 12.2 and 13.0 changed it for pictures that lose height."""
    fewer_rows, fewer_columns = before[0] - after[0], before[1] - after[1]
    if PILLOW >= (13, 0):
        return fewer_rows > max(0, 2 * fewer_columns)
    return PILLOW >= (12, 2) and fewer_rows > 0 and before[0] > 100 * before[1]


def _resize_axis(picture: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    if picture.shape[axis] == size:
        return picture
    sources, weights = _taps(picture.shape[axis], size, picture.device)
    shape = [*picture.shape[:axis], size, *picture.shape[axis + 1 :]]
    sums = torch.full(shape, 1 << (FRACTION_BITS - 1), dtype=torch.int32, device=picture.device)  # a half, to round
    # Tap by tap: all at once would take N times the memory.
    for source, weight in zip(sources, weights.view(len(weights), size, *[1] * (2 - axis)), strict=True):
        sums.addcmul_(picture.index_select(axis, source), weight)
    return sums.bitwise_right_shift_(FRACTION_BITS).clamp_(0, 255).to(torch.uint8)


@lru_cache(maxsize=64)
def _taps(num_sources: int, size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What each of size pixels along an axis is made of: the source pixels' indices and their weights.

    Returns two int32 [N, size]; a pixel of fewer than N taps has others of weight 0.
    """
    scale = num_sources / size
    stretch = max(scale, 1.0)  # a wider filter where a picture shrinks, so that every source pixel counts
    centers = (np.arange(size) + 0.5) * scale
    first = np.maximum((centers - RADIUS * stretch + 0.5).astype(np.int32), 0)
    stop = np.minimum((centers + RADIUS * stretch + 0.5).astype(np.int32), num_sources)
    sources = first + np.arange((stop - first).max(), dtype=np.int32)[:, None]
    values = np.where(sources < stop, _bicubic(np.abs(sources - centers + 0.5) * (1 / stretch)), 0.0)
    values /= values.cumsum(0)[-1]  # first to last, as Pillow adds them: numpy's sum() may go in pairs
    weights = np.trunc(values * (1 << FRACTION_BITS) + np.copysign(0.5, values)).astype(np.int32)
    sources = np.minimum(sources, num_sources - 1)
    return sent(torch.from_numpy(sources), device), sent(torch.from_numpy(weights), device)


def _bicubic(distance: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution, a = -1/2 (IEEE Trans. ASSP 29, 1981), of distances >= 0."""
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
    return np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
