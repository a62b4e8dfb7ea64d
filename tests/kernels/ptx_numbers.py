"""PTX's types, and what is computed of numbers alone: an array has one for each thread."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from ptx_memory import PtxError

Array = np.ndarray

TYPES = {
    "s64": np.int64, "u64": np.uint64, "b64": np.uint64, "s32": np.int32, "u32": np.uint32, "b32": np.uint32,
    "s16": np.int16, "u16": np.uint16, "b16": np.uint16, "s8": np.int8, "u8": np.uint8, "b8": np.uint8,
    "f64": np.float64, "f32": np.float32, "f16": np.float16, "pred": np.bool_,
}  # fmt: skip


def wider(kind: str) -> Any:
    if kind not in ("s32", "u32"):
        raise PtxError(f"products of {kind} that are wider")
    return np.int64 if kind == "s32" else np.uint64


def split(bits: Array, num_parts: int = 2) -> list[Array]:
    parts = np.ascontiguousarray(bits).view(f"u{bits.dtype.itemsize // num_parts}").reshape(-1, num_parts)
    return [np.ascontiguousarray(part) for part in parts.T]


def join(*parts: Array) -> Array:
    return np.stack(parts, 1).view(f"u{parts[0].dtype.itemsize * len(parts)}")[:, 0]


def as_numbers(bits: Array, kind: str) -> Array:
    """bf16 as fp32."""
    return widen_bf16(bits) if kind == "bf16" else bits.view(TYPES[kind])


def as_bits(numbers: Array, kind: str) -> Array:
    if kind == "bf16":
        return narrow_bf16(numbers)
    narrow = numbers.astype(TYPES[kind])
    return narrow.view(f"u{narrow.dtype.itemsize}")


def widen_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow_bf16(values: Array) -> Array:
    """To the nearest, ties to even."""
    bits = values.astype(np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def _fused(a: Array, b: Array, c: Array) -> Array:
    """In c's dtype, where a and b may be narrower. One rounding: fp32 in fp64, fp64 in what is longer."""
    wide = np.longdouble if c.dtype == np.float64 else np.float64
    return (a.astype(wide) * b.astype(wide) + c.astype(wide)).astype(c.dtype)


def _divided(a: Array, b: Array) -> Array:
    return a / b if a.dtype.kind == "f" else np.trunc(a / b).astype(a.dtype)


OF_EACH: dict[str, Callable[..., Array]] = {
    "add": np.add, "sub": np.subtract, "div": _divided, "fma": _fused, "abs": np.abs, "neg": np.negative,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "min": lambda *a: functools.reduce(np.fmin, a), "max": lambda *a: functools.reduce(np.fmax, a),
}  # fmt: skip


def compare(comparison: str, a: Array, b: Array) -> Array:
    compare: dict[str, Callable[[Array, Array], Array]] = {
        "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
        "ge": np.greater_equal, "nan": lambda a, b: np.isnan(a) | np.isnan(b),
    }  # fmt: skip
    if comparison in compare:
        result = compare[comparison](a, b)
        return result & ~np.isnan(a) & ~np.isnan(b) if comparison == "ne" and a.dtype.kind == "f" else result
    if comparison[-1] == "u" and comparison[:-1] in compare:  # true also where one is NaN
        return compare[comparison[:-1]](a, b) | np.isnan(a) | np.isnan(b)
    raise PtxError(f"setp: no comparison {comparison}")
