"""Several finished runs beside each other: accuracy by K, and how far apart their latent steps are.

Runs that differ in nothing but the seed are one condition: its figures are means, and every run is shown.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from vitalrt.engine.request import RESEARCH_NOTICE
from vitalrt.errors import VitalError
from vitalrt_training.plots import INK, SEQUENCE, draw_cosine, new_figure
from vitalrt_training.report import SIMILARITY, join_parts, markdown_table, questions_of
from vitalrt_training.run_files import replacing_directory

MATRICES_IN_A_ROW = 4
QUESTIONS = ("split", "seed", "pictures", "closed_questions")  # what has to agree for accuracies to be comparable
LOSS_WEIGHTS = ("losses.text_weight", "losses.visual_weight")


@dataclass(frozen=True)
class Condition:
    """runs: the reports of its seeds, by the runs' names."""

    label: str
    runs: dict[str, dict[str, Any]]

    @property
    def seeds(self) -> list[int]:
        return [run["settings"]["seed"] for run in self.runs.values()]

    @property
    def cosine(self) -> list[list[float]]:
        """The mean of the runs' matrices; [] where they have none or differ in K."""
        matrices = [run["probes"]["cosine"] for run in self.runs.values()]
        return np.mean(matrices, axis=0).tolist() if len({len(m) for m in matrices}) == 1 else []

    def accuracies(self, k: str) -> list[float]:
        """Of each run that was evaluated with k."""
        by_k = [run["evaluation"]["by_k"] for run in self.runs.values()]
        return [found[k] for found in by_k if k in found]

    def group_accuracies(self, key: str, name: str) -> list[float]:
        """Of each run at its last K.  key: "by_type" or another grouping of the evaluation."""
        groups = [run["evaluation"][key] for run in self.runs.values()]
        return [found[name]["accuracy"] for found in groups if name in found]


def write_comparison(runs: Mapping[str, Path], out: Path, backbone: Mapping[str, Any] | None = None) -> Path:
    """Replaces the folder `out`, whole or not at all, and returns it: comparison.md, comparison.json, accuracy.png and,
    where runs have two latent steps or more, cosine.png.

    runs: run directories, each with report/report.json, by name.  backbone: how the model that all runs adapt does
    without latent steps, as evaluate.evaluate gives it for k = 0; drawn as a line.
    Raises VitalError if a run has no report or runs were evaluated on different questions.
    """
    if not runs:
        raise VitalError("runs: expected at least one, got none")
    reports = {name: _read(name, directory) for name, directory in runs.items()}
    evaluations = {name: report["evaluation"] for name, report in reports.items()}
    _check_same_questions({**evaluations, "backbone": backbone} if backbone is not None else evaluations)
    conditions = group_runs(reports)
    figures = {"accuracy": plot_accuracies(conditions, backbone)}
    comparable = [condition for condition in conditions if len(condition.cosine) > 1]
    if comparable:
        figures["cosine"] = plot_matrices(comparable)
    with replacing_directory(out) as partial:
        for name, figure in figures.items():
            figure.savefig(partial / f"{name}.png")
        (partial / "comparison.json").write_text(json.dumps(_as_dict(conditions, backbone), indent=1) + "\n")
        (partial / "comparison.md").write_text(_markdown(conditions, backbone, figures))
    return out


def group_runs(reports: Mapping[str, dict[str, Any]]) -> list[Condition]:
    """Conditions in order of appearance, named by variant, schedule, and whatever other settings vary."""
    settings = [report["settings"] for report in reports.values()]
    names = dict.fromkeys(name for found in settings for name in found)
    varying = [name for name in names if _varies(name, settings)]
    grouped: defaultdict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for name, report in reports.items():
        others = [f"{setting.split('.')[-1]} {report['settings'].get(setting)}" for setting in varying]
        grouped[", ".join([report["variant"], report["settings"]["schedule"], *others])][name] = report
    return [Condition(label, found) for label, found in grouped.items()]


def plot_accuracies(conditions: Sequence[Condition], backbone: Mapping[str, Any] | None) -> Figure:
    """For every K a column per condition: a line for the mean, a dot for each run."""
    ks = _all_k(conditions)
    figure = new_figure(max(7.0, 2 + 0.3 * len(ks) * (len(conditions) + 1)), 5 + 0.22 * len(conditions))
    axes = figure.subplots()
    width = 0.8 / len(conditions)
    for index, condition in enumerate(conditions):
        colour = SEQUENCE[index % len(SEQUENCE)]
        label = f"{condition.label} ({_count(len(condition.runs), 'run')})"
        for place, k in enumerate(ks):
            values = condition.accuracies(k)
            if not values:
                continue
            middle = place + (index - (len(conditions) - 1) / 2) * width
            axes.hlines(fmean(values), middle - 0.42 * width, middle + 0.42 * width, colour, linewidth=3, label=label)
            axes.plot([middle] * len(values), values, "o", color=colour, markeredgecolor="white", clip_on=False)
            label = ""  # once in the legend
    points = [value for condition in conditions for k in ks for value in condition.accuracies(k)]
    if backbone is not None:
        points.append(backbone["accuracy"])
        axes.axhline(backbone["accuracy"], color=INK, linewidth=1, linestyle="--", label="backbone, no latent steps")
    room = max(0.01, 0.12 * (max(points) - min(points)))
    axes.set_ylim(max(0.0, min(points) - room), min(1.0, max(points) + room))
    axes.set_xticks(range(len(ks)), [f"K = {k}" for k in ks])
    axes.set_xlim(-0.5, len(ks) - 0.5)
    for place in range(1, len(ks)):
        axes.axvline(place - 0.5, color="#dddddd", linewidth=0.8)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    axes.grid(axis="y", color="#eeeeee")
    axes.set_axisbelow(True)
    axes.set_ylabel("accuracy (the axis need not start at 0)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", frameon=False, ncols=2 if len(conditions) > 2 else 1)
    axes.set_title("Closed questions answered right: mean (line) and every run (dot)", fontsize=10)
    return figure


