"""VITAL Fig. 4 on this machine: K latent steps, a written chain of thought, and transformers at the same work.

What counts is one interleaved run of all contenders (`report`). pytest-benchmark shows and stores that run's rounds,
replayed contender by contender: timing them one after the other would let the machine's moods into the comparison.
"""

from itertools import chain
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from rich.console import Console

from bench.peers import ENGINE as PEER
from bench.peers import TransformersPeer
from bench.report import Report
from vitalrt import latency
from vitalrt.api import Model
from vitalrt.latency import LATENT, WRITTEN, Contender, Thought

WRITTEN_EVERY = 5  # a long thought takes seconds, so it joins every fifth round only


class ReplayClock:
    """A timer that moves only when a recorded duration is played back."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def advance(self, milliseconds: float) -> None:
        self.seconds += milliseconds / 1000


REPLAY = ReplayClock()


@pytest.fixture(scope="module")
def report(model: Model, image_and_question: tuple[Path, str], pytestconfig: pytest.Config) -> Report:
    """The interleaved run. Writes its JSON and its plot, and prints its table."""
    image, question = image_and_question
    weight = model.weights.decoder.embed.weight
    adapter = pytestconfig.getoption("bench_adapter")
    peer = TransformersPeer(model.checkpoint.directory, adapter, weight.device, weight.dtype)
    answer_tokens = require_equal_work(model, peer, image, question)
    ours = latency.contenders(model, image, question, WRITTEN_EVERY)
    theirs = [peer_of(one, peer, image, question, answer_tokens) for one in ours]
    contenders = list(chain.from_iterable(zip(ours, theirs, strict=True)))
    rows = latency.interleave(contenders, pytestconfig.getoption("bench_rounds"), weight.device)
    prompt_tokens = model.prepare(image, question).num_tokens
    result = Report(latency.environment(model), question, prompt_tokens, rows)
    paths = result.write(pytestconfig.getoption("bench_out"))
    with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        console = Console(width=120)  # a pipe would get 80 columns, too few for the table
        result.print(console)
        console.print("written:", *paths)
    return result


@pytest.mark.benchmark(group="latency", timer=REPLAY)
@pytest.mark.parametrize("thought", [*LATENT, *WRITTEN], ids=str)
@pytest.mark.parametrize("engine", [latency.ENGINE, PEER])
def test_latency(benchmark: BenchmarkFixture, report: Report, engine: str, thought: Thought) -> None:
    row = report.row(engine, thought)
    recorded = iter(row.milliseconds.values())
    benchmark.extra_info["answer_tokens"] = row.answer_tokens
    benchmark.pedantic(lambda: REPLAY.advance(next(recorded)), rounds=len(row.milliseconds))


def peer_of(one: Contender, peer: TransformersPeer, image: Path, question: str, answer_tokens: int) -> Contender:
    """The contender that does in transformers what `one` does."""

    def ask() -> int:
        return len(peer.ask(image, question, one.thought, answer_tokens))

    return Contender(PEER, one.thought, ask, one.every)


def require_equal_work(model: Model, peer: TransformersPeer, image: Path, question: str) -> int:
    """Both write the same tokens for every K, or nothing is timed. Returns how many K = 4 wrote.

    In half precision a near tie may fall either way; there the same number of tokens is enough.
    """
    exact = model.weights.decoder.embed.weight.dtype == torch.float32
    for thought in LATENT:
        answer = model.generate(image, question, thought.latent_steps, latency.MAX_NEW_TOKENS)
        expected = peer.ask(image, question, thought)
        assert answer.usage.completion_tokens == len(expected), f"{thought}: answers differ in length"
        assert not exact or answer.token_ids == expected[: len(answer.token_ids)], f"{thought}: answers differ"
    return len(expected)
