"""The latent loop in torch and in ONNX Runtime on the CPU: in one run of latent_loop.onnx, and step by step.

One interleaved run of all contenders, as in bench_latency, with the same picture and question.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pytest_benchmark.fixture import BenchmarkFixture
from rich.console import Console
from rich.table import Table

import vitalrt
from bench.bench_latency import ReplayClock
from bench.files import commit
from bench.onnx_accuracy import INT8, environment, exports
from vitalrt.api import Model
from vitalrt.describe import describe_model
from vitalrt.export.runtime import OnnxEngine
from vitalrt.files import replace_whole
from vitalrt.latency import MAX_NEW_TOKENS, Contender, Row, Thought, interleave, record, rounded, speedup

THOUGHTS = tuple(Thought(latent_steps=k) for k in (0, 1, 2, 4, 8))
TORCH = "torch"
STEPS, LOOP = "step by step", "latent_loop"
ENGINES = {
    TORCH: "#1f6f8b",
    f"onnx fp32, {STEPS}": "#c9c5ba",
    f"onnx fp32, {LOOP}": "#8d877a",
    f"onnx int8, {STEPS}": "#f0c9a0",
    f"onnx int8, {LOOP}": "#d98841",
}
REPLAY = ReplayClock()


@dataclass(frozen=True)
class Report:
    """environment: of the run.  torch_step: how the torch runtime takes single-token steps.  rows: all contenders."""

    environment: dict[str, Any]
    torch_step: str
    question: str
    prompt_tokens: int
    rows: list[Row]

    def row(self, engine: str, thought: Thought) -> Row:
        return next(row for row in self.rows if (row.engine, row.thought) == (engine, thought))

    def as_dict(self) -> dict[str, Any]:
        return {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "environment": self.environment,
            "torch_step": self.torch_step,
            "request": {"question": self.question, "prompt_tokens": self.prompt_tokens},
            "rows": [
                {**record(row), "torch_over_this": rounded(speedup(self.row(TORCH, row.thought), row))}
                for row in self.rows
            ],
        }

    def print(self, console: Console) -> None:
        facts = self.environment
        console.print(
            f"\n{facts['model']} ({facts['parameters']:,} parameters) on {facts['processor']}, threads: "
            f"{facts['threads']}; prompt tokens: {self.prompt_tokens}; the torch runtime's steps: {self.torch_step}"
        )
        shown = Table("engine", "thought", "answer tokens", "p20 ms", "p50 ms", "p80 ms", "torch takes")
        for row in self.rows:
            times = [f"{value:.1f}" for value in row.spread]
            ratio = speedup(self.row(TORCH, row.thought), row).p50
            shown.add_row(row.engine, str(row.thought), str(row.answer_tokens), *times, f"{ratio:.2f} ×")
        console.print(shown)

    def write(self, folder: Path) -> list[Path]:
        """onnx-latency.json and .png, each all or nothing."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.as_dict(), indent=1) + "\n"
        figure = plot(self)
        data, picture = folder / "onnx-latency.json", folder / "onnx-latency.png"
        replace_whole(data, lambda path: path.write_text(text, encoding="utf-8"))
        replace_whole(picture, lambda path: figure.savefig(path, format="png", dpi=130))
        return [data, picture]


@pytest.fixture(scope="module")
def report(image_and_question: tuple[Path, str], pytestconfig: pytest.Config) -> Report:
    """The interleaved run. Writes its JSON and its plot, and prints its table."""
    image, question = image_and_question
    option = pytestconfig.getoption
    torch_model = vitalrt.load(
        option("bench_model"), option("bench_adapter"), device="cpu", dtype="float32", prefix_cache=False
    )
    with exports(torch_model, option("bench_adapter")) as exported:
        models = {TORCH: torch_model}
        for name in INT8:
            models[f"onnx {name}, {STEPS}"] = step_by_step(exported[name])
            models[f"onnx {name}, {LOOP}"] = exported[name]
        require_equal_work(models, image, question)
        contenders = list(contenders_of(models, image, question))
        rows = interleave(contenders, option("bench_rounds"), torch_model.weights.decoder.embed.weight.device)
    result = Report(
        environment(torch_model),
        describe_model(torch_model)["cpu decoder"],
        question,
        torch_model.prepare(image, question).num_tokens,
        rows,
    )
    paths = result.write(option("bench_out"))
    with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        console = Console(width=120)  # a pipe would get 80 columns, too few for the table
        result.print(console)
        console.print("written:", *paths)
    return result


