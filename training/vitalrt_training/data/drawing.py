"""Draws phantoms: deterministic medical-looking images with the masks of what they show."""

from __future__ import annotations

import numpy as np

from vitalrt.errors import VitalError
from vitalrt_training.data.modalities import CATALOG
from vitalrt_training.data.records import SPLITS, Phantom, Target, make_rng
from vitalrt_training.data.scene import Item, compose_scene
from vitalrt_training.data.shapes import Blob, lay_blob

MODALITIES = tuple(CATALOG)
MIN_SIDE, MAX_SIDE = 128, 192


def draw_phantom(split: str, seed: int, index: int, modality: str | None = None) -> Phantom:
    """Draw phantom number `index` of a split; the same arguments give the same pixels, other ones a fresh phantom.

    Sides are MIN_SIDE to MAX_SIDE pixels. modality None draws one of MODALITIES. Raises VitalError on an unknown
    split or modality and on a negative seed or index.
    """
    if split not in SPLITS:
        raise VitalError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    if modality is not None and modality not in CATALOG:
        raise VitalError(f"modality: expected one of {', '.join(MODALITIES)}, got {modality!r}")
    if seed < 0 or index < 0:
        raise VitalError(f"seed and index: expected numbers from 0 up, got {seed} and {index}")
    rng = make_rng(split, seed, index, stream=0)
    drawn = MODALITIES[rng.integers(len(MODALITIES))]
    modality = drawn if modality is None else modality
    look = CATALOG[modality]
    height, width = (int(side) for side in rng.integers(MIN_SIDE, MAX_SIDE + 1) * rng.uniform(0.87, 1.0, size=2))
    height, width = max(height, MIN_SIDE), max(width, MIN_SIDE)
    layout, items = compose_scene(rng, look)
    canvas = look.background(rng, height, width)
    blobs = [_lay(rng, item, height, width) for item in items]
    # Wakes first, so that none hides a thing; then the largest first, so that what lies inside another is on top.
    for item, blob in zip(items, blobs, strict=True):
        if item.kind.wake:
            item.kind.wake(rng, canvas, blob)
    for item, blob in sorted(zip(items, blobs, strict=True), key=lambda pair: -pair[0].radius):
        item.kind.look(rng, canvas, blob)
    targets = tuple(Target(i.kind.name, i.kind.type, b.mask(height, width)) for i, b in zip(items, blobs, strict=True))
    canvas = look.finish(rng, canvas)
    canvas = 127.5 + (canvas - 127.5) * rng.uniform(0.92, 1.04) + rng.uniform(-5, 5)
    image = np.broadcast_to(canvas.clip(0, 255).astype(np.uint8), (height, width, 3))
    return Phantom(np.ascontiguousarray(image), modality, targets, layout, split, seed, index)


def _lay(rng: np.random.Generator, item: Item, height: int, width: int) -> Blob:
    radius = item.radius * min(height, width)
    return lay_blob(item.kind.profile(rng), item.x * width, item.y * height, radius, height, width)
