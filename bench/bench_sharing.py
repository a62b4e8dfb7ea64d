"""What sharing brings: later questions about an image that has been asked about, and many requests in one batch.

Both are interleaved runs of the same requests with and without, on fresh test phantoms, from pixels to text.

- reuse: each round asks all questions of one new phantom, one after the other, of a model with a prefix cache and of
  one without. The first question is listed apart: nothing is cached yet.
- batch: each round answers CONCURRENT requests, one at a time and in one batch, by the same model: about as many new
  phantoms, without a prefix cache, with short answers and with answers of LONG_ANSWER tokens; and about a few new
  phantoms, several questions each, with a prefix cache that both ways of asking profit from.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pytest
import rich.box
from rich.console import Console
from rich.table import Table

import vitalrt
from bench.report import commit
from vitalrt import Terms, latency
from vitalrt.api import Model
from vitalrt.files import replace_whole
from vitalrt.latency import Spread, rounded
from vitalrt_training.data.phantom import Phantom, ask, draw_phantom

CONCURRENT = 16
K = 4
LONG_ANSWER = 48
SEED = 20


def phantom_of(index: int) -> Phantom:
    return draw_phantom("test", SEED, index)


def time_ms(call: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = call()
    return (time.perf_counter() - started) * 1000, result


def in_turn(round_: int, calls: dict[str, Callable[[], Any]]) -> dict[str, tuple[float, Any]]:
    """Each call's milliseconds and result; every round begins with another one."""
    names = list(calls)
    return {name: time_ms(calls[name]) for name in names[round_ % len(names) :] + names[: round_ % len(names)]}


def measure_reuse(cached: Model, uncached: Model, rounds: int) -> dict[str, Any]:
    """Milliseconds by place of the question (first, later), and the ratio of each pair."""
    models = {"cached": cached, "uncached": uncached}
    total, prefill = (
        {place: {name: list[float]() for name in models} for place in ("first", "later")} for _ in ("total", "prefill")
    )
    num_tokens = num_cached = 0
    before = cached.engine.statistics()
    for round_ in range(rounds + 1):
        phantom = phantom_of(round_)
        for number, sample in enumerate(ask(phantom)):
            calls = {name: partial(one.generate, phantom.image, sample.question, K) for name, one in models.items()}
            found = in_turn(round_ + number, calls)
            assert found["cached"][1].token_ids == found["uncached"][1].token_ids
            if not round_:
                continue  # warms up
            place = "later" if number else "first"
            for name, (milliseconds, answer) in found.items():
                total[place][name].append(milliseconds)
                prefill[place][name].append(answer.timings.prefill)
            if number:
                num_tokens += found["cached"][1].usage.prompt_tokens
                num_cached += found["cached"][1].usage.cached_tokens
    after = cached.engine.statistics()
    assert after.images_encoded - before.images_encoded == rounds + 1  # nobody has looked twice
    return {
        "rounds": rounds,
        "later_questions": len(total["later"]["cached"]),
        "later_hit_rate": round(num_cached / num_tokens, 4),
        "total": {place: compared(times) for place, times in total.items()},
        "prefill": {place: compared(times) for place, times in prefill.items()},
    }


def compared(times: dict[str, list[float]]) -> dict[str, Any]:
    pairs = zip(times["uncached"], times["cached"], strict=True)
    return {
        "ms": {name: rounded(Spread.of(values)) for name, values in times.items()},
        "uncached_over_cached": rounded(Spread.of([slow / fast for slow, fast in pairs])),
    }


