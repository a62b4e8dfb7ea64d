"""How each organ and lesion looks. A look paints one shape onto the canvas, in place; noise comes later."""

from __future__ import annotations

import numpy as np

from vitalrt_training.data.shapes import Blob
from vitalrt_training.data.textures import blend, dots, fill, shell, smooth_field, spot, streak


def _mottled(rng: np.random.Generator, blob: Blob, colour: tuple[float, ...], amount: float, cells: int) -> np.ndarray:
    """[h, w, C]: a colour with smooth unevenness, over the box of the shape."""
    field = smooth_field(rng, blob.depth.shape[0], blob.depth.shape[1], cells)[..., None]
    return np.asarray(colour, dtype=np.float32) + amount * field


def liver(rng: np.random.Generator, canvas: np.ndarray, blob: Blob) -> None:
    fill(canvas, blob, _mottled(rng, blob, (rng.uniform(158, 172),), 6, 8))


def kidney(rng: np.random.Generator, canvas: np.ndarray, blob: Blob) -> None:
    fill(canvas, blob, (rng.uniform(218, 235),))
    shell(canvas, blob, (rng.uniform(120, 140),), -1, 0.42, soft=0.25)


def cyst(rng: np.random.Generator, canvas: np.ndarray, blob: Blob) -> None:
    fill(canvas, blob, (rng.uniform(28, 45),))


def ventricle(rng: np.random.Generator, canvas: np.ndarray, blob: Blob) -> None:
    fill(canvas, blob, (rng.uniform(8, 20),))


def glioma(rng: np.random.Generator, canvas: np.ndarray, blob: Blob) -> None:
    fill(canvas, blob, (rng.uniform(230, 248),))
    shell(canvas, blob, (rng.uniform(45, 65),), -1, 0.55)


def edema(rng: np.random.Generator, canvas: np.ndarray, blob: Blob) -> None:
    fill(canvas, blob, _mottled(rng, blob, (rng.uniform(172, 188),), 5, 6), soft=0.25)


def heart(rng: np.random.Generator, canvas: np.ndarray, blob: Blob) -> None:
    fill(canvas, blob, (rng.uniform(182, 198),), soft=0.15)


def nodule(rng: np.random.Generator, canvas: np.ndarray, blob: Blob) -> None:
    fill(canvas, blob, (rng.uniform(205, 215),), soft=0.4)
    spot(canvas, blob, (255,), 0, 0, 0.85)


def cavity(rng: np.random.Generator, canvas: np.ndarray, blob: Blob) -> None:
    fill(canvas, blob, (rng.uniform(225, 240),))
    shell(canvas, blob, (rng.uniform(8, 22),), -1, 0.6)


def gallbladder(rng: np.random.Generator, canvas: np.ndarray, blob: Blob) -> None:
    fill(canvas, blob, (190,))
    shell(canvas, blob, (rng.uniform(2, 8),), -1, 0.86)


def stone(rng: np.random.Generator, canvas: np.ndarray, blob: Blob) -> None:
    fill(canvas, blob, (255,))
    blend(canvas[blob.box], (110,), ((blob.depth < 1) * (blob.dy * 0.9 - 0.1)).clip(0, 0.7))


def echo(rng: np.random.Generator, canvas: np.ndarray, blob: Blob) -> None:
    """Fluid lets sound pass: what lies behind it looks brighter."""
    streak(canvas, blob, (150,), 0.5)


def shadow(rng: np.random.Generator, canvas: np.ndarray, blob: Blob) -> None:
    """What stops sound or light leaves the dark behind it."""
    streak(canvas, blob, (6,), 0.9)


def lipoma(rng: np.random.Generator, canvas: np.ndarray, blob: Blob) -> None:
    fill(canvas, blob, _mottled(rng, blob, (rng.uniform(200, 215),), 10, 12))


def pylorus(rng: np.random.Generator, canvas: np.ndarray, blob: Blob) -> None:
    fill(canvas, blob, (95, 35, 32), soft=0.2)
    shell(canvas, blob, (20, 5, 5), -1, 0.72, soft=0.3)