@pytest.mark.benchmark(group="onnx", timer=REPLAY)
@pytest.mark.parametrize("thought", THOUGHTS, ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_onnx_latency(benchmark: BenchmarkFixture, report: Report, engine: str, thought: Thought) -> None:
    row = report.row(engine, thought)
    recorded = iter(row.milliseconds.values())
    benchmark.extra_info["answer_tokens"] = row.answer_tokens
    benchmark.pedantic(lambda: REPLAY.advance(next(recorded)), rounds=len(row.milliseconds))


def step_by_step(exported: Model) -> Model:
    """The same open graphs, with one run of latent_step.onnx for each latent step."""
    engine = exported.engine
    assert isinstance(engine, OnnxEngine)
    return Model(exported.checkpoint, OnnxEngine(engine.sessions, engine.config, engine.stop_ids, fused=False))


def contenders_of(models: dict[str, Model], image: Path, question: str) -> Iterator[Contender]:
    """Thought by thought, so that the engines of one comparison take turns directly."""
    for thought in THOUGHTS:
        for engine, model in models.items():
            yield Contender(engine, thought, partial(ask, model, image, question, thought.latent_steps))


def ask(model: Model, image: Path, question: str, k: int) -> int:
    return model.generate(image, question, k, MAX_NEW_TOKENS).usage.completion_tokens


def require_equal_work(models: dict[str, Model], image: Path, question: str) -> None:
    """All write the same tokens for every K, or nothing is timed; from int8 as many tokens are enough."""
    for thought in THOUGHTS:
        expected = models[TORCH].generate(image, question, thought.latent_steps, MAX_NEW_TOKENS)
        for engine, model in models.items():
            answer = model.generate(image, question, thought.latent_steps, MAX_NEW_TOKENS)
            same_length = answer.usage.completion_tokens == expected.usage.completion_tokens
            assert same_length, f"{engine}, {thought}: answers differ in length; try another --bench-question"
            assert "int8" in engine or answer.token_ids == expected.token_ids, f"{engine}, {thought}: answers differ"


def plot(report: Report) -> Figure:
    """Median latency of every K, engine beside engine, with p20 to p80."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    width = 0.8 / len(ENGINES)
    for side, (engine, colour) in enumerate(ENGINES.items()):
        spreads = [report.row(engine, thought).spread for thought in THOUGHTS]
        errors = [[s.p50 - s.p20 for s in spreads], [s.p80 - s.p50 for s in spreads]]
        places = [index + (side - (len(ENGINES) - 1) / 2) * width for index in range(len(spreads))]
        middles = [spread.p50 for spread in spreads]
        bars = axes.bar(places, middles, width * 0.94, yerr=errors, color=colour, label=engine, ecolor="#444444")
        axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=6)
    axes.set_ylabel("latency, image file to answer (ms)")
    axes.set_xticks(range(len(THOUGHTS)), [str(thought) for thought in THOUGHTS])
    axes.set_ylim(top=axes.get_ylim()[1] * 1.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", frameon=False, fontsize=8, ncols=3)
    facts = report.environment
    axes.set_title(
        f"The latent loop in torch and in ONNX Runtime {facts['versions']['onnxruntime']}\n"
        f"{facts['model']}, {facts['parameters'] / 1e6:,.1f} M parameters, {report.prompt_tokens} prompt tokens; "
        f"{facts['processor']}, threads: {facts['threads']}",
        fontsize=9,
    )
    return figure