def requests_of(round_: int, num_phantoms: int, answer_tokens: int | None) -> list[vitalrt.Request]:
    """CONCURRENT requests about as many or fewer phantoms that no other round is about."""
    phantoms = [phantom_of(1000 + round_ * CONCURRENT + n) for n in range(num_phantoms)]
    asked = [(phantom, sample) for phantom in phantoms for sample in ask(phantom)[: CONCURRENT // num_phantoms]]
    return [
        vitalrt.Request(phantom.image, sample.question, k=K, max_new_tokens=answer_tokens or 64)
        for phantom, sample in asked
    ]


def measure_batch(model: Model, rounds: int, num_phantoms: int, answer_tokens: int | None) -> dict[str, Any]:
    """answer_tokens: what every answer is made to have; None lets them end where they end."""
    ways = {
        "one at a time": lambda requests: [model.generate_batch([request])[0] for request in requests],
        "batch": model.generate_batch,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    num_tokens = []
    stop_ids = model.engine.stop_ids
    model.engine.stop_ids = stop_ids if answer_tokens is None else frozenset()
    try:
        for round_ in range(rounds + 1):
            # Each way has tenants of its own, or the second would find what the first has left.
            asked = {
                name: [replace(one, terms=Terms(cache_salt=f"{name} {round_}")) for one in requests]
                for name, requests in dict.fromkeys(ways, requests_of(round_, num_phantoms, answer_tokens)).items()
            }
            found = in_turn(round_, {name: partial(ways[name], requests) for name, requests in asked.items()})
            alone, together = ([answer.token_ids for answer in found[name][1]] for name in ways)
            assert alone == together
            num_tokens += [answer.usage.completion_tokens for answer in found["batch"][1]]
            if round_:
                for name, (milliseconds, _) in found.items():
                    times[name].append(milliseconds)
    finally:
        model.engine.stop_ids = stop_ids
    ratios = [slow / fast for slow, fast in zip(times["one at a time"], times["batch"], strict=True)]
    return {
        "rounds": rounds,
        "concurrent": CONCURRENT,
        "phantoms": num_phantoms,
        "prefix_cache": model.engine.config.prefix_cache,
        "completion_tokens": statistics.mean(num_tokens),
        "ms": {name: rounded(Spread.of(values)) for name, values in times.items()},
        "one_at_a_time_over_batch": rounded(Spread.of(ratios)),
    }


def test_sharing(model: Model, pytestconfig: pytest.Config) -> None:
    """Prints the tables and writes sharing-cpu.json (or whichever device it is)."""
    option = pytestconfig.getoption
    where = (option("bench_model"), option("bench_adapter"), option("bench_device"), option("bench_dtype"))
    rounds = option("bench_rounds")
    cached = vitalrt.load(*where)
    batches = ((model, CONCURRENT, None), (model, CONCURRENT, LONG_ANSWER), (cached, 4, None), (cached, 4, LONG_ANSWER))
    result = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "environment": latency.environment(model),
        "k": K,
        "reuse": measure_reuse(cached, model, rounds),
        "batch": [measure_batch(one, max(1, rounds // 4), *of) for one, *of in batches],
    }
    device = model.weights.decoder.embed.weight.device.type
    path = option("bench_out") / f"sharing-{device}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_whole(path, lambda partial: partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8"))
    with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        console = Console(width=120)
        for shown in tables(result):
            console.print(shown)
        console.print("written:", path)


def tables(result: dict[str, Any]) -> Sequence[Table]:
    reuse = Table(title="Questions about one image, K = 4, median ms", box=rich.box.SIMPLE_HEAD)
    for column in ("question", "what", "no cache", "prefix cache", "ratio p20", "p50", "p80"):
        reuse.add_column(column, justify="right")
    for what in ("total", "prefill"):
        for place, found in result["reuse"][what].items():
            ratio = [f"{value:.2f}" for value in found["uncached_over_cached"].values()]
            times = [f"{found['ms'][name]['p50']:.1f}" for name in ("uncached", "cached")]
            reuse.add_row(place, what, *times, *ratio)
    batch = Table(title=f"{CONCURRENT} requests, K = 4, median ms for all", box=rich.box.SIMPLE_HEAD)
    for column in (
        "images",
        "prefix cache",
        "tokens an answer",
        "one at a time",
        "in one batch",
        "ratio p20",
        "p50",
        "p80",
    ):
        batch.add_column(column, justify="right")
    for found in result["batch"]:
        ratio = [f"{value:.2f}" for value in found["one_at_a_time_over_batch"].values()]
        times = [f"{found['ms'][name]['p50']:.0f}" for name in ("one at a time", "batch")]
        shared = "yes" if found["prefix_cache"] else "no"
        batch.add_row(str(found["phantoms"]), shared, f"{found['completion_tokens']:.1f}", *times, *ratio)
    return reuse, batch