def polyp(rng: np.random.Generator, canvas: np.ndarray, blob: Blob) -> None:
    fill(canvas, blob, (150, 40, 45))
    shell(canvas, blob, (rng.uniform(215, 235), 70, 78), -1, 0.8, soft=0.3)
    spot(canvas, blob, (255, 235, 230), rng.uniform(-0.35, 0.35), rng.uniform(-0.35, 0.35), 0.3)


def ulcer(rng: np.random.Generator, canvas: np.ndarray, blob: Blob) -> None:
    fill(canvas, blob, (170, 45, 40))
    shell(canvas, blob, (240, rng.uniform(222, 235), 165), -1, 0.8)


def nevus(rng: np.random.Generator, canvas: np.ndarray, blob: Blob) -> None:
    net = np.sin(blob.dx * 16) * np.sin(blob.dy * 16)
    brown = np.array([rng.uniform(155, 170), 105, 68], dtype=np.float32)
    fill(canvas, blob, brown + 14 * net[..., None], soft=0.25)


def melanoma(rng: np.random.Generator, canvas: np.ndarray, blob: Blob) -> None:
    fill(canvas, blob, _mottled(rng, blob, (48, 34, 38), 12, 5))
    spot(canvas, blob, (95, 110, 140), rng.uniform(-0.4, 0.4), rng.uniform(-0.4, 0.4), 0.45)


def angioma(rng: np.random.Generator, canvas: np.ndarray, blob: Blob) -> None:
    fill(canvas, blob, _mottled(rng, blob, (rng.uniform(185, 205), 28, 58), 14, 6))


def gland(rng: np.random.Generator, canvas: np.ndarray, blob: Blob) -> None:
    fill(canvas, blob, (105, 60, 150))
    shell(canvas, blob, (250, 244, 250), -1, 0.62)


def tumor_nest(rng: np.random.Generator, canvas: np.ndarray, blob: Blob) -> None:
    purple = np.array([140, 90, 170], dtype=np.float32)
    nuclei = dots(rng, blob.depth.shape, 0.1)[..., None]
    fill(canvas, blob, purple - 55 * nuclei)


def necrosis(rng: np.random.Generator, canvas: np.ndarray, blob: Blob) -> None:
    fill(canvas, blob, _mottled(rng, blob, (232, rng.uniform(70, 90), 120), 10, 9))


def optic_disc(rng: np.random.Generator, canvas: np.ndarray, blob: Blob) -> None:
    fill(canvas, blob, (250, 205, 120), soft=0.2)
    shell(canvas, blob, (255, 245, 205), -1, rng.uniform(0.4, 0.55), soft=0.2)


def hemorrhage(rng: np.random.Generator, canvas: np.ndarray, blob: Blob) -> None:
    fill(canvas, blob, _mottled(rng, blob, (85, 10, 12), 6, 5), soft=0.2)


def exudate(rng: np.random.Generator, canvas: np.ndarray, blob: Blob) -> None:
    # A crowd of waxy grains with the retina showing between them.
    grains = dots(rng, blob.depth.shape, 0.09)
    fill(canvas, blob, (215, 135, 60), soft=0.3)
    blend(canvas[blob.box], (255, 250, 170), grains * (blob.depth < 1))


def aneurysm(rng: np.random.Generator, canvas: np.ndarray, blob: Blob) -> None:
    fill(canvas, blob, (rng.uniform(225, 240),))
    shell(canvas, blob, (rng.uniform(100, 115),), -1, 0.6)


def fluid_pocket(rng: np.random.Generator, canvas: np.ndarray, blob: Blob) -> None:
    fill(canvas, blob, (rng.uniform(4, 14),))


def druse(rng: np.random.Generator, canvas: np.ndarray, blob: Blob) -> None:
    fill(canvas, blob, (rng.uniform(235, 250),))
