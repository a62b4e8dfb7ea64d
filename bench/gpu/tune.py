"""Which tile, or cuBLAS, is fastest for each matrix of the model on this card: what tuned.json should say of it.

Held to the default tile's result before it is timed: with cold weights, in CUDA graphs, as bench.gpu.kernels does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from bench.files import replace_whole
from bench.gpu.record import Record, in_short
from bench.gpu.timing import replayed_us
from vitalrt.model.qwen3_vl import Qwen3VL
from vitalrt_kernels import Int8Weight, Norm, new_tickets, quantise_int8
from vitalrt_kernels.linear_decode import MAX_ROWS, linear_cublas
from vitalrt_kernels.tuned import CUBLAS, TABLE, Shape, Tile, entry

GAIN = 0.98  # of the default's time: less is not worth an entry
FURTHEST = 2e-2  # relative error from the default's result
LONGEST_S = 20  # of one matrix
TILES = {
    1: (
        Tile(4, 512, 1, 2), Tile(2, 512, 1, 2), Tile(8, 512, 1, 2), Tile(4, 1024, 1, 4), Tile(2, 1024, 1, 4),
        Tile(8, 1024, 1, 4), Tile(4, 2048, 1, 8), Tile(8, 2048, 1, 8), Tile(16, 512, 1, 2), Tile(4, 256, 1, 1),
        Tile(8, 256, 1, 1),
    ),
    MAX_ROWS: (
        Tile(32, 256, 3, 8), Tile(32, 256, 4, 8), Tile(32, 512, 3, 8), Tile(16, 256, 4, 8), Tile(16, 512, 3, 8),
        Tile(64, 256, 3, 8), Tile(32, 256, 3, 4), Tile(16, 256, 3, 4),
    ),
}  # fmt: skip


class Matrix(NamedTuple):
    """run(i, tile): its product, as a step does it, by the i-th of `weights`; cublas(i): the same by torch.

    numbers: of a result, what it is held to the default's by.
    """

    name: str
    weights: list[Any]
    run: Callable[[int, Tile | None], torch.Tensor]
    cublas: Callable[[int], torch.Tensor]
    numbers: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.double

    def shape(self, num_rows: int) -> Shape:
        first = self.weights[0]
        return Shape.of(num_rows, first.values if isinstance(first, Int8Weight) else first)


def measure(record: Record, model: Qwen3VL) -> dict[str, Any]:
    """The model's own weights first, for one row; int8 last. What there was no time for keeps its default."""
    device = model.decoder.embed.weight.device
    entries: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for as_int8 in (False, True):
        for num_rows in TILES:
            for matrix in matrices(model, num_rows, as_int8):
                if record.seconds_left < LONGEST_S:
                    return {"entries": entries, "rows": rows, "note": "the time was over before the last matrix"}
                row = _measure_one(matrix, num_rows, as_int8, device)
                rows.append(row)
                best = min(row["us"], key=row["us"].get)
                if best != "default" and row["us"][best] < GAIN * row["us"]["default"]:
                    use = CUBLAS if best == CUBLAS else next(t for t in TILES[num_rows] if str([*t]) == best)
                    entries.append(entry(matrix.shape(num_rows), use))
                record.tell("tune", rows=rows, entries=entries)
    return {"entries": entries, "rows": rows}


def _measure_one(matrix: Matrix, num_rows: int, as_int8: bool, device: torch.device) -> dict[str, Any]:
    contenders: dict[str, Callable[[int], torch.Tensor]] = {"default": lambda i: matrix.run(i, None)}
    for tile in TILES[num_rows]:
        contenders[str([*tile])] = lambda i, tile=tile: matrix.run(i, tile)
    if not as_int8:
        contenders[CUBLAS] = matrix.cublas
    expected = matrix.numbers(contenders["default"](0))
    us: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name, run in contenders.items():
        try:
            error = float((matrix.numbers(run(0)) - expected).norm() / expected.norm())
            if not error < FURTHEST:
                raise RuntimeError(f"relative error {error:.2e}")
            us[name] = replayed_us(run, len(matrix.weights), device, rounds=5)["p50"]
        except Exception as error:  # too much shared memory on this card, say
            if name == "default" or isinstance(error, TimeoutError):
                raise
            failed[name] = in_short(error)
    row = {"matrix": matrix.name, "rows": num_rows, "int8": as_int8, "us": us}
    return row | ({"failed": failed} if failed else {})


def matrices(model: Qwen3VL, num_rows: int, as_int8: bool) -> Iterator[Matrix]:
    """Those of a layer, and the head."""
    from vitalrt_kernels.gpu import head_argmax, linear_decode

    config, layers = model.config.decoder, model.decoder.layers
    x = torch.randn(num_rows, config.hidden_size).to(model.decoder.embed.weight)
    norm = Norm(layers[0].input_norm.weight.detach(), config.rms_norm_eps)
    for name, before, residual, swiglu in (
        ("qkv", norm, None, False),
        ("o", None, x, False),
        ("gate_up", norm, None, True),
        ("down", None, x, False),
    ):
        own = [layer.get_submodule(name).weight.detach() for layer in layers]
        weights: list[Any] = [quantise_int8(weight) for weight in own[:12]] if as_int8 else own
        inputs = torch.randn(num_rows, own[0].shape[1]).to(x)
        yield Matrix(
            name,
            weights,
            lambda i, tile, weights=weights, inputs=inputs, rest=(before, residual, swiglu): (
                linear_decode.linear_decode(inputs, weights[i], *rest, tile)
            ),
            lambda i, weights=weights, inputs=inputs, rest=(before, residual, swiglu): linear_cublas(
                inputs, weights[i], *rest
            ),
        )
    own_head = model.decoder.head.weight.detach()
    head = quantise_int8(own_head) if as_int8 else own_head
    tickets, tokens = new_tickets(1, x.device), torch.zeros(num_rows, dtype=torch.int64, device=x.device)

    def choose(i: int, tile: Tile | None) -> torch.Tensor:
        head_argmax.head_argmax(x, head, tickets, tokens, tile)
        return tokens

    yield Matrix(
        "head",
        [head] * 3,  # larger than L2: each reads it from memory
        choose,
        lambda i: linear_cublas(x, head).argmax(-1),
        # Of the tokens their logits: two of the same size may be chosen either way.
        lambda tokens: (x.double() * own_head[tokens].double()).sum(1),
    )


def write_table(card: str, entries: list[dict[str, Any]]) -> str:
    """Into tuned.json, in place of what it had of this card. Returns its text."""
    table = json.loads(TABLE.read_text()) | {card: entries}
    cards = [
        f"{json.dumps(name)}: [\n" + ",\n".join(f"  {json.dumps(one)}" for one in of_card) + "\n ]"
        for name, of_card in table.items()
    ]
    text = "{\n " + ",\n ".join(cards) + "\n}\n"
    replace_whole(TABLE, lambda path: path.write_text(text, encoding="utf-8"))
    return text
