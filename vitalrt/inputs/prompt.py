"""A prompt: one sample as the model takes it.

T tokens, P patches, I images.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vitalrt.errors import InputError


@dataclass(frozen=True, eq=False)
class Prompt:
    """Token ids and image patches of one sample, exactly as transformers' Qwen3-VL processor returns them.

    input_ids: [T] ints (list, array or tensor; a leading batch axis of 1 is accepted), image placeholders expanded.
    pixel_values: [P, patch_dim] float or None.  image_grid_thw: [I, 3] patches per image (time, height, width) or None.
    digests: one SHA-256 per image, of its decoded pixels and the preprocessing parameters; when not given, of its
    patches and grid. Two images share a digest only if the vision tower would see the same input.
    preprocess_ms: time spent on reading, resizing and tokenizing.
    Raises InputError on shapes that disagree.
    """

    input_ids: torch.Tensor
    pixel_values: torch.Tensor | None = None
    image_grid_thw: torch.Tensor | None = None
    digests: tuple[bytes, ...] = ()
    preprocess_ms: float = 0.0

    def __init__(
        self,
        input_ids: Sequence[int] | torch.Tensor | np.ndarray,
        pixel_values: torch.Tensor | np.ndarray | None = None,
        image_grid_thw: torch.Tensor | np.ndarray | None = None,
        *,
        digests: Sequence[bytes] | None = None,
        preprocess_ms: float = 0.0,
    ) -> None:
        ids = _token_ids(input_ids)
        pixels, grid = _patches(pixel_values, image_grid_thw)
        if digests is None:
            digests = () if pixels is None or grid is None else _patch_digests(pixels, grid)
        elif len(digests) != (0 if grid is None else len(grid)):
            raise InputError(f"digests: expected one per image in image_grid_thw, got {len(digests)}")
        for name, value in (
            ("input_ids", ids),
            ("pixel_values", pixels),
            ("image_grid_thw", grid),
            ("digests", tuple(digests)),
            ("preprocess_ms", preprocess_ms),
        ):
            object.__setattr__(self, name, value)

    @property
    def num_tokens(self) -> int:
        return self.input_ids.numel()

    def grids(self) -> list[tuple[int, int, int]]:
        """Patches per image as (time, height, width)."""
        return [] if self.image_grid_thw is None else [(t, h, w) for t, h, w in self.image_grid_thw.tolist()]


def _token_ids(input_ids: Any) -> torch.Tensor:
    ids = _tensor("input_ids", input_ids, "integers [T]")
    if ids.ndim == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InputError(f"input_ids: expected integers [T], got dtype {ids.dtype}")
    if ids.ndim != 1 or not len(ids):
        raise InputError(f"input_ids: expected one non-empty sample [T], got shape {list(ids.shape)}")
    return ids.to("cpu", torch.int64)


def _tensor(name: str, value: Any, expected: str) -> torch.Tensor:
    try:
        return torch.as_tensor(value).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name}: expected {expected}, got {type(value).__name__}") from error


def _patches(pixel_values: Any, image_grid_thw: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if (pixel_values is None) != (image_grid_thw is None):
        given = "pixel_values" if image_grid_thw is None else "image_grid_thw"
        raise InputError(f"pixel_values and image_grid_thw: expected both or neither, got only {given}")
    if pixel_values is None:
        return None, None
    pixels = _tensor("pixel_values", pixel_values, "floats [patches, dim]")
    grid = _tensor("image_grid_thw", image_grid_thw, "integers [images, 3]").to("cpu", torch.int64)
    if pixels.ndim != 2 or not pixels.shape[1] or not pixels.is_floating_point():
        raise InputError(
            f"pixel_values: expected floats [patches, dim], got {pixels.dtype} of shape {list(pixels.shape)}"
        )
    if grid.ndim != 2 or grid.shape[1] != 3 or not len(grid) or bool((grid < 1).any()):
        raise InputError(f"image_grid_thw: expected positive [images, 3], got shape {list(grid.shape)}")
    if int(grid.prod(-1).sum()) != len(pixels):
        raise InputError(
            f"pixel_values: expected {int(grid.prod(-1).sum())} patches for image_grid_thw, got {len(pixels)}"
        )
    if not all(math.isfinite(extreme) for extreme in _extremes(pixels)):  # NaN is either; no mask of all pixels
        raise InputError("pixel_values: expected finite numbers, got NaN or infinity")
    return pixels, grid


def _extremes(pixels: torch.Tensor) -> tuple[Any, Any]:
    """Least and greatest. By numpy where it can: torch would start a team of threads for every thread that asks."""
    if pixels.device.type != "cpu" or pixels.dtype == torch.bfloat16:
        return pixels.aminmax()
    values = pixels.numpy()
    return values.min(), values.max()


def _patch_digests(pixels: torch.Tensor, grid: torch.Tensor) -> list[bytes]:
    digests = []
    for image, thw in zip(pixels.split(grid.prod(-1).tolist()), grid, strict=True):
        digest = hashlib.sha256(repr((thw.tolist(), str(image.dtype))).encode())
        digest.update(image.cpu().contiguous().view(torch.uint8).numpy())
        digests.append(digest.digest())
    return digests
