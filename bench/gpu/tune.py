"""Which tile, or cuBLAS, is fastest for each matrix of the model on this card: what tuned.json should say of it.

Timed within steps of the whole model, as a launch overlaps its neighbours: what is fastest alone need not be so there.
One matrix after the other, among what was chosen for those before, its contenders take turns, each of them held to the
default's result before.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from bench.gpu.ours import Ours
from bench.gpu.record import Record, in_short
from bench.gpu.shapes import BenchPrompt, prompt_of
from bench.gpu.timing import time_ms
from vitalrt.engine.device_step import StepWeights
from vitalrt.engine.graphs import StepGraphs
from vitalrt.files import replace_whole
from vitalrt.model.qwen3_vl import Qwen3VL
from vitalrt_kernels import Int8Weight, Norm, new_tickets, quantise_int8
from vitalrt_kernels.linear_decode import MAX_ROWS, linear_cublas
from vitalrt_kernels.tuned import CUBLAS, TABLE, Shape, Tile, choices_of, entry

GAIN = 0.998  # of the step's time, and faster in every round: less is not worth an entry
FURTHEST = 2e-2  # relative error from the default's result
LONGEST_S = 20  # of one matrix
PROMPT, STEPS, ROUNDS = 500, 8, 5
TILES = {
    1: (
        Tile(16, 1024, 1, 4), Tile(8, 1024, 1, 4), Tile(4, 1024, 1, 4), Tile(32, 1024, 1, 4), Tile(16, 512, 1, 2),
        Tile(8, 512, 1, 2), Tile(4, 512, 1, 2), Tile(32, 512, 1, 2), Tile(16, 2048, 1, 8), Tile(8, 2048, 1, 8),
        Tile(4, 2048, 1, 8), Tile(8, 4096, 1, 16), Tile(16, 256, 1, 1), Tile(8, 256, 1, 1),
    ),
    MAX_ROWS: (
        Tile(32, 256, 3, 4), Tile(32, 512, 3, 8), Tile(16, 256, 3, 4), Tile(16, 512, 3, 8), Tile(32, 256, 4, 4),
        Tile(64, 256, 3, 8),
    ),
}  # fmt: skip


class Matrix(NamedTuple):
    """run(tile): its product, as a step does it, by the weight of one layer; cublas(): the same by torch.

    most_outputs: of a tile, as registers hold their weights.  numbers: of a result, what is held to the default's.
    """

    name: str
    weight: torch.Tensor | Int8Weight
    run: Callable[[Tile | None], torch.Tensor]
    cublas: Callable[[], torch.Tensor]
    most_outputs: int = 64
    numbers: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.double

    def tiles(self, num_rows: int) -> list[Tile]:
        return [tile for tile in TILES[num_rows] if tile.outputs <= self.most_outputs]

    def shape(self, num_rows: int) -> Shape:
        weight = self.weight
        return Shape.of(num_rows, weight.values if isinstance(weight, Int8Weight) else weight)


class Steps:
    """Steps of the whole model over num_rows rows, each with a prompt of PROMPT tokens in its cache."""

    def __init__(self, model: Qwen3VL, num_rows: int, as_int8: bool) -> None:
        self.num_rows = num_rows
        self._prompt: BenchPrompt = prompt_of(model.config, PROMPT)
        weights = StepWeights(model.decoder, int8=True) if as_int8 else None
        self._ours = Ours(model, num_rows, self._prompt.num_tokens + 2 * STEPS, weights)

    def _begin(self) -> None:
        for row in range(self.num_rows):
            self._ours.begin(self._prompt, 2 * STEPS, row)

    def captured(self, answers: bool) -> Callable[[], float]:
        """With what the table says now. Its result: milliseconds of one step, of STEPS of them."""
        graphs = StepGraphs(self._ours.step)

        def steps() -> None:
            for _ in range(STEPS):
                graphs.step(self.num_rows, answers)

        def timed() -> float:
            self._begin()
            return time_ms(steps, self._ours.device) / STEPS

        self._begin()
        graphs.step(self.num_rows, answers)
        return timed


def measure(record: Record, model: Qwen3VL) -> dict[str, Any]:
    """The model's own weights first, for one row; int8 last. What there was no time for keeps what it had."""
    device = model.decoder.embed.weight.device
    table = choices_of(device)
    rows: list[dict[str, Any]] = []
    outcome: dict[str, Any] = {}
    for steps, matrix, as_int8 in _in_order(model):
        if record.seconds_left < LONGEST_S:
            outcome["note"] = "the time was over before the last matrix"
            break
        rows.append(_measure_one(matrix, steps, as_int8, table))
        outcome |= {"rows": rows, "entries": [entry(*row) for row in table.items()]}
        record.tell("tune", **outcome)
    return outcome


