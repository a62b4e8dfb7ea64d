"""The decoder in C++ against the decoder in torch, where a model has both: what the limits of the core rest on.

An interleaved run of the same passes through either: steps of 1 to 64 sequences of CONTEXT tokens, and prompts.
"""

from __future__ import annotations

import json
import random
import time
from datetime import UTC, datetime
from typing import Any
from unittest import mock

import pytest
import rich.box
from rich.console import Console
from rich.table import Table

import vitalrt
from bench.files import commit
from vitalrt import Prompt, latency
from vitalrt.api import Model
from vitalrt.engine.request import Decoding
from vitalrt.files import replace_whole
from vitalrt.latency import Spread, rounded

CONTEXT = 60
STEPS = (1, 4, 16, 64)  # sequences
PROMPTS = ((1, 50), (1, 100), (1, 200), (4, 50), (16, 50), (16, 100))  # sequences, tokens of each
WARM_UP = 3


def prompts_of(model: Model, count: int, num_tokens: int) -> list[Prompt]:
    draw, config = random.Random(num_tokens), model.checkpoint.config
    ids = [token for token in range(config.decoder.vocab_size) if token < config.image_token_id]
    return [Prompt([draw.choice(ids) for _ in range(num_tokens)]) for _ in range(count)]


def advance_ms(model: Model) -> float:
    started = time.perf_counter()
    model.engine.advance()
    return (time.perf_counter() - started) * 1000


def in_turns(model: Model, rounds: int, run: Any) -> dict[str, Spread]:
    """Milliseconds of run() in C++ and in torch, by turns; max_tokens no longer chooses."""
    core, times = model.engine.cpu_decoder, {"C++": list[float](), "torch": list[float]()}
    for round_ in range(rounds + WARM_UP):
        for name in list(times)[:: 1 if round_ % 2 else -1]:
            decoder = core if name == "C++" else None
            with mock.patch.object(model.engine, "cpu_decoder", decoder), mock.patch.object(core, "max_tokens", 2**62):
                milliseconds = run()
            if round_ >= WARM_UP:
                times[name].append(milliseconds)
    return {name: Spread.of(values) for name, values in times.items()}


def measure_steps(model: Model, rounds: int, count: int) -> dict[str, Spread]:
    decoding = Decoding(k=64, max_new_tokens=2 * (rounds + WARM_UP))  # one latent step or answer token a run
    with mock.patch.object(model.engine, "stop_ids", frozenset()):
        running = [model.engine.submit(prompt, decoding) for prompt in prompts_of(model, count, CONTEXT)]
        try:
            model.engine.advance()
            return in_turns(model, rounds, lambda: advance_ms(model))
        finally:
            for sequence in running:
                model.engine.cancel(sequence)


def measure_prompts(model: Model, rounds: int, count: int, num_tokens: int) -> dict[str, Spread]:
    def run() -> float:
        running = [model.engine.submit(prompt, Decoding(0, 1)) for prompt in prompts_of(model, count, num_tokens)]
        milliseconds = advance_ms(model)
        assert all(sequence.is_finished for sequence in running)
        return milliseconds

    return in_turns(model, rounds, run)


def test_cpu_decoder(pytestconfig: pytest.Config) -> None:
    """Prints the table and writes cpu-decoder.json."""
    option = pytestconfig.getoption
    rounds, path = option("bench_rounds"), option("bench_out") / "cpu-decoder.json"
    model = vitalrt.load(option("bench_model"), option("bench_adapter"), "cpu", "float32", prefix_cache=False)
    if model.engine.cpu_decoder is None:
        pytest.skip("this model's decoder runs in torch alone")
    found = {(f"step of {count}", CONTEXT): measure_steps(model, rounds, count) for count in STEPS}
    found |= {(f"{count} prompts", tokens): measure_prompts(model, rounds, count, tokens) for count, tokens in PROMPTS}
    rows = [
        {"what": what, "tokens": tokens, "ms": {name: rounded(spread) for name, spread in times.items()}}
        for (what, tokens), times in found.items()
    ]
    created = datetime.now(UTC).isoformat(timespec="seconds")
    result = {"created": created, "commit": commit(), "environment": latency.environment(model), "rows": rows}
    replace_whole(path, lambda partial: partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8"))
    table = Table(title="The decoder, median ms a pass", box=rich.box.SIMPLE_HEAD)
    for column in ("pass", "tokens", "C++", "torch", "torch over C++"):
        table.add_column(column, justify="right")
    for (what, tokens), times in found.items():
        ours, theirs = times["C++"].p50, times["torch"].p50
        table.add_row(what, str(tokens), f"{ours:.2f}", f"{theirs:.2f}", f"{theirs / ours:.2f}")
    with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        Console(width=100).print(table, "written:", path)
