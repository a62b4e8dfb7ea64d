"""How a matrix is multiplied by a few rows on a card: a small table, as measured, in tuned.json.

    {"NVIDIA H200": [{"rows": 1, "outputs": 6144, "inputs": 4096, "weight": "bfloat16", "use": [4, 512, 1, 2]}, ..]}

rows: 1, or 16 for 2 to 16.  outputs, inputs: of the weight as it is stored.  use: a Tile of linear_decode or
head_argmax, or "cublas". What is not in it takes the tile that these name themselves or, for several rows of weights
that are not int8, cuBLAS. `python -m bench.gpu --tune` measures a card's and writes them.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

TABLE = Path(__file__).with_name("tuned.json")
CUBLAS = "cublas"


class Tile(NamedTuple):
    """What a thread block does at once: outputs x columns of a weight, in `warps` warps.

    Of one row, outputs are 32 or fewer, whose sums a warp's lanes share, columns are 256 for each warp, or more,
    and stages is 1: weights go to registers. Of several, each warp has an equal share of the columns, 16 or more,
    and stages is how many such pieces are on their way through shared memory.
    """

    outputs: int
    columns: int
    stages: int
    warps: int

    def options(self) -> dict[str, int]:
        """As kernels are launched with."""
        block = {"BLOCK_N": self.outputs, "BLOCK_K": self.columns, "STAGES": self.stages}
        return block | {"WARPS": self.warps, "num_warps": self.warps}


class Shape(NamedTuple):
    """rows: 1 or 16.  weight: name of its dtype."""

    rows: int
    outputs: int
    inputs: int
    weight: str

    @classmethod
    def of(cls, num_rows: int, weight: torch.Tensor) -> Shape:
        """weight: [outputs, inputs]."""
        outputs, inputs = weight.shape
        return cls(1 if num_rows == 1 else 16, outputs, inputs, str(weight.dtype).removeprefix("torch."))


def entry(shape: Shape, use: Tile | str) -> dict[str, Any]:
    """As the table has it."""
    return {**shape._asdict(), "use": use if use == CUBLAS else list(use)}


@functools.cache
def choices(card: str) -> dict[Shape, Tile | str]:
    """All that is known of a card."""
    found: dict[Shape, Tile | str] = {}
    for row in json.loads(TABLE.read_text()).get(card, []):
        use = row.pop("use")
        found[Shape(**row)] = CUBLAS if use == CUBLAS else Tile(*map(int, use))
    return found


def choices_of(device: torch.device) -> dict[Shape, Tile | str]:
    """Of its card: the very table that kernels look into."""
    return choices(_card(device))


def prefers_cublas(num_rows: int, weight: torch.Tensor) -> bool:
    return _choice(num_rows, weight) == CUBLAS


def tuned_tile(num_rows: int, weight: torch.Tensor) -> Tile | None:
    found = _choice(num_rows, weight)
    return found if isinstance(found, Tile) else None


def _choice(num_rows: int, weight: torch.Tensor) -> Tile | str | None:
    return choices_of(weight.device).get(Shape.of(num_rows, weight)) if weight.is_cuda else None


@functools.cache
def _card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)
