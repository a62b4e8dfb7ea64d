"""What a latency run leaves behind: a table, a JSON file and a plot like VITAL's Fig. 4."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console

from bench.files import commit
from bench.peers import ENGINE as PEER
from vitalrt.files import replace_whole
from vitalrt.latency import ENGINE, LATENT, WRITTEN, Row, Thought, record, rounded, speedup, table
from vitalrt.spread import Spread

DEFAULT_THOUGHT, LONGEST_THOUGHT = LATENT[-1], WRITTEN[-1]
COLOURS = {ENGINE: "#1f6f8b", PEER: "#c9c5ba"}


@dataclass(frozen=True)
class Claim:
    """A speed-up that vitalrt promises, and what this run measured."""

    text: str
    required: float
    measured: Spread

    @property
    def is_met(self) -> bool:
        return self.measured.p50 >= self.required


@dataclass(frozen=True)
class Report:
    """environment: as vitalrt.latency.environment gives it.  rows: every thought in both engines."""

    environment: dict[str, Any]
    question: str
    prompt_tokens: int
    rows: list[Row]

    def row(self, engine: str, thought: Thought) -> Row:
        return next(row for row in self.rows if (row.engine, row.thought) == (engine, thought))

    @property
    def claims(self) -> list[Claim]:
        fast = self.row(ENGINE, DEFAULT_THOUGHT)
        return [
            Claim(
                f"{DEFAULT_THOUGHT}: at most half the time of transformers",
                2.0,
                speedup(self.row(PEER, DEFAULT_THOUGHT), fast),
            ),
            Claim(
                f"{DEFAULT_THOUGHT}: 20 times faster than {LONGEST_THOUGHT}",
                20.0,
                speedup(self.row(ENGINE, LONGEST_THOUGHT), fast),
            ),
        ]

    def as_dict(self) -> dict[str, Any]:
        return {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "environment": self.environment,
            "request": {"question": self.question, "prompt_tokens": self.prompt_tokens},
            "rows": [self._row_dict(row) for row in self.rows],
            "claims": [
                {
                    "text": claim.text,
                    "required": claim.required,
                    "measured": rounded(claim.measured),
                    "is_met": claim.is_met,
                }
                for claim in self.claims
            ],
        }

    def _row_dict(self, row: Row) -> dict[str, Any]:
        return {**record(row), "transformers_over_this": rounded(speedup(self.row(PEER, row.thought), row))}

    def print(self, console: Console) -> None:
        facts = self.environment
        console.print(
            f"\n{facts['model']} ({facts['parameters']:,} parameters, {facts['dtype']}) on {facts['device']}: "
            f"{facts['processor']}, {_count(facts['cores'], 'core')}, {_count(facts['threads'], 'thread')}; "
            f"prompt of {_count(self.prompt_tokens, 'token')}"
        )
        console.print(table(self.rows))
        for claim in self.claims:
            verdict = "[green]met[/]" if claim.is_met else "[red]not met[/]"
            p20, p50, p80 = claim.measured
            console.print(f"{verdict}  {claim.text}: {p50:.2f}x, p20 {p20:.2f}, p80 {p80:.2f}")

    def write(self, folder: Path) -> list[Path]:
        """latency-<device>.json and .png, each all or nothing."""
        folder.mkdir(parents=True, exist_ok=True)
        stem = "latency-" + re.sub(r"[^a-z0-9]+", "-", self.environment["device"].lower()).strip("-")
        text = json.dumps(self.as_dict(), indent=1) + "\n"
        figure = plot(self)
        data, picture = folder / f"{stem}.json", folder / f"{stem}.png"
        replace_whole(data, lambda path: path.write_text(text, encoding="utf-8"))
        replace_whole(picture, lambda path: figure.savefig(path, format="png", dpi=160))
        return [data, picture]


def plot(report: Report) -> Figure:
    """Median latency of every thought on a log axis, peer beside ours, with p20 to p80 and the tokens it wrote."""
    thoughts = [*LATENT, *WRITTEN]
    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    width = 0.4
    for side, engine in enumerate((ENGINE, PEER)):
        rows = [report.row(engine, thought) for thought in thoughts]
        spreads = [row.spread for row in rows]
        middles = [spread.p50 for spread in spreads]
        errors = [[s.p50 - s.p20 for s in spreads], [s.p80 - s.p50 for s in spreads]]
        places = [index + (side - 0.5) * width for index in range(len(rows))]
        bars = axes.bar(
            places, middles, width * 0.94, yerr=errors, color=COLOURS[engine], label=engine, ecolor="#444444"
        )
        axes.bar_label(bars, [_short_ms(value) for value in middles], padding=3, fontsize=8)
    axes.set_yscale("log")
    axes.set_ylim(top=axes.get_ylim()[1] * 2)
    axes.set_ylabel("latency, image file to answer (ms)")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    fast = report.row(ENGINE, DEFAULT_THOUGHT)
    axes.set_xticks(range(len(thoughts)), [_tick(report.row(ENGINE, thought), fast) for thought in thoughts])
    axes.axvline(len(LATENT) - 0.5, color="#999999", linewidth=0.8, linestyle=":")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", frameon=False)
    facts = report.environment
    axes.set_title(
        f"K latent steps against a written chain of thought, same weights and request\n"
        f"{facts['model']}, {facts['parameters'] / 1e6:,.1f} M parameters, {facts['dtype']}, "
        f"{report.prompt_tokens} prompt tokens; {_machine(facts)}",
        fontsize=10,
    )
    return figure


def _tick(row: Row, fast: Row) -> str:
    """What was thought, what was written (thought + answer), and how many times `fast` it took."""
    if row.thought.written_tokens:
        name, written = "CoT", f"{row.thought.written_tokens} + {_count(row.answer_tokens, 'token')}"
    else:
        name, written = str(row.thought), _count(row.answer_tokens, "token")
    return f"{name}\n{written}\n{speedup(row, fast).p50:,.1f} × {fast.thought}"


def _machine(facts: dict[str, Any]) -> str:
    return (
        f"{facts['processor']}, {_count(facts['threads'], 'thread')}" if facts["device"] == "cpu" else facts["device"]
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _short_ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
