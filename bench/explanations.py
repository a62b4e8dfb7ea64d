"""How often the windows onto the bundled model's latents show what a phantom's masks say they should.

    python -m bench.explanations

writes results/explanations.json, and exits with 1 where a claim is not met. Every question takes K latent steps; words
are held against the chain of reasoning, as far as it goes, the others against the region in question. Beside what the
latents show stand three peers: the latents of the same question about the next phantom ("other picture": what is known
without looking), chance, and, for pictures and neighbours, the region's own feature, which the projector was trained to
hit. Everything runs on the CPU; 500 phantoms take a minute or two.

K latent steps, R, C rows and columns of patches, H, W pixels.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import vitalrt
from bench.files import commit
from vitalrt import latency
from vitalrt.api import BUNDLED, Model
from vitalrt.config import ENCODER, ROI_INDEX
from vitalrt.engine.request import Answer, Request
from vitalrt.explain.roi_index import RoiIndex
from vitalrt.explain.text_window import read_words
from vitalrt.explain.visual_window import aim, heatmaps
from vitalrt.files import replace_whole
from vitalrt.model.scaffold import Scaffold
from vitalrt.model.vision_encoder import PatchEncoder, open_encoder
from vitalrt_training.data.phantom import Phantom, Sample, ask, draw_phantom
from vitalrt_training.data.roi import peaks_within, phantom_mask, roi_features
from vitalrt_training.data.roi_index import label_of
from vitalrt_training.evaluate import MAX_ANSWER_TOKENS, is_right, normalise

PHANTOMS_AT_A_TIME = 16
K = 4
TIMES_CHANCE = 3.0
"""So many times chance a heat map is to peak within the region."""


@dataclass(frozen=True)
class Asked:
    """A question, its answer, and the latents of the same question about another phantom."""

    phantom: Phantom
    sample: Sample
    answer: Answer
    other: torch.Tensor


@dataclass(frozen=True)
class Windows:
    """What latents are read with."""

    scaffold: Scaffold
    encoder: PatchEncoder
    index: RoiIndex
    model: Model

    @classmethod
    def of(cls, model: Model) -> Windows:
        directory = model.checkpoint.scaffold_directory
        return cls(
            Scaffold.load(directory), open_encoder(directory / ENCODER), RoiIndex.load(directory / ROI_INDEX), model
        )

    def words(self, latents: torch.Tensor) -> list[str]:
        return [words.text for words in read_words(self.scaffold, latents, self.model.processor.decode)]


@dataclass(frozen=True)
class Hits:
    """One question: for each of its steps whether a window shows what it should, for the same with another picture's
    latents, and what comes of chance and of the region's own feature (None where there is no such peer)."""

    question_type: str
    is_right: bool
    own: Sequence[bool]
    other: Sequence[bool]
    chance: float | None = None
    best: bool | None = None


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    model = vitalrt.load(arguments.model, device="cpu", dtype="float32")
    windows = Windows.of(model)
    words: list[Hits] = []
    pictures: list[Hits] = []
    neighbours: list[Hits] = []
    for asked in ask_all(model, arguments.split, arguments.seed, arguments.count):
        words += read_all(windows, asked)
        for picture, neighbour in (aim_all(windows, one) for one in asked):
            pictures += picture
            neighbours += neighbour
    result = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "environment": latency.environment(model),
        "split": arguments.split,
        "seed": arguments.seed,
        "phantoms": arguments.count,
        "k": K,
        "words": summary(words),
        "pictures": summary(pictures),
        "neighbours": summary(neighbours),
    }
    result["claims"] = claims(result)
    print_result(result)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "explanations.json"
    replace_whole(path, lambda partial: partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8"))
    print("written:", path)
    return 0 if all(claim["is_met"] for claim in result["claims"]) else 1


def ask_all(model: Model, split: str, seed: int, count: int) -> Iterator[list[Asked]]:
    """Every question of every phantom, and once more about the next phantom."""
    for first in track(range(0, count, PHANTOMS_AT_A_TIME), "explanations", console=Console(stderr=True)):
        asked: list[tuple[Phantom, Sample]] = []
        requests: list[Request] = []
        for index in range(first, min(first + PHANTOMS_AT_A_TIME, count)):
            phantom, following = (draw_phantom(split, seed, (index + shift) % count) for shift in (0, 1))
            for sample in ask(phantom):
                asked.append((phantom, sample))
                requests += [
                    Request(shown.image, sample.question, k=K, max_new_tokens=MAX_ANSWER_TOKENS)
                    for shown in (phantom, following)
                ]
        answers = model.generate_batch(requests)
        pairs = zip(asked, answers[::2], answers[1::2], strict=True)
        yield [Asked(phantom, sample, answer, other.latents) for (phantom, sample), answer, other in pairs]


def read_all(windows: Windows, asked: Sequence[Asked]) -> list[Hits]:
    """Whether each step's words are those of the chain of reasoning, where that has not ended."""
    own = iter(windows.words(torch.cat([one.answer.latents[: one.sample.num_steps] for one in asked])))
    other = iter(windows.words(torch.cat([one.other[: one.sample.num_steps] for one in asked])))
    return [
        Hits(
            one.sample.question_type,
            is_right(one.answer.text, one.sample),
            [normalise(next(own)) == normalise(step) for step in one.sample.chain],
            [normalise(next(other)) == normalise(step) for step in one.sample.chain],
        )
        for one in asked
    ]


def aim_all(windows: Windows, one: Asked) -> tuple[list[Hits], list[Hits]]:
    """Whether each step's heat map peaks within the region, and whether the nearest region is of the same name and
    modality. Nothing where the phantom does not show what is asked about."""
    mask = phantom_mask(one.phantom, one.sample.target_name)
    if mask is None:
        return [], []
    [roi] = roi_features(windows.encoder, [(one.phantom.image, mask)])
    aims = torch.cat(
        (
            aim(windows.scaffold, one.answer.latents),
            aim(windows.scaffold, one.other),
            torch.from_numpy(roi.feature)[None],
        )
    )
    [maps] = heatmaps(windows.encoder, [one.phantom.image], aims)
    inside = [peaks_within(heatmap, mask) for heatmap in maps]
    label = label_of(one.sample.target_name, one.phantom.modality)
    alike = [found.label == label for [found] in windows.index.nearest(aims, 1)]
    share = windows.index.labels.count(label) / len(windows.index.labels)
    kind, right = one.sample.question_type, is_right(one.answer.text, one.sample)
    return (
        [Hits(kind, right, inside[:K], inside[K : 2 * K], float(mask.mean()), inside[-1])],
        [Hits(kind, right, alike[:K], alike[K : 2 * K], share, alike[-1])],
    )


def summary(hits: Sequence[Hits]) -> dict[str, Any]:
    """Shares of steps, over all, by step, by question type, and by whether the answer was right."""
    kinds = sorted({one.question_type for one in hits})
    found: dict[str, Any] = {
        "questions": len(hits),
        "steps": sum(len(one.own) for one in hits),
        "share": share_of(hits, "own"),
        "other_picture": share_of(hits, "other"),
        "by_step": [mean([one.own[k] for one in hits if len(one.own) > k]) for k in range(K)],
        "by_type": {kind: share_of([one for one in hits if one.question_type == kind], "own") for kind in kinds},
        "answer_right": share_of([one for one in hits if one.is_right], "own"),
        "answer_wrong": share_of([one for one in hits if not one.is_right], "own"),
    }
    if hits[0].chance is not None:
        weights = [len(one.own) for one in hits]
        found["chance"] = float(np.average([one.chance or 0.0 for one in hits], weights=weights))
        found["regions_own_feature"] = float(np.average([bool(one.best) for one in hits], weights=weights))
    return found


def share_of(hits: Sequence[Hits], which: str) -> float | None:
    return mean([hit for one in hits for hit in getattr(one, which)])


def mean(values: Sequence[bool]) -> float | None:
    """None where there are no values."""
    return sum(values) / len(values) if values else None


def claims(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What the windows promise, and what was measured."""
    words, pictures, neighbours = result["words"], result["pictures"], result["neighbours"]
    found = [
        ("words: twice as often the chain's as with another picture's latents", words["other_picture"] * 2, words),
        (
            "pictures: peaks within the region three times as often as chance",
            pictures["chance"] * TIMES_CHANCE,
            pictures,
        ),
        (
            "neighbours: of the same name and modality more often than with another's",
            neighbours["other_picture"],
            neighbours,
        ),
    ]
    return [
        {"text": text, "required": required, "measured": one["share"], "is_met": one["share"] > required}
        for text, required, one in found
    ]


def print_result(result: dict[str, Any]) -> None:
    console = Console()
    console.print(
        f"{result['phantoms']} {result['split']} phantoms, seed {result['seed']}, k={result['k']}; shares of steps"
    )
    names = ("words", "pictures", "neighbours")
    table = Table("shown as it should be", *names)
    rows: dict[str, list[float | None]] = {
        "all steps": [result[name]["share"] for name in names],
        **{f"step {k + 1}": [result[name]["by_step"][k] for name in names] for k in range(K)},
        "where the answer is right": [result[name]["answer_right"] for name in names],
        "where the answer is wrong": [result[name]["answer_wrong"] for name in names],
        "another picture's latents": [result[name]["other_picture"] for name in names],
        "chance": [result[name].get("chance") for name in names],
        "the region's own feature": [result[name].get("regions_own_feature") for name in names],
    }
    for label, figures in rows.items():
        table.add_row(label, *("" if figure is None else f"{figure:.1%}" for figure in figures))
    table.add_row("steps", *(f"{result[name]['steps']:,}" for name in names))
    console.print(table)
    for claim in result["claims"]:
        met = "met" if claim["is_met"] else "NOT MET"
        console.print(f"{met}: {claim['text']} ({claim['measured']:.1%}, wanted above {claim['required']:.1%})")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.explanations", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default=BUNDLED, help="directory with scaffolding, encoder and index")
    parser.add_argument("--split", default="test", choices=("train", "validation", "test"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=500, help="phantoms")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args(argv)
    if arguments.count < 2:
        parser.error(f"--count: expected at least 2, one of them the other picture, got {arguments.count}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
