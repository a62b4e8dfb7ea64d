"""The vision tower behind its cache: an image is encoded once, whoever asks about it and however often.

P patches, V visual tokens, d width.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

import torch

from vitalrt.engine.device_prefill import DeviceVision
from vitalrt.engine.feature_cache import FeatureCache, VisionFeatures
from vitalrt.engine.sequence import Image
from vitalrt.inputs.prompt import Prompt
from vitalrt.model.vision import VisionTower

CPU_BYTES = 4 * 2**20  # of the widest activation: beyond, it has left the caches before the next operation reads it


def images_of(prompt: Prompt, namespace: bytes, image_token_id: int) -> list[Image]:
    """A prompt's images and where their tokens are; each image's are in one run (see mrope_positions).

    namespace: whoever has another one shares no features.
    """
    if not prompt.pictures:
        return []
    places = (prompt.input_ids == image_token_id).nonzero().flatten()
    num_patches = sum(picture.num_patches for picture in prompt.pictures)
    images, taken = [], 0
    for picture in prompt.pictures:
        start, count = int(places[taken]), picture.num_patches * len(places) // num_patches
        images.append(Image(namespace + picture.digest, picture, start, start + count))
        taken += count
    return images


class ImageEncoder:
    """num_encoded: how many images the tower has seen.  device: where it sees them."""

    def __init__(self, tower: VisionTower, max_bytes: int) -> None:
        """max_bytes: what the features of past images may take."""
        self.cache = FeatureCache(max_bytes)
        self.num_encoded = 0
        self._tower = tower
        self._captured = DeviceVision(tower)
        self.device = tower.patch_embed.weight.device
        self._cpu_patches = CPU_BYTES // (tower.config.intermediate_size * tower.patch_embed.weight.itemsize)

    def knows(self, key: bytes) -> bool:
        """Whether the features of this image are kept, at this moment."""
        return key in self.cache

    def encode(self, images: Iterable[Image]) -> None:
        """Give every image its features; all that the cache does not have go through the tower together."""
        missing: dict[bytes, list[Image]] = {}
        for image in images:
            if image.features is None:
                image.features = self.cache.get(image.key)
            if image.features is None:
                missing.setdefault(image.key, []).append(image)
        # Images of one size stand together: attention takes them in one call.
        images = sorted((same[0] for same in missing.values()), key=lambda image: image.picture.grid)
        for group in self._groups(images):
            for first, features in zip(group, self._encode(group), strict=True):
                self.cache.put(first.key, features)
                for image in missing[first.key]:
                    image.features = features

    def _groups(self, images: list[Image]) -> Iterator[list[Image]]:
        """Those that go through the tower together."""
        most = sys.maxsize if self.device.type == "cuda" else self._cpu_patches
        group: list[Image] = []
        for image in images:
            if group and sum(one.picture.num_patches for one in (*group, image)) > most:
                yield group
                group = []
            group.append(image)
        if group:
            yield group

    def _encode(self, images: list[Image]) -> list[VisionFeatures]:
        patches = [image.picture.patches(self.device) for image in images]
        grids = [image.picture.grid for image in images]
        if self.device.type == "cuda" and len(images) == 1:  # sizes come again and again, combinations do not
            tokens, *deepstack = (level.clone() for level in self._captured(patches[0], grids))
        else:
            tokens, deepstack = self._tower(torch.cat(patches), grids)
        self.num_encoded += len(images)
        counts = [image.stop - image.start for image in images]
        by_image = zip(*(level.split(counts) for level in (tokens, *deepstack)), strict=True)
        return [VisionFeatures(own, tuple(levels)) for own, *levels in by_image]
