from __future__ import annotations

import importlib
import json

import pytest
import torch

from vitalrt_kernels import tuned
from vitalrt_kernels.tuned import CUBLAS, Shape, Tile

linear_decode = importlib.import_module("vitalrt_kernels.linear_decode")  # whose function hides it


@pytest.fixture
def write_table(tmp_path, monkeypatch):
    """write_table({card: [entry, ..]}): the table of this test."""
    monkeypatch.setattr(tuned, "TABLE", tmp_path / "tuned.json")

    def write(table: dict) -> None:
        tuned.TABLE.write_text(json.dumps(table))
        tuned.choices.cache_clear()

    yield write
    tuned.choices.cache_clear()


class OnCard:
    """A weight as the table looks at it."""

    is_cuda, device = True, "cuda:0"

    def __init__(self, outputs: int, inputs: int, dtype: torch.dtype = torch.bfloat16) -> None:
        self.shape, self.dtype = (outputs, inputs), dtype


def test_the_table_is_read_by_card_and_shape(write_table, monkeypatch) -> None:
    tile = Tile(8, 512, stages=3, warps=4)
    entries = [
        tuned.entry(Shape(1, 64, 32, "bfloat16"), CUBLAS),
        tuned.entry(Shape(16, 64, 32, "bfloat16"), tile),
        tuned.entry(Shape(1, 64, 32, "int8"), tile),
    ]
    write_table({"card": entries})
    monkeypatch.setattr(tuned, "_card", lambda device: "card")
    weight, int8 = OnCard(64, 32), OnCard(64, 32, torch.int8)
    assert tuned.prefers_cublas(1, weight) and tuned.tuned_tile(1, weight) is None
    assert not tuned.prefers_cublas(2, weight) and tuned.tuned_tile(2, weight) == tuned.tuned_tile(16, weight) == tile
    assert tuned.tuned_tile(1, int8) == tile and tuned.tuned_tile(2, int8) is None
    assert not tuned.prefers_cublas(1, OnCard(64, 33)) and tuned.tuned_tile(2, OnCard(63, 32)) is None
    assert tuned.choices("another") == {}


def test_a_cpu_has_no_table(monkeypatch) -> None:
    monkeypatch.setattr(tuned, "choices", None)
    assert tuned.tuned_tile(1, torch.ones(2, 2)) is None and not tuned.prefers_cublas(1, torch.ones(2, 2))


@pytest.mark.parametrize(
    ("bad", "error"), [({"use": "cuda"}, ValueError), ({"use": [1] * 3}, TypeError), ({"x": 1}, TypeError)]
)
def test_an_entry_that_is_none_is_an_error(write_table, bad: dict, error: type[Exception]) -> None:
    good = {"rows": 1, "outputs": 2, "inputs": 3, "weight": "int8", "use": CUBLAS}
    write_table({"card": [good], "other": [good | bad]})
    assert len(tuned.choices("card")) == 1
    with pytest.raises(error):
        tuned.choices("other")


def test_the_table_in_the_repository_is_well_formed() -> None:
    for card in json.loads(tuned.TABLE.read_text()):
        assert all(shape.rows in (1, 16) for shape in tuned.choices(card))


class Launches:
    """A kernel that remembers what it was launched with, and does nothing."""

    def __init__(self) -> None:
        self.seen: list[tuple[tuple[int, ...], dict]] = []

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda *args, **options: self.seen.append((grid, options))


@pytest.mark.parametrize("name", ["linear_decode", "head_argmax"])
def test_kernels_are_launched_with_the_tuned_tile(name: str, device: str, monkeypatch) -> None:
    gpu = importlib.import_module(f"vitalrt_kernels.gpu.{name}")
    tile, launches, default = Tile(2, 256, stages=1, warps=1), Launches(), Launches()
    x, weight = torch.ones(1, 32, device=device), torch.ones(64, 32, device=device)
    rest = (None, None, False) if name == "linear_decode" else (torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    monkeypatch.setattr(gpu, f"_{name}_kernel", default)
    getattr(gpu, name)(x, weight, *rest)
    monkeypatch.setattr(gpu, f"_{name}_kernel", launches)
    monkeypatch.setattr(gpu, "tuned_tile", lambda num_rows, values: tile if (num_rows, values) == (1, weight) else None)
    getattr(gpu, name)(x, weight, *rest)
    [(grid, options)] = launches.seen
    assert grid == (32,) and tile.options().items() <= options.items() and default.seen[0][0] != grid


def test_cublas_serves_where_the_table_says_so(monkeypatch) -> None:
    x, weight = torch.ones(1, 8), torch.ones(4, 8)
    assert not linear_decode.is_for_cublas(x, weight)
    monkeypatch.setattr(linear_decode, "prefers_cublas", lambda num_rows, values: (num_rows, values) == (1, weight))
    assert linear_decode.is_for_cublas(x, weight)


def test_cublas_serves_several_rows_but_for_a_tuned_tile_and_int8(monkeypatch) -> None:
    weight = torch.ones(4, 8)
    int8 = linear_decode.quantise_int8(weight)

    def for_cublas(of: object, *rows: int) -> list[bool]:
        return [linear_decode.is_for_cublas(torch.ones(count, 8), of) for count in rows]

    assert for_cublas(weight, 1, 2, 16, 17) == [False, True, True, True]
    assert for_cublas(int8, 1, 2, 64, 65) == [False, False, False, True]
    monkeypatch.setattr(linear_decode, "tuned_tile", lambda num_rows, values: Tile(32, 256, stages=3, warps=4))
    assert for_cublas(weight, 1, 2, 16, 17) == [False, False, False, True]
