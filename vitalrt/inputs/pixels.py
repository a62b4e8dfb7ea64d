"""From stored intensities to 8-bit RGB: windows, ranges, alpha, and the checks every source shares.

H rows, W columns. `label` names the source in errors, as in "image 'scan.png'".
"""

from __future__ import annotations

import numpy as np

from vitalrt.errors import InputError
from vitalrt.inputs import options
from vitalrt.inputs.options import Window


def check_size(label: str, width: int, height: int) -> None:
    """Raises InputError for a picture without pixels or with more than MAX_PIXELS."""
    if width < 1 or height < 1:
        raise InputError(f"{label}: expected at least one pixel, got {width} x {height}")
    if width * height > options.MAX_PIXELS:
        raise InputError(f"{label}: {width} x {height} pixels exceed the limit of {options.MAX_PIXELS:,} pixels")


def check_finite(label: str, values: np.ndarray) -> None:
    """Raises InputError when a floating-point array holds NaN, infinity, or what windowing would turn into these."""
    if values.dtype.kind == "f":
        num_bad = int(np.sum(~(np.abs(values.astype(np.float64)) < 1e300)))
        if num_bad:
            trouble = f"{num_bad} of {values.size} values are NaN or infinite"
            raise InputError(f"{label}: {trouble}; replace them, as with numpy.nan_to_num")


def robust_window(values: np.ndarray) -> Window:
    """(center, width) from the 0.5th to the 99.5th percentile, so that a few hot pixels do not darken the rest.

    Where these coincide (most pixels are background), from the minimum to the maximum.
    """
    low, high = np.percentile(values, (0.5, 99.5))
    if low == high:
        low, high = values.min(), values.max()
    low, high = float(low), float(high)
    return low + (high - low) / 2, high - low


def apply_window(values: np.ndarray, window: Window) -> np.ndarray:
    """[H, W] of any real dtype -> uint8 [H, W]: center - width/2 is 0, center + width/2 is 255, linear in between.

    With width 0 (a constant image) everything is 0. This is DICOM's LINEAR_EXACT (PS3.3 C.11.2.1.3.2), rounded.
    """
    center, width = window
    if width == 0:
        return np.zeros(values.shape, np.uint8)
    with np.errstate(over="ignore"):  # a very narrow window makes infinities, which clip as they should
        return unit_to_uint8((values.astype(np.float64) - center) / width + 0.5)


def unit_to_uint8(values: np.ndarray) -> np.ndarray:
    """Floating point 0..1 -> uint8 0..255, clipped and rounded."""
    return np.rint(np.clip(values, 0.0, 1.0) * 255.0).astype(np.uint8)


def uint16_to_uint8(values: np.ndarray) -> np.ndarray:
    """uint16 0..65535 -> uint8 0..255, rounded."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def as_rgb(picture: np.ndarray) -> np.ndarray:
    """uint8 [H, W] or [H, W, 1, 3 or 4] (grey, RGB, RGBA) -> uint8 [H, W, 3]; alpha is laid over white."""
    if picture.ndim == 2:
        picture = picture[:, :, None]
    if picture.shape[2] == 1:
        return np.repeat(picture, 3, axis=2)
    if picture.shape[2] == 4:
        color, alpha = picture[:, :, :3].astype(np.uint32), picture[:, :, 3:].astype(np.uint32)
        return ((color * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    return picture
