"""ROI features of a frozen, independent vision encoder: what the visual projector regresses.

A target that fills at least T of the image is pooled over its patches of the whole image; a smaller one is cropped and
looked at alone, because few patches would cover it.  Source: VITAL A.5.

H, W pixels; R, C rows and columns of the patch grid; d_v feature width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate, normalize

from vitalrt.errors import VitalError
from vitalrt.model.vision_encoder import PatchEncoder
from vitalrt_training.data.phantom import Phantom, Sample

FULL_IMAGE_AREA = 0.20
"""T: the share of the image from which on a mask is pooled in the whole image."""
MARGIN = 0.05
"""P: added to each side of the tight box, as a share of the box."""
MASK_SHARE = 0.3
"""A patch belongs to the mask from this share of its area on."""
CONTENT_SHARE = 0.5
"""A patch of a padded crop counts as content from this share of its area on."""
NUM_TOP_PATCHES = 5


@dataclass(frozen=True)
class TopPatch:
    """A patch among those most like the ROI feature: its place in the grid and its cosine with the feature."""

    row: int
    column: int
    cosine: float


@dataclass(frozen=True)
class RoiFeature:
    """feature: float32 [d_v], unit norm.  box: (top, left, bottom, right) in pixels of the image, of the square or
    image that was encoded; a padded square may reach beyond the image.  top_patches: best first, in the grid of box."""

    feature: np.ndarray
    box: tuple[int, int, int, int]
    top_patches: tuple[TopPatch, ...]


@dataclass(frozen=True)
class Crop:
    """image: uint8 [S, S, 3], zeros around the content.  content: bool [S, S].  box: as in RoiFeature."""

    image: np.ndarray
    content: np.ndarray
    box: tuple[int, int, int, int]


def square_crop(image: np.ndarray, mask: np.ndarray, margin: float = MARGIN) -> Crop:
    """The tight box of a mask (bool [H, W], not empty) with a margin, cut off at the image's edge, centred in a square.

    margin: share of the box's height above and below, of its width left and right.
    """
    rows, columns = np.nonzero(mask)
    top, bottom = _widened(rows, margin, len(mask))
    left, right = _widened(columns, margin, mask.shape[1])
    height, width = bottom - top, right - left
    side = max(height, width)
    above, before = (side - height) // 2, (side - width) // 2
    inside = slice(above, above + height), slice(before, before + width)
    square = np.zeros((side, side, 3), np.uint8)
    square[inside] = image[top:bottom, left:right]
    content = np.zeros((side, side), bool)
    content[inside] = True
    return Crop(square, content, (top - above, left - before, top - above + side, left - before + side))


def _widened(indices: np.ndarray, margin: float, length: int) -> tuple[int, int]:
    """From the first index to one past the last, with a margin on both sides but within 0 to length."""
    first, end = int(indices.min()), int(indices.max()) + 1
    wider = round(margin * (end - first))
    return max(0, first - wider), min(length, end + wider)


def roi_features(
    encoder: PatchEncoder, pairs: Sequence[tuple[np.ndarray, np.ndarray]], batch_size: int = 32
) -> list[RoiFeature]:
    """pairs: image uint8 [H, W, 3] and mask bool [H, W].  Raises VitalError on an empty mask or disagreeing sizes."""
    for image, mask in pairs:
        if mask.shape != image.shape[:2] or not mask.any():
            raise VitalError(
                f"mask: expected {image.shape[:2]} with pixels inside, got {mask.shape} with {int(mask.sum())} inside"
            )
    found = []
    for batch in _batches(pairs, batch_size):
        views = [_view(image, mask) for image, mask in batch]
        for (pooled, view), patches in zip(views, encoder.encode([view.image for _, view in views]), strict=True):
            found.append(_pool(patches, pooled, view))
    return found


def global_features(encoder: PatchEncoder, images: Sequence[np.ndarray], batch_size: int = 32) -> torch.Tensor:
    """Mean over all patches of each whole image, unit norm: float32 [N, d_v]."""
    means = [encoder.encode(batch).mean(dim=(1, 2)) for batch in _batches(images, batch_size)]
    return normalize(torch.cat(means), dim=-1)


def phantom_roi_features(
    encoder: PatchEncoder, asked: Sequence[tuple[Phantom, Sequence[Sample]]]
) -> list[RoiFeature | None]:
    """One for each sample, in order: that of all targets of its name taken together; None where there are none."""
    keys = [(number, sample.target_name) for number, (_, samples) in enumerate(asked) for sample in samples]
    masks = {key: phantom_mask(asked[key[0]][0], key[1]) for key in dict.fromkeys(keys)}
    shown = {key: mask for key, mask in masks.items() if mask is not None}
    found = roi_features(encoder, [(asked[number][0].image, mask) for (number, _), mask in shown.items()])
    by_key = dict(zip(shown, found, strict=True))
    return [by_key.get(key) for key in keys]


def phantom_roi_feature(encoder: PatchEncoder, phantom: Phantom, sample: Sample) -> RoiFeature | None:
    """phantom_roi_features for a single sample."""
    return phantom_roi_features(encoder, [(phantom, [sample])])[0]


def phantom_mask(phantom: Phantom, name: str) -> np.ndarray | None:
    """bool [H, W]: the union of all targets of a name, None where the phantom shows none."""
    masks = [target.mask for target in phantom.targets if target.name == name]
    return np.logical_or.reduce(masks) if masks else None


def peaks_within(similarity: torch.Tensor, mask: np.ndarray) -> bool:
    """Whether the middle of the greatest patch of [R, C] lies in a mask [H, W]."""
    row, column = divmod(int(similarity.argmax()), similarity.shape[1])
    height, width = mask.shape
    return bool(
        mask[int((row + 0.5) * height / similarity.shape[0]), int((column + 0.5) * width / similarity.shape[1])]
    )


def _view(image: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray | None, Crop]:
    """What to encode, and the mask to pool over: None where every patch of content counts."""
    if mask.mean() >= FULL_IMAGE_AREA:
        return mask, Crop(image, np.ones_like(mask), (0, 0, *mask.shape))
    return None, square_crop(image, mask)


def _pool(patches: torch.Tensor, mask: np.ndarray | None, view: Crop) -> RoiFeature:
    """patches: [R, C, d_v]."""
    rows, columns = patches.shape[:2]
    content = _covered(view.content, (rows, columns), CONTENT_SHARE)
    pooled = content if mask is None else _covered(mask, (rows, columns), MASK_SHARE)
    feature = normalize(patches[pooled].mean(dim=0), dim=0)
    cosines = (normalize(patches, dim=-1) @ feature).masked_fill(~content, -torch.inf).flatten()
    best = cosines.topk(min(NUM_TOP_PATCHES, int(content.sum())))
    top = tuple(
        TopPatch(index // columns, index % columns, cosine)
        for index, cosine in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    )
    return RoiFeature(feature.numpy(), view.box, top)


def _covered(mask: np.ndarray, grid: tuple[int, int], threshold: float) -> torch.Tensor:
    """bool [R, C]: patches of which the mask covers at least the threshold; where none is, those covered most."""
    shares = interpolate(torch.from_numpy(mask)[None, None].float(), grid, mode="area")[0, 0]
    return shares >= min(threshold, float(shares.max()))


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
