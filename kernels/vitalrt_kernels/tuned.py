"""Where cuBLAS beats linear_decode and head_argmax: a small table by card and shape, as measured, in tuned.json.

A card or a shape that is not in it takes the Triton form. `python -m bench.gpu --tune` measures a card's and prints it.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch

TABLE = Path(__file__).with_name("tuned.json")


@functools.cache
def cublas_shapes(card: str) -> frozenset[tuple[int, int, int]]:
    """(rows, outputs, inputs) at which cuBLAS is known to be faster there; rows are 1, or 16 for 2 to 16."""
    shapes = json.loads(TABLE.read_text()).get(card, [])
    return frozenset((rows, outputs, width) for rows, outputs, width in shapes)


@functools.cache
def prefers_cublas(device: torch.device, num_rows: int, num_outputs: int, width: int) -> bool:
    shapes = cublas_shapes(torch.cuda.get_device_name(device))
    return (1 if num_rows == 1 else 16, num_outputs, width) in shapes