def _in_order(model: Qwen3VL) -> Iterator[tuple[Steps, Matrix, bool]]:
    for as_int8 in (False, True):
        for num_rows in TILES:
            steps = Steps(model, num_rows, as_int8)
            for matrix in matrices(model, num_rows, as_int8):
                yield steps, matrix, as_int8


def _measure_one(matrix: Matrix, steps: Steps, as_int8: bool, table: dict[Shape, Tile | str]) -> dict[str, Any]:
    """What is told of it. The table then says what to use, if not the default."""
    shape = matrix.shape(steps.num_rows)
    uses: dict[str, Tile | str | None] = {"default": None} | {
        str([*tile]): tile for tile in matrix.tiles(steps.num_rows)
    }
    if not as_int8 and steps.num_rows == 1:  # of several rows it is the default
        uses[CUBLAS] = CUBLAS
    is_cublas_default = not as_int8 and steps.num_rows > 1
    expected = matrix.numbers(matrix.cublas() if is_cublas_default else matrix.run(None))
    contenders: dict[str, Callable[[], float]] = {}
    failed: dict[str, str] = {}
    for name, use in uses.items():
        try:
            if use is not None:
                result = matrix.run(use) if isinstance(use, Tile) else matrix.cublas()
                error = float((matrix.numbers(result) - expected).norm() / expected.norm())
                if not error < FURTHEST:
                    raise RuntimeError(f"relative error {error:.2e}")
            table.pop(shape, None)
            if use is not None:
                table[shape] = use
            contenders[name] = steps.captured(answers=matrix.name == "head")
        except Exception as error:  # too much shared memory on this card, say
            if name == "default" or isinstance(error, TimeoutError):
                raise
            failed[name] = in_short(error)
    took: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, timed in contenders.items():
            took[name].append(timed())
    ms = {name: round(statistics.median(times), 5) for name, times in took.items()}
    best = min(ms, key=lambda name: ms[name])
    is_always_faster = all(mine < other for mine, other in zip(took[best], took["default"], strict=True))
    chosen = uses[best] if is_always_faster and ms[best] < GAIN * ms["default"] else None
    table.pop(shape, None)
    if chosen is not None:
        table[shape] = chosen
    row = {"matrix": matrix.name, "rows": steps.num_rows, "int8": as_int8, "ms": ms}
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
        own = layers[0].get_submodule(name).weight.detach()
        inputs = torch.randn(num_rows, own.shape[1]).to(x)
        arguments = (inputs, quantise_int8(own) if as_int8 else own, before, residual, swiglu)
        yield Matrix(
            name,
            arguments[1],
            lambda tile, arguments=arguments: linear_decode.linear_decode(*arguments, tile),
            lambda arguments=arguments: linear_cublas(*arguments),
            most_outputs=16 if swiglu and num_rows == 1 else 64,
        )
    own_head = model.decoder.head.weight.detach()
    head = quantise_int8(own_head) if as_int8 else own_head
    tickets, tokens = new_tickets(1, x.device), torch.zeros(num_rows, dtype=torch.int64, device=x.device)

    def choose(tile: Tile | None) -> torch.Tensor:
        head_argmax.head_argmax(x, head, tickets, tokens, tile)
        return tokens

    yield Matrix(
        "head",
        head,
        choose,
        lambda: linear_cublas(x, head).argmax(-1),
        # Of the tokens their logits: two of the same size may be chosen either way.
        numbers=lambda tokens: (x.double() * own_head[tokens].double()).sum(1),
    )


def write_table(card: str, entries: list[dict[str, Any]]) -> str:
    """Into tuned.json, in place of what it had of this card; nothing, where defaults are fastest. Returns its text."""
    table = json.loads(TABLE.read_text()) | {card: entries}
    cards = [
        f"{json.dumps(name)}: [\n" + ",\n".join(f"  {json.dumps(one)}" for one in of_card) + "\n ]"
        for name, of_card in table.items()
        if of_card
    ]
    text = "{\n " + ",\n ".join(cards) + "\n}\n"
    replace_whole(TABLE, lambda path: path.write_text(text, encoding="utf-8"))
    return text
