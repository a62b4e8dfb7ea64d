"""Closed shapes given by a radius per angle: the geometry of every organ and lesion of a phantom.

A profile is a table of N_ANGLES radii, scaled so that its shape has the area of the unit circle. Size is therefore
independent of form: a bean and a disc drawn with the same radius cover the same number of pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

N_ANGLES = 512
ANGLES = np.linspace(-np.pi, np.pi, N_ANGLES, endpoint=False)
REACH = 1.9
"""No profile reaches further than this many radii from its centre."""

Profile = Callable[[np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class Blob:
    """One shape laid onto an image of H x W pixels.

    box: the slices (rows, columns) that hold it.  depth: float32 over the box, 0 at the centre, 1 on the edge.
    dx, dy: float32 over the box, offset from the centre in radii, x to the right and y down.
    """

    box: tuple[slice, slice]
    depth: np.ndarray
    dx: np.ndarray
    dy: np.ndarray

    def mask(self, height: int, width: int) -> np.ndarray:
        """bool [height, width], True inside the shape."""
        mask = np.zeros((height, width), dtype=bool)
        mask[self.box] = self.depth <= 1.0
        return mask


def lay_blob(profile: np.ndarray, x: float, y: float, radius: float, height: int, width: int) -> Blob:
    """Lay a profile so that its centre of mass is at pixel (x, y); radius in pixels of the disc of equal area."""
    cubes = profile**3 * (2 * np.pi / N_ANGLES) / 3
    x = x - radius * float((cubes * np.cos(ANGLES)).sum() / np.pi)
    y = y - radius * float((cubes * np.sin(ANGLES)).sum() / np.pi)
    reach = REACH * radius
    rows = slice(max(0, int(y - reach)), min(height, int(y + reach) + 2))
    columns = slice(max(0, int(x - reach)), min(width, int(x + reach) + 2))
    dy = ((np.arange(rows.start, rows.stop, dtype=np.float32) + 0.5 - y) / radius)[:, None]
    dx = ((np.arange(columns.start, columns.stop, dtype=np.float32) + 0.5 - x) / radius)[None, :]
    index = ((np.arctan2(dy, dx) + np.pi) * (N_ANGLES / (2 * np.pi))).astype(np.int32) % N_ANGLES
    depth = np.hypot(dx, dy) / profile.astype(np.float32)[index]
    dx, dy = np.broadcast_arrays(dx, dy)
    return Blob((rows, columns), depth, dx, dy)


def _unit_area(radii: np.ndarray) -> np.ndarray:
    return radii / np.sqrt(np.mean(radii**2))


def _turned(rng: np.random.Generator) -> np.ndarray:
    """The angles, turned by a random amount."""
    return ANGLES + rng.uniform(0, 2 * np.pi)


def disc(rng: np.random.Generator) -> np.ndarray:
    """Round, with a trace of ellipticity."""
    return _unit_area(1 + 0.04 * np.cos(2 * _turned(rng)))


def oval(rng: np.random.Generator) -> np.ndarray:
    """An ellipse with axes about 1.7 to 1."""
    theta, ratio = _turned(rng), rng.uniform(1.6, 1.9)
    return _unit_area(1 / np.hypot(np.cos(theta), ratio * np.sin(theta)))


def bean(rng: np.random.Generator) -> np.ndarray:
    """An ellipse with a notch in one long side, like a kidney."""
    turn = rng.uniform(0, 2 * np.pi)
    theta = np.angle(np.exp(1j * (ANGLES + turn)))
    ellipse = 1 / np.hypot(np.cos(theta), 0.7 * np.sin(theta))
    return _unit_area(ellipse * (1 - 0.5 * np.exp(-((theta / 0.55) ** 2))))


def peanut(rng: np.random.Generator) -> np.ndarray:
    """Two lobes with a waist."""
    return _unit_area(1 + 0.4 * np.cos(2 * _turned(rng)))


def teardrop(rng: np.random.Generator) -> np.ndarray:
    """Blunt at one end, tapering to the other."""
    theta = _turned(rng)
    return _unit_area(1 + 0.3 * np.cos(theta) + 0.18 * np.cos(2 * theta) + 0.1 * np.cos(3 * theta))


def dome(rng: np.random.Generator) -> np.ndarray:
    """A mound with a flat base at the bottom of the image."""
    down = np.clip(np.sin(ANGLES), 1e-3, None)
    return _unit_area(np.minimum(rng.uniform(0.95, 1.05), 0.3 / down))


def blob(rng: np.random.Generator) -> np.ndarray:
    """A gently irregular outline."""
    return _wavy(rng, (0.13, 0.08, 0.05))


def ragged(rng: np.random.Generator) -> np.ndarray:
    """A strongly irregular outline with lobes."""
    return _wavy(rng, (0.1, 0.12, 0.1, 0.12, 0.07))


def _wavy(rng: np.random.Generator, amplitudes: tuple[float, ...]) -> np.ndarray:
    """A circle with waves of 2, 3, ... periods of the given amplitudes and random phases."""
    waves = [a * np.cos((k + 2) * ANGLES + rng.uniform(0, 2 * np.pi)) for k, a in enumerate(amplitudes)]
    return _unit_area(1 + np.sum(waves, axis=0))
