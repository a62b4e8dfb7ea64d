"""A prompt: one sample as the model takes it.

T tokens, P patches, I images.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vitalrt.errors import InputError
from vitalrt.model.rope import Grid
from vitalrt.transfers import sent

CPU = torch.device("cpu")


class Picture:
    """One image of a prompt.

    grid: its patches as (time, height, width).  patch_dim: values in each.  digest: SHA-256 by which it is known; two
    images share one only if the vision tower would see the same input.
    """

    def __init__(
        self, grid: Grid, patch_dim: int, digest: bytes, patches: torch.Tensor | Callable[[torch.device], torch.Tensor]
    ) -> None:
        """patches: float [P, patch_dim], or what makes them on a device when they are needed."""
        self.grid, self.patch_dim, self.digest = grid, patch_dim, digest
        self._patches = patches

    @property
    def num_patches(self) -> int:
        return math.prod(self.grid)

    def patches(self, device: torch.device = CPU) -> torch.Tensor:
        """[P, patch_dim] on a device. Who finds the image's features by its digest need not ask.

        On the CPU they are made at the first call. Another device makes them at every call where the CPU has none:
        kept, those of all who wait in line would fill its memory.
        """
        patches = self._patches
        if not isinstance(patches, torch.Tensor):
            patches = patches(device)
            if device.type == "cpu":
                self._patches = patches  # and what they were made from may go
        return sent(patches, device)


@dataclass(frozen=True, eq=False, init=False, repr=False)
class Prompt:
    """Token ids and image patches of one sample, exactly as transformers' Qwen3-VL processor returns them.

    input_ids: [T] ints (list, array or tensor; a leading batch axis of 1 is accepted), image placeholders expanded.
    pixel_values: [P, patch_dim] float or None.  image_grid_thw: [I, 3] patches per image (time, height, width) or None.
    digests: one SHA-256 per image, of its decoded pixels and the preprocessing parameters; when not given, of its
    patches and grid.
    preprocess_ms: time spent on reading, resizing (where patches were made by then) and tokenizing.
    Raises InputError on shapes that disagree.
    """

    input_ids: torch.Tensor
    pictures: tuple[Picture, ...]
    preprocess_ms: float

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
        self._set(ids, _pictures(pixel_values, image_grid_thw, digests), preprocess_ms)

    @classmethod
    def of_pictures(cls, input_ids: Sequence[int], pictures: Sequence[Picture], preprocess_ms: float) -> Prompt:
        """pictures: in the order of their placeholders; their patches need not have been made."""
        prompt = cls.__new__(cls)
        prompt._set(_token_ids(input_ids), tuple(pictures), preprocess_ms)
        return prompt

    def _set(self, ids: torch.Tensor, pictures: tuple[Picture, ...], preprocess_ms: float) -> None:
        for name, value in (("input_ids", ids), ("pictures", pictures), ("preprocess_ms", preprocess_ms)):
            object.__setattr__(self, name, value)

    @property
    def num_tokens(self) -> int:
        return self.input_ids.numel()

    @property
    def pixel_values(self) -> torch.Tensor | None:
        patches = [picture.patches() for picture in self.pictures]
        return patches[0] if len(patches) == 1 else torch.cat(patches) if patches else None

    @property
    def image_grid_thw(self) -> torch.Tensor | None:
        return torch.tensor(self.grids()) if self.pictures else None

    @property
    def digests(self) -> tuple[bytes, ...]:
        return tuple(picture.digest for picture in self.pictures)

    def grids(self) -> list[Grid]:
        """Patches per image as (time, height, width)."""
        return [picture.grid for picture in self.pictures]

    def require_patches_of(self, patch_dim: int) -> None:
        """Raises InputError where an image's patches are of another size than a model takes."""
        if any(picture.patch_dim != patch_dim for picture in self.pictures):
            came = [sum(picture.num_patches for picture in self.pictures), self.pictures[0].patch_dim]
            raise InputError(f"pixel_values: expected [patches, {patch_dim}], got {came}")


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


def _pictures(pixel_values: Any, image_grid_thw: Any, digests: Sequence[bytes] | None) -> tuple[Picture, ...]:
    if (pixel_values is None) != (image_grid_thw is None):
        given = "pixel_values" if image_grid_thw is None else "image_grid_thw"
        raise InputError(f"pixel_values and image_grid_thw: expected both or neither, got only {given}")
    pixels, grids = (None, []) if pixel_values is None else _patches(pixel_values, image_grid_thw)
    if digests is not None and len(digests) != len(grids):
        raise InputError(f"digests: expected one per image in image_grid_thw, got {len(digests)}")
    if pixels is None:
        return ()
    of_images = pixels.split([math.prod(grid) for grid in grids])
    digests = digests or [_patch_digest(patches, grid) for patches, grid in zip(of_images, grids, strict=True)]
    together = zip(grids, digests, of_images, strict=True)
    return tuple(Picture(grid, pixels.shape[1], digest, patches) for grid, digest, patches in together)


def _patches(pixel_values: Any, image_grid_thw: Any) -> tuple[torch.Tensor, list[Grid]]:
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
    return pixels, [(t, h, w) for t, h, w in grid.tolist()]


def _extremes(pixels: torch.Tensor) -> tuple[Any, Any]:
    """Least and greatest. By numpy where it can: torch would start a team of threads for every thread that asks."""
    if pixels.device.type != "cpu" or pixels.dtype == torch.bfloat16:
        return pixels.aminmax()
    values = pixels.numpy()
    return values.min(), values.max()


def _patch_digest(patches: torch.Tensor, grid: Grid) -> bytes:
    digest = hashlib.sha256(repr((list(grid), str(patches.dtype))).encode())
    digest.update(patches.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.digest()
