"""The nine kinds of image: their background, their finish (noise, field of view) and the three things each may show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vitalrt_training.data import looks, shapes
from vitalrt_training.data.textures import blend, dots, flat, grain, grid, smooth_field

Background = Callable[[np.random.Generator, int, int], np.ndarray]
Look = Callable[[np.random.Generator, np.ndarray, shapes.Blob], None]
Finish = Callable[[np.random.Generator, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Kind:
    """A thing an image may show. type: "organ" or "lesion"; wake: what it does to the picture below it, if anything."""

    name: str
    plural: str
    type: str
    profile: shapes.Profile
    look: Look
    wake: Look | None = None


@dataclass(frozen=True)
class Modality:
    """background makes a canvas float32 [H, W, C]; finish returns it with noise. nested: (outer, inner) kind names of
    which the inner can lie inside the outer; empty where none can."""

    background: Background
    finish: Finish
    kinds: tuple[Kind, Kind, Kind]
    nested: tuple[str, ...] = ()


def _body(rng: np.random.Generator, height: int, width: int, power: float, reach: float = 0.485) -> np.ndarray:
    """[H, W]: below 1 inside a rounded box that nearly fills the image."""
    x, y = grid(height, width)
    semi_x, semi_y = rng.uniform(reach - 0.01, reach + 0.01, size=2)
    return np.abs(x / semi_x) ** power + np.abs(y / semi_y) ** power


# --- CT -------------------------------------------------------------------------------------------------------------


def _ct_background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    body = _body(rng, height, width, 3.0)
    canvas = flat(height, width, (4,))
    blend(canvas, (70,), (body < 1).astype(np.float32))
    tissue = 108 + 7 * smooth_field(rng, height, width, 9)
    blend(canvas, tissue[..., None], (body < 0.84).astype(np.float32))
    # A broken ring of bone just under the skin: the ribs cut across.
    x, y = grid(height, width)
    around = np.sin(np.arctan2(y, x) * rng.integers(7, 11) + rng.uniform(0, 6.3))
    blend(canvas, (235,), ((np.abs(body - 0.83) < 0.05) & (around > 0.1)).astype(np.float32))
    return canvas


def _ct_finish(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    return canvas + rng.uniform(4, 8) * grain(rng, *canvas.shape[:2])


# --- MRI ------------------------------------------------------------------------------------------------------------


def _mri_background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    body = _body(rng, height, width, 2.7)
    canvas = flat(height, width, (3,))
    blend(canvas, (185,), (body < 1).astype(np.float32))
    blend(canvas, (18,), (body < 0.9).astype(np.float32))
    folds = np.sin(5 * smooth_field(rng, height, width, 7))
    blend(canvas, (100 + 13 * folds)[..., None], (body < 0.8).astype(np.float32))
    return canvas


def _mri_finish(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    height, width = canvas.shape[:2]
    bias = 1 + 0.08 * smooth_field(rng, height, width, 2)[..., None]
    sigma = rng.uniform(4, 8)
    noise = sigma * grain(rng, height, width, 2)
    # Magnitude of a complex signal: Rician.
    return np.hypot(canvas * bias + noise[..., :1], noise[..., 1:])


# --- X-ray ----------------------------------------------------------------------------------------------------------


def _xray_background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    x, y = grid(height, width)
    canvas = flat(height, width, (125,))
    canvas += 5 * smooth_field(rng, height, width, 4)[..., None]
    middle = rng.uniform(-0.03, 0.03)
    for side in (-1, 1):
        lung = (np.abs((x - middle - side * 0.24) / 0.2)) ** 2.6 + np.abs((y + 0.01) / 0.45) ** 2.6
        blend(canvas, (52,), ((1 - lung) * 4).clip(0, 1))
    ribs = np.sin((y + 0.5 * (x - middle) ** 2) * rng.uniform(48, 58) + rng.uniform(0, 6.3))
    canvas += 24 * (ribs.clip(0.2, 1) - 0.2)[..., None]
    return canvas


def _xray_finish(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    # Counting noise grows with the root of the signal.
    return canvas + rng.uniform(0.3, 0.6) * np.sqrt(canvas.clip(1, None)) * grain(rng, *canvas.shape[:2])


# --- Ultrasound -----------------------------------------------------------------------------------------------------


def _ultrasound_background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    _, y = grid(height, width)
    canvas = flat(height, width, (88,))
    canvas += (12 * smooth_field(rng, height, width, 8, 4) - 20 * y)[..., None]
    return canvas


def _ultrasound_finish(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    height, width = canvas.shape[:2]
    x, y = grid(height, width)
    # Rayleigh speckle, elongated sideways by the beam: mean 1 after scaling.
    waves = grain(rng, height, width, 2)
    waves = (waves + np.roll(waves, 1, axis=1)) / 1.414
    speckle = np.hypot(waves[..., :1], waves[..., 1:]) / 1.2533
    canvas = canvas * (0.45 + 0.55 * speckle)
    drop = y + 0.5 + rng.uniform(0.14, 0.2)
    angle = np.arctan2(x, drop)
    radius = np.hypot(x, drop)
    seen = (np.abs(angle) < rng.uniform(0.88, 0.95)) & (radius > 0.22) & (radius < 1.16)
    return canvas * seen[..., None]


# --- Endoscopy ------------------------------------------------------------------------------------------------------


def _endoscopy_background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    canvas = flat(height, width, (205, 118, 105))
    shade = 10 * smooth_field(rng, height, width, 4)
    x, y = grid(height, width)
    bend = np.hypot(x - rng.uniform(-0.6, 0.6), y - rng.uniform(-0.6, 0.6))
    shade += 9 * np.sin(bend * rng.uniform(28, 40) + rng.uniform(0, 6.3))
    canvas += shade[..., None] * np.array([1.0, 0.9, 0.8], dtype=np.float32)
    veins = np.abs(smooth_field(rng, height, width, 7)) < 0.06
    blend(canvas, (175, 60, 60), 0.45 * veins.astype(np.float32))
    return canvas


def _endoscopy_finish(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    height, width = canvas.shape[:2]
    canvas = canvas + 4 * grain(rng, height, width, 3)
    blend(canvas, (255, 250, 245), dots(rng, (height, width), 0.0006))
    x, y = grid(height, width)
    distance = x * x + y * y
    canvas *= (1.04 - 0.7 * distance)[..., None]
    # The scope's picture has cut corners.
    return canvas * ((np.abs(x) + np.abs(y)) < 0.86)[..., None]


# --- Dermoscopy -----------------------------------------------------------------------------------------------------


def _dermoscopy_background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    tone = rng.uniform(-10, 10)
    canvas = flat(height, width, (226 + tone, 178 + tone, 152 + tone))
    canvas += 6 * smooth_field(rng, height, width, 14)[..., None]
    return canvas


def _dermoscopy_finish(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    height, width = canvas.shape[:2]
    x, y = grid(height, width)
    for _ in range(rng.integers(0, 5)):
        angle, shift, bend = rng.uniform(0, np.pi), rng.uniform(-0.45, 0.45), rng.uniform(-0.6, 0.6)
        along = x * np.cos(angle) + y * np.sin(angle)
        across = y * np.cos(angle) - x * np.sin(angle) - shift - bend * along**2
        blend(canvas, (70, 45, 35), 0.75 * (np.abs(across) < 0.0045).astype(np.float32))
    return canvas * (1.03 - 0.35 * (x * x + y * y))[..., None] + 4 * grain(rng, height, width, 3)


# --- Pathology ------------------------------------------------------------------------------------------------------


def _pathology_background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    canvas = flat(height, width, (228, 168, 202))
    strands = np.sin(4 * smooth_field(rng, height, width, 6) + 3 * smooth_field(rng, height, width, 14))
    canvas += (12 * strands)[..., None] * np.array([0.5, 1.0, 0.6], dtype=np.float32)
    blend(canvas, (120, 75, 155), 0.85 * dots(rng, (height, width), 0.006))
    return canvas


def _pathology_finish(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    stain = 1 + rng.uniform(-0.05, 0.05, size=3).astype(np.float32)
    return canvas * stain + 5 * grain(rng, canvas.shape[0], canvas.shape[1], 3)


# --- Fundus ---------------------------------------------------------------------------------------------------------


def _fundus_background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    tone = rng.uniform(-12, 12)
    canvas = flat(height, width, (196 + tone, 92 + tone / 2, 42))
    canvas += 6 * smooth_field(rng, height, width, 6)[..., None]
    x, y = grid(height, width)
    side = rng.choice((-1.0, 1.0))
    u = x * side + 0.62
    for _ in range(rng.integers(5, 8)):
        slope, bend, phase = rng.uniform(-1.0, 1.0), rng.uniform(-0.6, 0.6), rng.uniform(0, 6.3)
        path = slope * u + bend * u * u + 0.02 * np.sin(12 * u + phase)
        blend(canvas, (140, 40, 25), 0.8 * (np.abs(y - path) < 0.013 - 0.006 * u).astype(np.float32))
    return canvas


def _fundus_finish(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    height, width = canvas.shape[:2]
    x, y = grid(height, width)
    distance = np.hypot(x, y)
    canvas = canvas * (1.05 - 0.6 * distance**2)[..., None] + 4 * grain(rng, height, width, 3)
    return canvas * (distance < rng.uniform(0.565, 0.59))[..., None]


# --- OCT ------------------------------------------------------------------------------------------------------------


def _oct_background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    x, y = grid(height, width)
    wave = 0.025 * np.sin(x * rng.uniform(3, 6) + rng.uniform(0, 6.3)) + rng.uniform(-0.05, 0.05) * x
    depth = (y - wave) + 0.42 + rng.uniform(-0.015, 0.015)
    levels = np.array([12, 150, 95, 118, 82, 122, 90, 110, 180, 60, 30], dtype=np.float32)
    levels[1:-1] += rng.uniform(-8, 8, size=len(levels) - 2)
    edges = np.array([-0.2, 0.03, 0.1, 0.24, 0.36, 0.48, 0.58, 0.7, 0.8, 0.88, 1.1], dtype=np.float32)
    return np.interp(depth, edges, levels).astype(np.float32)[..., None]


def _oct_finish(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    height, width = canvas.shape[:2]
    speckle = rng.gamma(9.0, 1 / 9.0, size=(height, width, 1)).astype(np.float32)
    return canvas * (0.5 + 0.5 * speckle) + 5 * grain(rng, height, width)


# Every modality has three kinds, so that each name is present in half of its modality's phantoms (see phantom.py).
CATALOG: dict[str, Modality] = {
    "ct": Modality(
        _ct_background,
        _ct_finish,
        (
            Kind("liver", "livers", "organ", shapes.blob, looks.liver),
            Kind("kidney", "kidneys", "organ", shapes.bean, looks.kidney),
            Kind("cyst", "cysts", "lesion", shapes.disc, looks.cyst),
        ),
        nested=("liver", "cyst"),
    ),
    "mri": Modality(
        _mri_background,
        _mri_finish,
        (
            Kind("ventricle", "ventricles", "organ", shapes.peanut, looks.ventricle),
            Kind("glioma", "gliomas", "lesion", shapes.disc, looks.glioma),
            Kind("edema", "edemas", "lesion", shapes.ragged, looks.edema),
        ),
        nested=("edema", "glioma"),
    ),
    "xray": Modality(
        _xray_background,
        _xray_finish,
        (
            Kind("heart", "hearts", "organ", shapes.teardrop, looks.heart),
            Kind("nodule", "nodules", "lesion", shapes.disc, looks.nodule),
            Kind("cavity", "cavities", "lesion", shapes.blob, looks.cavity),
        ),
    ),
    "ultrasound": Modality(
        _ultrasound_background,
        _ultrasound_finish,
        (
            Kind("gallbladder", "gallbladders", "organ", shapes.oval, looks.gallbladder, looks.echo),
            Kind("stone", "stones", "lesion", shapes.disc, looks.stone, looks.shadow),
            Kind("lipoma", "lipomas", "lesion", shapes.blob, looks.lipoma),
        ),
        nested=("gallbladder", "stone"),
    ),
    "endoscopy": Modality(
        _endoscopy_background,
        _endoscopy_finish,
        (
            Kind("pylorus", "pylori", "organ", shapes.blob, looks.pylorus),
            Kind("polyp", "polyps", "lesion", shapes.disc, looks.polyp),
            Kind("ulcer", "ulcers", "lesion", shapes.ragged, looks.ulcer),
        ),
    ),
    "dermoscopy": Modality(
        _dermoscopy_background,
        _dermoscopy_finish,
        (
            Kind("nevus", "nevi", "lesion", shapes.oval, looks.nevus),
            Kind("melanoma", "melanomas", "lesion", shapes.ragged, looks.melanoma),
            Kind("angioma", "angiomas", "lesion", shapes.disc, looks.angioma),
        ),
    ),
    "pathology": Modality(
        _pathology_background,
        _pathology_finish,
        (
            Kind("gland", "glands", "organ", shapes.oval, looks.gland),
            Kind("tumor nest", "tumor nests", "lesion", shapes.blob, looks.tumor_nest),
            Kind("necrosis", "necroses", "lesion", shapes.blob, looks.necrosis),
        ),
        nested=("tumor nest", "necrosis"),
    ),
    "fundus": Modality(
        _fundus_background,
        _fundus_finish,
        (
            Kind("optic disc", "optic discs", "organ", shapes.disc, looks.optic_disc),
            Kind("hemorrhage", "hemorrhages", "lesion", shapes.blob, looks.hemorrhage),
            Kind("exudate", "exudates", "lesion", shapes.ragged, looks.exudate),
        ),
        nested=("optic disc", "hemorrhage"),
    ),
    "oct": Modality(
        _oct_background,
        _oct_finish,
        (
            Kind("aneurysm", "aneurysms", "lesion", shapes.disc, looks.aneurysm, looks.shadow),
            Kind("fluid pocket", "fluid pockets", "lesion", shapes.oval, looks.fluid_pocket),
            Kind("druse", "drusen", "lesion", shapes.dome, looks.druse),
        ),
    ),
}

KINDS: dict[str, Kind] = {kind.name: kind for modality in CATALOG.values() for kind in modality.kinds}
"""Every kind by its name; names are unique over all modalities."""