def plot_matrices(conditions: Sequence[Condition]) -> Figure:
    """The mean matrix of every condition, with one scale of colours."""
    num_columns = min(len(conditions), MATRICES_IN_A_ROW)
    num_rows = math.ceil(len(conditions) / num_columns)
    side = 1.2 + 0.5 * max(len(condition.cosine) for condition in conditions)
    figure = new_figure(side * num_columns + 1.2, (side + 0.5) * num_rows, compress=True)
    panels = figure.subplots(num_rows, num_columns, squeeze=False)
    for axes in panels.flat[len(conditions) :]:
        axes.set_visible(False)
    for axes, condition in zip(panels.flat, conditions, strict=False):
        image = draw_cosine(axes, condition.cosine)
        variant, _, rest = condition.label.partition(", ")
        axes.set_title(f"{variant}\n{rest} ({_count(len(condition.runs), 'run')})", fontsize=9)
    figure.colorbar(image, ax=panels, label="cosine similarity")
    return figure


def _read(name: str, directory: Path) -> dict[str, Any]:
    path = directory / "report" / "report.json"
    if not path.is_file():
        raise VitalError(f"runs: {name}: expected a finished run with report/report.json, got {directory}")
    report: dict[str, Any] = json.loads(path.read_text())
    return report


def _check_same_questions(evaluations: Mapping[str, Mapping[str, Any]]) -> None:
    asked = {name: tuple(evaluation.get(key) for key in QUESTIONS) for name, evaluation in evaluations.items()}
    first = next(iter(asked))
    for name, questions in asked.items():
        if questions != asked[first]:
            raise VitalError(
                f"runs: expected one set of questions ({', '.join(QUESTIONS)}), got {asked[first]} for {first} and "
                f"{questions} for {name}"
            )


def _varies(name: str, settings: Sequence[Mapping[str, Any]]) -> bool:
    """Whether conditions have to be told apart by it: a weight of 0, and written steps, are told by the variant."""
    values = [found.get(name) for found in settings]
    if name in LOSS_WEIGHTS:
        values = [value for value in values if value]
    return name not in ("seed", "schedule", "written") and any(value != values[0] for value in values)


def _all_k(conditions: Sequence[Condition]) -> list[str]:
    return sorted({k for c in conditions for run in c.runs.values() for k in run["evaluation"]["by_k"]}, key=int)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _mean(values: Sequence[float]) -> str:
    return f"{fmean(values):.1%}" if values else "–"


def _spread(values: Sequence[float]) -> str:
    return f"{_mean(values)} ({min(values):.1%} to {max(values):.1%})" if len(values) > 1 else _mean(values)


def _as_dict(conditions: Sequence[Condition], backbone: Mapping[str, Any] | None) -> dict[str, Any]:
    return {
        "notice": RESEARCH_NOTICE,
        "backbone": backbone,
        "conditions": [
            {
                "label": condition.label,
                "seeds": condition.seeds,
                "by_k": {k: condition.accuracies(k) for k in _all_k([condition])},
                "cosine": condition.cosine,
                "runs": {
                    name: {key: run[key] for key in ("command", "settings", "evaluation", "probes")}
                    for name, run in condition.runs.items()
                },
            }
            for condition in conditions
        ],
    }


def _markdown(
    conditions: Sequence[Condition], backbone: Mapping[str, Any] | None, figures: Mapping[str, Figure]
) -> str:
    ks = _all_k(conditions)
    first_run = next(iter(conditions[0].runs.values()))["evaluation"]
    by_k = [
        [condition.label, len(condition.runs), *(_spread(condition.accuracies(k)) for k in ks)]
        for condition in conditions
    ]
    if backbone is not None:
        by_k.append(["backbone", "–", *(_mean([backbone["accuracy"]] if k == "0" else []) for k in ks)])
    groups = [
        markdown_table(
            [title, *(condition.label for condition in conditions)],
            [
                [name, *(_mean(condition.group_accuracies(key, name)) for condition in conditions)]
                for name in first_run[key]
            ],
        )
        for title, key in (("question type", "by_type"), ("chain length", "by_chain_length"))
    ]
    runs = [
        [name, condition.label, run["settings"]["seed"], f"`{run['command']}`"]
        for condition in conditions
        for name, run in condition.runs.items()
    ]
    parts = [
        "# Runs beside each other",
        f"{RESEARCH_NOTICE} {questions_of(first_run)}. Means over runs, with the least and the most. The most common "
        f"answer of each question's type is right in {first_run['majority_accuracy']:.1%}.",
        "## By latent steps",
        markdown_table(["", "runs", *(f"K = {k}" for k in ks)], by_k),
        "![Accuracy of every run by K](accuracy.png)",
        f"## By group, K = {first_run['k']}",
        *groups,
        *(["## Latents", SIMILARITY, "![Inter-step cosine similarity](cosine.png)"] if "cosine" in figures else []),
        "## Runs",
        markdown_table(["run", "condition", "seed", "command"], runs, numbers=False),
    ]
    return join_parts(parts)
