"""What a finished run leaves behind to read: report.md with its pictures, and report.json with every number.

RUN/report/report.md, report.json, curves.png, accuracy.png, cosine.png, gradients.png
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure

from vitalrt.describe import describe_machine
from vitalrt.engine.request import RESEARCH_NOTICE
from vitalrt.latency import device_name
from vitalrt_training.plots import plot_accuracy, plot_cosine, plot_curves, plot_gradients
from vitalrt_training.recipes import SCHEDULES
from vitalrt_training.run_files import replacing_directory

VARIANTS = {(False, False): "task-only", (True, False): "+text", (False, True): "+visual", (True, True): "VITAL"}
"""What a run is called by whether it has the text and the visual loss (VITAL table 2)."""
WRITTEN_VARIANTS = {(False, False): "Coconut", (True, False): "SIM-CoT"}
"""The same where steps are written out before latents replace them."""
SIMILARITY = "Mean cosine similarity between latent steps. Off the diagonal, 1 means that steps repeat each other."


def write_report(run_dir: Path, evaluation: Mapping[str, Any], probes: Mapping[str, Any]) -> Path:
    """Replaces run_dir/report, whole or not at all, and returns it.

    run_dir: holds recipe.json and log.jsonl.  evaluation: as evaluate.evaluate gives it, with its "split" if there is
    one to name.  probes: as probes.probe gives them.
    """
    recipe = json.loads((run_dir / "recipe.json").read_text())
    records = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    report = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "notice": RESEARCH_NOTICE,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "variant": variant_of(recipe),
        "settings": settings_of(recipe),
        "machine": _machine(),
        "stages": [_stage(name, list(found)) for name, found in groupby(records, lambda r: r["stage"])],
        "evaluation": json.loads(json.dumps(evaluation)),  # as it will be read again: keys are text
        "probes": dict(probes),
    }
    figures = _figures(report, records)
    directory = run_dir / "report"
    with replacing_directory(directory) as partial:
        for name, figure in figures.items():
            figure.savefig(partial / f"{name}.png")
        (partial / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        (partial / "report.md").write_text(_markdown(report, figures))
    return directory


def variant_of(recipe: Mapping[str, Any]) -> str:
    """What the field calls a run.  recipe: as recipe.json holds it; without "written" it is of a time that had none."""
    written, phases = recipe.get("written", False), SCHEDULES[recipe["schedule"]]
    if all(phase.k == 0 for phase in phases):
        return "CoT" if written else "direct"
    switched_on = recipe["losses"]["text_weight"] > 0, recipe["losses"]["visual_weight"] > 0
    if written:
        return WRITTEN_VARIANTS.get(switched_on, f"{VARIANTS[switched_on]}, steps written")
    return VARIANTS[switched_on]


def settings_of(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by the names that --set knows, e.g. "losses.text_weight"."""
    flat: dict[str, Any] = {}
    for name, value in recipe.items():
        flat |= settings_of(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def questions_of(evaluation: Mapping[str, Any]) -> str:
    split = f"{evaluation['split']} " if "split" in evaluation else ""
    return f"{evaluation['closed_questions']:,} closed questions about {evaluation['pictures']:,} {split}pictures"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]], numbers: bool = True) -> str:
    """numbers: every column but the first holds numbers, and goes to the right."""
    rule = ["---", *["---:" if numbers else "---"] * (len(head) - 1)]
    lines = [head, rule, *rows]
    return "".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def join_parts(parts: Iterable[str]) -> str:
    """Paragraphs, tables and headings as one Markdown text."""
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _machine() -> dict[str, Any]:
    """Where this process runs and with what; the runtime's own backends had no part in training."""
    facts = {name: value for name, value in describe_machine().items() if not name.startswith("backend")}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    packages = {package: version(package) for package in ("accelerate", "peft")}
    return {**facts, **packages, "device": device_name(device)}


def _stage(name: str, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Steps and seconds of a stage, and its losses over the last twentieth."""
    last = records[-max(1, len(records) // 20) :]
    keys = dict.fromkeys(key for record in last for key in record if key.startswith("loss"))
    return {
        "stage": name,
        "steps": len(records),
        "seconds": round(sum(record["seconds"] for record in records), 1),
        **{key: fmean(record[key] for record in last if key in record) for key in keys},
    }


def _figures(report: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    probes, settings = report["probes"], report["settings"]
    weights = {"task": 1.0, "text": settings["losses.text_weight"], "visual": settings["losses.visual_weight"]}
    figures = {
        "curves": plot_curves(records),
        "accuracy": plot_accuracy(report["evaluation"], questions_of(report["evaluation"])),
    }
    if len(probes["cosine"]) > 1:
        figures["cosine"] = plot_cosine(probes["cosine"], probes["samples"])
    figures["gradients"] = plot_gradients(probes["gradient_norms"], weights)
    return figures


def _markdown(report: Mapping[str, Any], figures: Mapping[str, Figure]) -> str:
    evaluation, probes = report["evaluation"], report["probes"]
    by_k, by_type = evaluation["by_k"], evaluation["by_type"]
    loss_keys = list(dict.fromkeys(key for stage in report["stages"] for key in stage if key.startswith("loss")))
    stages = [
        [s["stage"], s["steps"], f"{s['seconds']:,.0f}", *(f"{s[key]:.4f}" if key in s else "–" for key in loss_keys)]
        for s in report["stages"]
    ]
    accuracies = [
        [
            f"{name} ({group['questions']:,})",
            *(f"{groups[name]['accuracy']:.1%}" for groups in evaluation["by_k_and_type"].values()),
            f"{evaluation['majority_of_type'][name]['share']:.1%}",
        ]
        for name, group in by_type.items()
    ]
    accuracies.append(
        [
            f"all ({evaluation['closed_questions']:,})",
            *(f"{value:.1%}" for value in by_k.values()),
            f"{evaluation['majority_accuracy']:.1%}",
        ]
    )
    written = evaluation["tokens_by_k"].values()
    accuracies.append(["tokens written", *(f"{tokens:.1f}" for tokens in written), ""])
    parts = [
        f"# {report['variant']}, {report['settings']['schedule']}, seed {report['settings']['seed']}",
        f"{report['notice']} Written {report['created']} after `{report['command']}`.",
        "## Accuracy",
        f"{questions_of(evaluation)}, by latent steps K. Tokens written are a mean over them, thought and answer.",
        markdown_table(["question type", *(f"K = {k}" for k in by_k), "most common answer"], accuracies),
        "![Accuracy by K, question type and modality](accuracy.png)",
        "## Training",
        "Losses are means over the last twentieth of a phase.",
        markdown_table(["phase", "steps", "seconds", *(key.replace("_", " ") for key in loss_keys)], stages),
        "![Losses, gradient norm and learning rate](curves.png)",
        "## Latents",
        SIMILARITY if "cosine" in figures else "Fewer than two latent steps: nothing to compare.",
        *(["![Inter-step cosine similarity](cosine.png)"] if "cosine" in figures else []),
        f"How hard each loss pulls at the adapter at the end: the norm of its weighted gradient, mean over "
        f"{probes['batches']:,} batches, without dropout.",
        "![Weighted gradient norm of each loss](gradients.png)",
        "## Settings",
        markdown_table(["setting", "value"], report["settings"].items(), numbers=False),
        "## Machine",
        markdown_table(["", ""], report["machine"].items(), numbers=False),
    ]
    return join_parts(parts)
