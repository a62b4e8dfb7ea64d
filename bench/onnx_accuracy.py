"""Phantom accuracy through ONNX Runtime: exports in fp32 and int8, asked what the torch runtime is asked.

    python -m bench.onnx_accuracy

writes results/onnx-accuracy.json, and exits with 1 where a claim is not met. Everything runs on the CPU; 500 phantoms
take a few minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import onnxruntime
from rich.console import Console
from rich.table import Table

import vitalrt
from bench.files import commit
from vitalrt import export, latency
from vitalrt.api import BUNDLED, Model
from vitalrt.config import read_json
from vitalrt.export.sessions import MANIFEST
from vitalrt.files import replace_whole
from vitalrt_training.evaluate import Outcome, Phantoms, accuracy, ask_all

INT8 = {"fp32": False, "int8": True}  # the exports, by name
MOST_INT8_POINTS = 2.0  # of accuracy, that int8 may be away from torch


@dataclass(frozen=True)
class Comparison:
    """The same questions in torch and in one export, in the same order."""

    torch: Sequence[Outcome]
    onnx: Sequence[Outcome]

    @property
    def same_answers(self) -> int:
        return sum(ours.text == theirs.text for ours, theirs in zip(self.torch, self.onnx, strict=True))

    @property
    def points(self) -> float:
        """Percentage points of accuracy gained (lost, where negative) against torch."""
        return 100 * (closed_accuracy(self.onnx) - closed_accuracy(self.torch))

    def as_dict(self) -> dict[str, Any]:
        return {
            "accuracy": closed_accuracy(self.onnx),
            "points_to_torch": round(self.points, 3),
            "answers": len(self.onnx),
            "same_answers": self.same_answers,
        }


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    torch_model = vitalrt.load(arguments.model, device="cpu", dtype="float32")
    k = torch_model.checkpoint.vital.k if arguments.k is None else arguments.k
    shown = Phantoms(arguments.split, arguments.seed, arguments.count)
    with exports(torch_model) as exported:
        reference = list(ask_all(torch_model, shown, k, shift=0))
        compared = {
            name: Comparison(reference, list(ask_all(model, shown, k, shift=0))) for name, model in exported.items()
        }
        result = {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "environment": environment(torch_model),
            "split": arguments.split,
            "seed": arguments.seed,
            "phantoms": arguments.count,
            "k": k,
            "closed_questions": sum(outcome.sample.closed for outcome in reference),
            "torch": {"accuracy": closed_accuracy(reference), "answers": len(reference)},
            "onnx": {
                name: {**compared[name].as_dict(), "verification": verification(model)}
                for name, model in exported.items()
            },
            "claims": claims(compared),
        }
    print_result(result)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "onnx-accuracy.json"
    replace_whole(path, lambda partial: partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8"))
    print("written:", path)
    return 0 if all(claim["is_met"] for claim in result["claims"]) else 1


@contextmanager
def exports(model: Model, adapter: str | None = None) -> Iterator[dict[str, Model]]:
    """Exports of the checkpoint that `model` was loaded from, verified, and loaded on the CPU for the time being."""
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for name, int8 in INT8.items():
            source, out = model.checkpoint.directory, Path(folder) / name
            done = export.onnx(source, out, adapter=adapter, int8=int8, device="cpu")
            found[name] = vitalrt.load(done.directory, device="cpu")
        yield found


def verification(model: Model) -> dict[str, Any]:
    """What the export of this model found when it compared itself with torch."""
    found: dict[str, Any] = read_json(model.checkpoint.directory / MANIFEST)["verification"]
    return found


def environment(model: Model) -> dict[str, Any]:
    """What vitalrt.latency tells, and ONNX Runtime's version."""
    facts = latency.environment(model)
    facts["versions"]["onnxruntime"] = onnxruntime.__version__
    return facts


def closed_accuracy(outcomes: Sequence[Outcome]) -> float:
    return accuracy([outcome for outcome in outcomes if outcome.sample.closed])


def claims(compared: dict[str, Comparison]) -> list[dict[str, Any]]:
    """What an export promises, and what was measured."""
    same, points = compared["fp32"].same_answers, compared["int8"].points
    answers = len(compared["fp32"].torch)
    return [
        {"text": "fp32: every answer is torch's", "required": answers, "measured": same, "is_met": same == answers},
        {
            "text": "int8: accuracy within two points of torch's",
            "required": MOST_INT8_POINTS,
            "measured": round(points, 3),
            "is_met": abs(points) <= MOST_INT8_POINTS,
        },
    ]


def print_result(result: dict[str, Any]) -> None:
    console = Console()
    console.print(
        f"{result['phantoms']} {result['split']} phantoms, seed {result['seed']}, k={result['k']}: "
        f"{result['closed_questions']} closed questions, {result['torch']['answers']} answers"
    )
    table = Table("runtime", "accuracy", "points to torch", "answers as torch's", "latent error at export")
    table.add_row("torch", f"{result['torch']['accuracy']:.2%}", "", "", "")
    for name, found in result["onnx"].items():
        same = f"{found['same_answers'] / found['answers']:.2%}"
        error = f"{found['verification']['latent_error']:.2g}"
        table.add_row(f"onnx {name}", f"{found['accuracy']:.2%}", f"{found['points_to_torch']:+.2f}", same, error)
    console.print(table)
    for claim in result["claims"]:
        verdict = "[green]met[/]" if claim["is_met"] else "[red]not met[/]"
        console.print(f"{verdict}  {claim['text']}: {claim['measured']:g}, required {claim['required']:g}")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.onnx_accuracy", description=__doc__)
    parser.add_argument("--model", default=str(BUNDLED), help="Qwen3-VL directory or hub id [the bundled model]")
    parser.add_argument("--split", default="test", choices=("train", "validation", "test"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=500, help="phantoms [500]")
    parser.add_argument("-k", type=int, help="latent steps [the checkpoint's]")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the result")
    arguments = parser.parse_args(argv)
    if arguments.count < 1:
        parser.error(f"--count: expected at least 1 phantom, got {arguments.count}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
