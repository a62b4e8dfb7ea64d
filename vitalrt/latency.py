"""How long a request takes with K latent steps, and with a written chain of thought instead (VITAL 4.3, Fig. 4).

A request is timed end to end, from image file to text. Contenders take turns within a round, so that whatever else the
machine does meets all of them, and two are compared round by round.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import rich.box
import torch
from rich.table import Table

import vitalrt
from vitalrt.api import Model
from vitalrt.config import EngineConfig
from vitalrt.engine.request import Decoding
from vitalrt.engine.scheduler import Engine
from vitalrt.spread import Spread

ENGINE = "vitalrt"
MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Thought:
    """What a request does between prompt and answer: latent steps, or tokens that it is made to write."""

    latent_steps: int = 0
    written_tokens: int = 0

    def __str__(self) -> str:
        return f"CoT {self.written_tokens}" if self.written_tokens else f"K={self.latent_steps}"


LATENT = tuple(Thought(latent_steps=k) for k in (0, 1, 2, 4))
WRITTEN = tuple(Thought(written_tokens=n) for n in (64, 256, 920))  # 920 is what the paper's 34.1 s amount to


@dataclass(frozen=True)
class Contender:
    """ask() does the request once and returns how many tokens it wrote, the thought and the end token included.

    every: it takes part in every n-th round; the slow ones need not take part in all.
    """

    engine: str
    thought: Thought
    ask: Callable[[], int]
    every: int = 1


@dataclass(frozen=True)
class Row:
    """One contender's result.  milliseconds: by round.  answer_tokens: the end token included where it was written."""

    engine: str
    thought: Thought
    answer_tokens: int
    milliseconds: dict[int, float]

    @property
    def spread(self) -> Spread:
        return Spread.of(list(self.milliseconds.values()))


def interleave(contenders: Sequence[Contender], rounds: int, device: torch.device) -> list[Row]:
    """Ask every contender once to warm up, then in turn, round after round.  Rows in the order of the contenders."""
    written = [contender.ask() for contender in contenders]
    milliseconds: list[dict[int, float]] = [{} for _ in contenders]
    for round_ in range(rounds):
        for contender, measured in zip(contenders, milliseconds, strict=True):
            if round_ % contender.every == 0:
                measured[round_] = _time_ms(contender.ask, device)
    return [
        Row(contender.engine, contender.thought, num_tokens - contender.thought.written_tokens, measured)
        for contender, num_tokens, measured in zip(contenders, written, milliseconds, strict=True)
    ]


def record(row: Row) -> dict[str, Any]:
    """A row as JSON takes it: counts, percentiles and every round, in milliseconds."""
    return {
        "engine": row.engine,
        "thought": str(row.thought),
        "latent_steps": row.thought.latent_steps,
        "written_tokens": row.thought.written_tokens,
        "answer_tokens": row.answer_tokens,
        "ms": rounded(row.spread),
        "ms_by_round": {str(round_): round(value, 3) for round_, value in row.milliseconds.items()},
    }


def rounded(spread: Spread) -> dict[str, float]:
    return {name: round(value, 3) for name, value in spread._asdict().items()}


def speedup(slow: Row, fast: Row) -> Spread:
    """How many times faster `fast` was, over the rounds in which both took part."""
    shared = slow.milliseconds.keys() & fast.milliseconds.keys()
    return Spread.of([slow.milliseconds[round_] / fast.milliseconds[round_] for round_ in sorted(shared)])


def contenders(model: Model, image: Any, question: str, every: int = 1) -> list[Contender]:
    """This model with 0 to 4 latent steps, and writing its thoughts; `every` is for the latter.

    Greedy throughout. Each K answers as it will; a written thought is followed by as many answer tokens as K = 4 wrote.
    """
    answer_tokens = _ask(model, image, question, LATENT[-1].latent_steps)
    longest = max(thought.written_tokens for thought in WRITTEN) + answer_tokens
    cache_tokens = model.prepare(image, question).num_tokens + longest
    # Without end tokens an engine writes exactly as much as it is told to.
    config = EngineConfig(cache_tokens=cache_tokens, max_batch=1, prefix_cache=False)
    writer = Engine(model.weights, config, stop_ids=())
    found = [
        Contender(ENGINE, thought, partial(_ask, model, image, question, thought.latent_steps)) for thought in LATENT
    ]
    for thought in WRITTEN:
        num_tokens = thought.written_tokens + answer_tokens
        found.append(Contender(ENGINE, thought, partial(_write, model, writer, image, question, num_tokens), every))
    return found


def _ask(model: Model, image: Any, question: str, k: int) -> int:
    return model.generate(image, question, k, max_new_tokens=MAX_NEW_TOKENS).usage.completion_tokens


def _write(model: Model, writer: Engine, image: Any, question: str, num_tokens: int) -> int:
    sequence = writer.submit(model.prepare(image, question), Decoding(k=0, max_new_tokens=num_tokens))
    while not sequence.is_finished:
        writer.advance()
    model.processor.decode(sequence.token_ids)
    return sequence.num_completion_tokens


def _time_ms(ask: Callable[[], int], device: torch.device) -> float:
    _synchronize(device)
    started = time.perf_counter()
    ask()
    _synchronize(device)
    return (time.perf_counter() - started) * 1000


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def environment(model: Model) -> dict[str, Any]:
    """What the figures depend on: machine, versions, model."""
    weight = model.weights.decoder.embed.weight
    return {
        "machine": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "device": device_name(weight.device),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "model": model.checkpoint.directory.name,
        "parameters": sum(parameter.numel() for parameter in model.weights.parameters()),
        "versions": {
            "python": platform.python_version(),
            "vitalrt": vitalrt.__version__,
            "torch": torch.__version__,
            "transformers": version("transformers"),
        },
    }


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _processor() -> str:
    """The processor's model name where the system tells it (Linux), else its architecture."""
    description = Path("/proc/cpuinfo")
    lines = description.read_text().splitlines() if description.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def table(rows: Sequence[Row]) -> Table:
    """Latency and token counts, and how many times longer each takes than vitalrt's K = 4."""
    fast = next(row for row in rows if (row.engine, row.thought) == (ENGINE, LATENT[-1]))
    shown = Table(box=rich.box.SIMPLE_HEAD)
    shown.add_column("engine")
    shown.add_column("thought")
    for heading in ("latent steps", "written tokens", "answer tokens", "p20 ms", "p50 ms", "p80 ms"):
        shown.add_column(heading, justify="right")
    shown.add_column(f"× {fast.engine} {fast.thought}", justify="right")
    for row in rows:
        counts = (row.thought.latent_steps, row.thought.written_tokens, row.answer_tokens)
        times = [f"{value:,.1f}" for value in row.spread]
        shown.add_row(row.engine, str(row.thought), *map(str, counts), *times, f"{speedup(row, fast).p50:.2f}")
    return shown
