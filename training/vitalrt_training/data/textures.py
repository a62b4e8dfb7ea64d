"""Paint and noise: everything here draws on a float32 canvas [H, W, C] with values 0 to 255, C = 1 or 3."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from vitalrt_training.data.shapes import Blob


@lru_cache(maxsize=256)
def grid(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """x [1, W] and y [H, 1], float32, from -0.5 at the left and upper edge to 0.5; shared, do not write into them."""
    x = (np.arange(width, dtype=np.float32)[None, :] + 0.5) / width - 0.5
    y = (np.arange(height, dtype=np.float32)[:, None] + 0.5) / height - 0.5
    return x, y


@lru_cache(maxsize=1024)
def _weights(length: int, cells: int) -> np.ndarray:
    """[length, cells + 1] interpolation weights with smooth steps between nodes."""
    position = (np.arange(length) + 0.5) / length * cells
    node = position.astype(int)
    step = position - node
    step = step * step * (3 - 2 * step)
    weights = np.zeros((length, cells + 1), dtype=np.float32)
    weights[np.arange(length), node] = 1 - step
    weights[np.arange(length), node + 1] = step
    return weights


def smooth_field(
    rng: np.random.Generator, height: int, width: int, rows: int, columns: int | None = None
) -> np.ndarray:
    """[H, W] smooth random values, standard normal at the nodes of a rows x columns grid."""
    columns = rows if columns is None else columns
    nodes = rng.standard_normal((rows + 1, columns + 1), dtype=np.float32)
    return _weights(height, rows) @ nodes @ _weights(width, columns).T


def grain(rng: np.random.Generator, height: int, width: int, channels: int = 1) -> np.ndarray:
    """[H, W, C] white noise, standard normal."""
    return rng.standard_normal((height, width, channels), dtype=np.float32)


def flat(height: int, width: int, colour: Sequence[float]) -> np.ndarray:
    """A canvas of one colour."""
    return np.broadcast_to(np.asarray(colour, dtype=np.float32), (height, width, len(colour))).copy()


def blend(canvas: np.ndarray, colour: Sequence[float] | np.ndarray, alpha: np.ndarray) -> None:
    """Mix a colour ([C], or [H, W, C] for a texture) into the canvas, in place. alpha: [H, W], 0 keeps the canvas."""
    canvas += (np.asarray(colour, dtype=np.float32) - canvas) * alpha[..., None]


def fill(canvas: np.ndarray, blob: Blob, colour: Sequence[float] | np.ndarray, soft: float = 0.12) -> None:
    """Fill a shape, in place; the edge fades in over `soft` of its depth."""
    blend(canvas[blob.box], colour, ((1 - blob.depth) / soft).clip(0, 1))


def shell(
    canvas: np.ndarray, blob: Blob, colour: Sequence[float], inner: float, outer: float, soft: float = 0.1
) -> None:
    """Paint the part of a shape between two depths, in place."""
    alpha = np.minimum((blob.depth - inner) / soft + 0.5, (outer - blob.depth) / soft + 0.5).clip(0, 1)
    blend(canvas[blob.box], colour, alpha)


def spot(canvas: np.ndarray, blob: Blob, colour: Sequence[float], dx: float, dy: float, size: float) -> None:
    """A soft spot, in place; offset and size in radii of the shape."""
    distance = ((blob.dx - dx) ** 2 + (blob.dy - dy) ** 2) / size**2
    blend(canvas[blob.box], colour, np.exp(-distance * 1.5) * (blob.depth < 1))


def streak(canvas: np.ndarray, blob: Blob, colour: Sequence[float], strength: float) -> None:
    """What lies behind a shape as seen from above, in place: a vertical band from its middle down, fading out."""
    rows, columns = blob.box
    height = canvas.shape[0]
    middle = (rows.start + rows.stop) // 2
    below = canvas[middle:, columns]
    across = (1.0 - np.abs(blob.dx[0])).clip(0, 0.3) / 0.3
    down = np.linspace(1.0, 0.3, height - middle, dtype=np.float32)
    blend(below, colour, strength * down[:, None] * across[None, :])


def dots(rng: np.random.Generator, shape: tuple[int, int], share: float) -> np.ndarray:
    """[h, w] float32 in 0..1: small round dots about three pixels wide; `share` of the pixels start one."""
    seeds = (rng.random(shape, dtype=np.float32) < share).astype(np.float32)
    grown = seeds.copy()
    for axis in (0, 1):
        grown = np.maximum(grown, np.maximum(np.roll(seeds, 1, axis), np.roll(seeds, -1, axis)))
    return grown
