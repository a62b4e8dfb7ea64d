"""Pictures handed over as numpy arrays or torch tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vitalrt.errors import InputError
from vitalrt.inputs.options import ReadOptions
from vitalrt.inputs.pixels import as_rgb, check_finite, check_size, uint16_to_uint8, unit_to_uint8

_CHANNELS = ((), (1,), (3,), (4,))


def read_array(source: np.ndarray, options: ReadOptions, label: str) -> np.ndarray:
    """[H, W] or [H, W, 1, 3 or 4] -> uint8 RGB [H, W, 3].

    uint8 is taken as it is, uint16 as 0..65535, bool as black and white, floating point as 0..1.
    Raises InputError for other shapes and dtypes, floats outside 0..1, NaN and infinity.
    """
    options.refuse(label, "an array, which is one picture already", "frame", "slice_index", "axis", "window")
    if source.ndim not in (2, 3) or source.shape[2:] not in _CHANNELS:
        hint = "; move the channels last: a.transpose(1, 2, 0)" if _has_channels_first(source.shape) else ""
        raise InputError(f"{label}: expected shape [H, W] or [H, W, 1, 3 or 4], got {list(source.shape)}{hint}")
    check_size(label, source.shape[1], source.shape[0])
    return as_rgb(_as_uint8(source, label))


def read_tensor(source: torch.Tensor, options: ReadOptions, label: str) -> np.ndarray:
    """[H, W] or [1, 3 or 4, H, W], on any device -> uint8 RGB [H, W, 3]. Dtypes as for `read_array`."""
    if source.layout != torch.strided or source.is_meta or source.is_quantized:
        raise InputError(f"{label}: expected a dense tensor with data, got a sparse, quantized or meta tensor")
    if source.ndim != 2 and not _has_channels_first(source.shape):
        is_channels_last = source.ndim == 3 and source.shape[2:] in _CHANNELS
        hint = "; move the channels first: t.permute(2, 0, 1)" if is_channels_last else ""
        raise InputError(f"{label}: expected shape [H, W] or [1, 3 or 4, H, W], got {list(source.shape)}{hint}")
    if source.dtype.is_floating_point:
        source = source.float()  # numpy has no bfloat16 and no float8
    array = source.detach().cpu().resolve_conj().resolve_neg().numpy()
    return read_array(array if array.ndim == 2 else array.transpose(1, 2, 0), options, label)


def _has_channels_first(shape: Sequence[int]) -> bool:
    return len(shape) == 3 and shape[:1] in _CHANNELS


def _as_uint8(values: np.ndarray, label: str) -> np.ndarray:
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:  # either byte order
        return uint16_to_uint8(values)
    if values.dtype.kind != "f":
        raise InputError(f"{label}: expected dtype uint8, uint16, bool or floating point in 0..1, got {values.dtype}")
    check_finite(label, values)
    low, high = float(values.min()), float(values.max())
    if low < 0.0 or high > 1.0:
        raise InputError(
            f"{label}: expected floating point in 0..1, got {low:g}..{high:g}; scale it, or pass uint8 for 0..255"
        )
    return unit_to_uint8(values)
