"""Greyscale DICOM: stored values -> modality values -> 8-bit values for display (PS3.3 C.11.1, C.11.2)."""

from __future__ import annotations

import math

import numpy as np
from pydicom import Dataset

from vitalrt.errors import InputError
from vitalrt.inputs.options import Window
from vitalrt.inputs.pixels import apply_window, check_finite, robust_window, unit_to_uint8


def gray_to_uint8(
    dataset: Dataset,
    stored: np.ndarray,
    bits_stored: int,
    is_little_endian: bool,
    window: int | Window | None,
    label: str,
) -> np.ndarray:
    """[H, W] of stored values -> uint8 [H, W], before any MONOCHROME1 inversion.

    window (center, width): as in `apply_window`, on rescaled values. An index picks one of the file's views: its VOI
    lookup tables first, then its windows. None: the file's first view; where it has none, values that are unsigned,
    not rescaled and of at most 8 bits keep their full range, and others take `robust_window` without padding pixels.
    """
    values, is_rescaled = _modality_values(dataset, stored, is_little_endian)
    check_finite(label, values)
    if isinstance(window, tuple):
        return apply_window(values, window)

    tables = [item for item in dataset.get("VOILUTSequence") or [] if "LUTDescriptor" in item and "LUTData" in item]
    windows = _windows(dataset, label)
    num_views = len(tables) + len(windows)
    if window is not None and window >= num_views:
        raise InputError(f"{label}: window={window} is out of range, the file holds {num_views} views")
    index = window or 0
    if index < len(tables):
        table_bits = int(tables[index].LUTDescriptor[2])
        looked_up = _look_up(np.rint(values).astype(np.int64), tables[index], is_little_endian)
        return unit_to_uint8(looked_up / float(2**table_bits - 1))
    if index < num_views:
        return _apply_voi_function(dataset, values, windows[index - len(tables)], label)

    if not is_rescaled and stored.dtype.kind == "u" and bits_stored <= 8:
        return unit_to_uint8(values / float(2**bits_stored - 1))
    shown = values[~_is_padding(dataset, stored)]
    return apply_window(values, robust_window(shown if shown.size else values))


def _modality_values(dataset: Dataset, stored: np.ndarray, is_little_endian: bool) -> tuple[np.ndarray, bool]:
    """Values in the modality's units (PS3.3 C.11.1), and whether they differ in kind from the stored ones."""
    if dataset.get("ModalityLUTSequence"):
        return _look_up(stored.astype(np.int64), dataset.ModalityLUTSequence[0], is_little_endian), True
    slope, intercept = _numbers(dataset, "RescaleSlope"), _numbers(dataset, "RescaleIntercept")
    if slope and intercept:
        return stored * slope[0] + intercept[0], (slope[0], intercept[0]) != (1.0, 0.0)
    return stored, False


def _look_up(values: np.ndarray, item: Dataset, is_little_endian: bool) -> np.ndarray:
    """values: int64 [H, W]. Values outside the table take its first or last entry (PS3.3 C.11.1.1)."""
    num_entries, first, bits = item.LUTDescriptor
    num_entries = num_entries or 2**16
    if isinstance(item.LUTData, bytes):
        dtype = "u1" if bits == 8 and len(item.LUTData) <= num_entries + 1 else ("<u2" if is_little_endian else ">u2")
        table = np.frombuffer(item.LUTData, dtype)
    else:
        table = np.asarray(item.LUTData).reshape(-1)
    return table[np.clip(values - first, 0, num_entries - 1)].astype(np.int64)


def _windows(dataset: Dataset, label: str) -> list[Window]:
    centers, widths = _numbers(dataset, "WindowCenter"), _numbers(dataset, "WindowWidth")
    if len(centers) != len(widths):
        counts = f"{len(centers)} window centers but {len(widths)} widths"
        raise InputError(f"{label}: holds {counts}; pass window=(center, width)")
    return list(zip(centers, widths, strict=True))


def _apply_voi_function(dataset: Dataset, values: np.ndarray, window: Window, label: str) -> np.ndarray:
    """The file's own window, by the function the file names: LINEAR (default), LINEAR_EXACT or SIGMOID (C.11.2.1)."""
    center, width = window
    function = dataset.get("VOILUTFunction") or "LINEAR"
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise InputError(f"{label}: its VOI LUT function is not one of DICOM's; pass window=(center, width)")
    if not (math.isfinite(center) and math.isfinite(width)) or width <= 0 or (function == "LINEAR" and width < 1):
        raise InputError(f"{label}: its window width is too small or not a number; pass window=(center, width)")
    if function == "SIGMOID":
        # 1 / (1 + exp(-4x)), without its overflow
        return unit_to_uint8(0.5 + 0.5 * np.tanh(2.0 * (values - center) / width))
    if function == "LINEAR_EXACT":
        return apply_window(values, window)
    if width == 1:
        return np.where(values <= center - 0.5, 0, 255).astype(np.uint8)  # a threshold
    return apply_window(values, (center - 0.5, width - 1.0))


def _is_padding(dataset: Dataset, stored: np.ndarray) -> np.ndarray:
    """bool [H, W]: pixels outside the scanned region (PS3.3 C.7.5.1.1.2)."""
    ends = _numbers(dataset, "PixelPaddingValue") + _numbers(dataset, "PixelPaddingRangeLimit")
    if "PixelPaddingValue" not in dataset or not ends:
        return np.zeros(stored.shape, bool)
    return (stored >= min(ends)) & (stored <= max(ends))


def _numbers(dataset: Dataset, keyword: str) -> list[float]:
    """The values of a numeric attribute; none if it is absent or empty."""
    value = dataset.get(keyword)
    if value is None or value == "":
        return []
    return [float(part) for part in (value if hasattr(value, "__len__") else [value])]
