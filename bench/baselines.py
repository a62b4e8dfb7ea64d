"""Trained runs beside each other on fresh phantoms: how often each is right, what it writes, how long it takes.

python -m bench.baselines RUN... [--count 500]

Each answers with its own number of latent steps, through the runtime. All are asked the same questions; those that are
timed, one at a time from picture to text, by all in turns, so all are loaded at once. What others are compared with is
the first run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import rich.box
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.console import Console
from rich.progress import track
from rich.table import Table

import vitalrt
from bench.files import commit
from vitalrt import latency
from vitalrt.api import Model
from vitalrt.engine.request import RESEARCH_NOTICE
from vitalrt.errors import VitalError
from vitalrt.files import replace_whole
from vitalrt.spread import Spread
from vitalrt_training.data.records import SPLITS
from vitalrt_training.evaluate import (
    Outcome,
    Phantoms,
    Shown,
    accuracy,
    ask_all,
    group_accuracy,
    majority_of_type,
    room_for,
)
from vitalrt_training.plots import SEQUENCE, new_figure
from vitalrt_training.report import variant_of

Z_95 = 1.96  # deviations of a normal distribution that leave 5 % outside


@dataclass(frozen=True)
class Run:
    """A finished run. steps, seconds: of its training, the latter wherever that ran."""

    name: str
    variant: str
    recipe: dict[str, Any]
    steps: int
    seconds: float
    model: Model

    @classmethod
    def open(cls, directory: Path) -> Run:
        """Raises VitalError where directory is no finished run."""
        if not (directory / "adapter").is_dir():
            raise VitalError(f"RUN: expected a finished run with an adapter, got {directory}")
        recipe = json.loads((directory / "recipe.json").read_text())
        log = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
        model = vitalrt.load(recipe["backbone"], adapter=directory / "adapter", dtype="float32")
        seconds = sum(line["seconds"] for line in log)
        return cls(directory.name, variant_of(recipe), recipe, len(log), round(seconds, 1), model)

    @property
    def k(self) -> int:
        return self.model.checkpoint.vital.k


@dataclass(frozen=True)
class Answered:
    """The closed questions in one order for all runs, with the pictures and with those of others in their place."""

    own: list[Outcome]
    shuffled: list[Outcome]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    runs = [Run.open(directory) for directory in arguments.runs]
    shown = Phantoms(arguments.split, arguments.seed, arguments.count)
    milliseconds = time_in_turns(runs, shown, min(arguments.timed, arguments.count - 1))
    answered = [answer_all(run, shown) for run in runs]
    majority = majority_of_type(answered[0].own)
    result = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "notice": RESEARCH_NOTICE,
        "commit": commit(),
        "environment": latency.environment(runs[0].model),
        "split": arguments.split,
        "seed": arguments.seed,
        "phantoms": arguments.count,
        "closed_questions": len(answered[0].own),
        "timed_questions": len(milliseconds[0]),
        "majority_accuracy": fmean(majority[outcome.sample.question_type][1] for outcome in answered[0].own),
        "runs": [
            row(run, mine, times, answered[0], milliseconds[0])
            for run, mine, times in zip(runs, answered, milliseconds, strict=True)
        ],
    }
    print_result(result)
    arguments.out.mkdir(parents=True, exist_ok=True)
    text, figure = json.dumps(result, indent=1) + "\n", plot(result)
    data, picture = arguments.out / "baselines.json", arguments.out / "baselines.png"
    replace_whole(data, lambda path: path.write_text(text, encoding="utf-8"))
    replace_whole(picture, lambda path: figure.savefig(path, format="png"))
    print("written:", data, picture)
    return 0


def answer_all(run: Run, shown: Sequence[Shown]) -> Answered:
    own, shuffled = (
        [outcome for outcome in ask_all(run.model, shown, run.k, shift) if outcome.sample.closed] for shift in (0, 1)
    )
    return Answered(own, shuffled)


def time_in_turns(runs: Sequence[Run], shown: Sequence[Shown], count: int) -> list[list[float]]:
    """Milliseconds of each run for the first closed question about each of `count` pictures, none of them in a cache.

    The last of shown, which is not among them, is for warming up.
    """

    def ask(run: Run, one: Shown) -> float:
        sample = next(sample for sample in one.samples if sample.closed)
        room = room_for(run.model, sample)
        started = time.perf_counter()
        run.model.generate(one.picture, sample.question, k=run.k, max_new_tokens=room)
        return (time.perf_counter() - started) * 1000

    for run in runs:
        ask(run, shown[-1])
    milliseconds: list[list[float]] = [[] for _ in runs]
    for number in track(range(count), "timing", console=Console(stderr=True)):
        one = shown[number]
        for place in range(len(runs)):
            turn = (number + place) % len(runs)  # nobody always comes first
            milliseconds[turn].append(ask(runs[turn], one))
    return milliseconds


def row(run: Run, answered: Answered, times: list[float], first: Answered, first_times: list[float]) -> dict[str, Any]:
    """only_this, only_first: how many questions one of the two gets right and the other does not."""
    pairs = [(mine.is_right, other.is_right) for mine, other in zip(answered.own, first.own, strict=True)]
    return {
        "run": run.name,
        "variant": run.variant,
        "k": run.k,
        "training": {"steps": run.steps, "seconds": run.seconds, "recipe": run.recipe},
        "accuracy": accuracy(answered.own),
        "shuffled_accuracy": accuracy(answered.shuffled),
        "by_type": group_accuracy(answered.own, lambda outcome: outcome.sample.question_type),
        "by_chain_length": group_accuracy(answered.own, lambda outcome: str(outcome.sample.num_steps)),
        "only_this": sum(mine and not other for mine, other in pairs),
        "only_first": sum(other and not mine for mine, other in pairs),
        "tokens": fmean(outcome.num_tokens for outcome in answered.own),
        "ms": latency.rounded(Spread.of(times)),
        "times_first": latency.rounded(
            Spread.of([mine / other for mine, other in zip(times, first_times, strict=True)])
        ),
    }


def print_result(result: dict[str, Any]) -> None:
    console = Console(width=120)
    console.print(
        f"{result['closed_questions']:,} closed questions about {result['phantoms']:,} {result['split']} phantoms, "
        f"seed {result['seed']}; the most common answer of each type is right in {result['majority_accuracy']:.1%}. "
        f"{result['timed_questions']} questions timed."
    )
    table = Table(box=rich.box.SIMPLE_HEAD)
    for heading in ("run", "variant"):
        table.add_column(heading, no_wrap=True)
    first = result["runs"][0]["run"]
    headings = ("K", "right", "only it / only " + first, "shuffled", "tokens", "p50 ms", "× " + first)
    for heading in headings:
        table.add_column(heading, justify="right")
    for one in result["runs"]:
        table.add_row(
            one["run"],
            one["variant"],
            str(one["k"]),
            f"{one['accuracy']:.1%}",
            f"{one['only_this']} / {one['only_first']}",
            f"{one['shuffled_accuracy']:.1%}",
            f"{one['tokens']:.1f}",
            f"{one['ms']['p50']:,.1f}",
            f"{one['times_first']['p50']:.2f}",
        )
    console.print(table)


def plot(result: dict[str, Any]) -> Figure:
    """Accuracy over the median time of a question; as lines, chance for the one and p20 to p80 for the other."""
    figure = new_figure(8, 5)
    axes = figure.subplots()
    for index, one in enumerate(result["runs"]):
        ms, colour = one["ms"], SEQUENCE[index % len(SEQUENCE)]
        share = one["accuracy"]
        margin = Z_95 * (share * (1 - share) / result["closed_questions"]) ** 0.5
        axes.plot([ms["p20"], ms["p80"]], [share] * 2, color=colour, linewidth=2, alpha=0.5)
        axes.plot([ms["p50"]] * 2, [share - margin, share + margin], color=colour, linewidth=1, alpha=0.5)
        written = f"{one['tokens']:.0f} token{'' if round(one['tokens']) == 1 else 's'}"
        label = f"{one['variant']} ({one['run']}): K = {one['k']}, {written} written"
        axes.plot(ms["p50"], share, "o", color=colour, markersize=8, markeredgecolor="white", label=label)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="x", which="both", labelsize=8)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    axes.set_xlabel("milliseconds from picture to answer, one question at a time (median, p20 to p80)")
    axes.set_ylabel("accuracy, 95 % interval (need not start at 0)")
    axes.grid(color="#eeeeee")
    axes.set_axisbelow(True)
    axes.margins(0.12)
    axes.set_ylim(max(0.0, axes.get_ylim()[0]), min(1.0, axes.get_ylim()[1]))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", frameon=False, fontsize=8)
    axes.set_title(
        f"{result['closed_questions']:,} closed questions about {result['phantoms']:,} {result['split']} phantoms; "
        f"{result['environment']['processor']}",
        fontsize=9,
    )
    return figure


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.baselines", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directory of a finished run")
    parser.add_argument("--split", default="test", choices=SPLITS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=500, help="phantoms")
    parser.add_argument("--timed", type=int, default=60, help="questions that are timed, one a phantom")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args(argv)
    if arguments.count < 2 or arguments.timed < 1:
        parser.error(f"expected --count 2 or more and --timed 1 or more, got {arguments.count} and {arguments.timed}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
