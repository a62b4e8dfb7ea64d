"""How well a model answers about pictures, and whether it looks at them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vitalrt.api import Model
from vitalrt.engine.request import Request
from vitalrt.errors import VitalError
from vitalrt_training.data.phantom import Sample, ask, draw_phantom
from vitalrt_training.data.tables import Tables
from vitalrt_training.written import answer_of

PICTURES_AT_A_TIME = 16
MAX_ANSWER_TOKENS = 24  # without a written thought
OPEN_TYPE = "describe"  # answered in a sentence; every other answer is compared word for word


class Shown(NamedTuple):
    """A picture (uint8 RGB [H, W, 3]) and what is asked about it."""

    picture: np.ndarray
    modality: str
    samples: Sequence[Sample]


class Question(NamedTuple):
    """One of Shown's samples, with its own or another picture.  number: of its own."""

    picture: np.ndarray
    modality: str
    sample: Sample
    number: int


class Phantoms(Sequence[Shown]):
    """The first `count` phantoms of a seed, drawn when they are asked for."""

    def __init__(self, split: str, seed: int, count: int) -> None:
        self.split, self.seed, self.indices = split, seed, range(count)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        phantom = draw_phantom(self.split, self.seed, self.indices[index])
        return Shown(phantom.image, phantom.modality, ask(phantom))


class TablePictures(Sequence[Shown]):
    """The pictures of a split of the training tables, in their order."""

    def __init__(self, tables: Tables, split: str) -> None:
        self.tables = tables
        rows = tables.select(split)
        self.rows_of_picture = [
            rows[tables.image_rows[rows] == image].tolist() for image in np.unique(tables.image_rows[rows])
        ]

    def __len__(self) -> int:
        return len(self.rows_of_picture)

    def __getitem__(self, index: Any) -> Any:
        rows = self.rows_of_picture[index]
        image = self.tables.images[int(self.tables.image_rows[rows[0]])]
        return Shown(self.tables.read_picture(rows[0]), image["modality"], [self._sample(row) for row in rows])

    def _sample(self, row: int) -> Sample:
        found = self.tables.samples[row]
        texts = {name: found[name] for name in ("question", "answer", "question_type", "target_name", "target_type")}
        return Sample(**texts, chain=tuple(found["chain"]), closed=found["question_type"] != OPEN_TYPE)


@dataclass(frozen=True)
class Outcome:
    """One question, and what was written: num_tokens of it, a thought before the answer included."""

    sample: Sample
    modality: str
    text: str
    num_tokens: int

    @property
    def is_right(self) -> bool:
        return is_right(self.text, self.sample)


def is_right(text: str, sample: Sample) -> bool:
    """Word for word, whatever thought is written before the answer."""
    return normalise(answer_of(text)) == normalise(sample.answer)


def normalise(text: str) -> str:
    return " ".join(text.lower().split())


def evaluate(model: Model, shown: Sequence[Shown], steps: Sequence[int]) -> dict[str, Any]:
    """Exact-match accuracy on closed questions, for each k of `steps`, at least one.

    The last k is reported per question type, modality and chain length, beside the share of the most common answer of
    each type, and once more with every question asked about the next picture ("shuffled").
    """
    if len(shown) < 2:
        raise VitalError(f"count: expected at least 2 pictures, got {len(shown)}")
    ks = list(steps)
    by_k = {}
    for k in ks:
        outcomes = list(ask_all(model, shown, k, shift=0))
        by_k[k] = _closed(outcomes)
    shuffled = _closed(list(ask_all(model, shown, ks[-1], shift=1)))
    closed = by_k[ks[-1]]
    if not closed:
        raise VitalError("samples: expected some whose answers are compared word for word, got none")
    majority = majority_of_type(closed)
    return {
        "pictures": len(shown),
        "k": ks[-1],
        "closed_questions": len(closed),
        "accuracy": accuracy(closed),
        "majority_accuracy": sum(majority[o.sample.question_type][1] for o in closed) / len(closed),
        "shuffled_accuracy": accuracy(shuffled),
        "describe_accuracy": accuracy([o for o in outcomes if not o.sample.closed]),
        "by_k": {k: accuracy(found) for k, found in by_k.items()},
        "tokens_by_k": {k: fmean(outcome.num_tokens for outcome in found) for k, found in by_k.items()},
        "by_k_and_type": {k: group_accuracy(found, _type) for k, found in by_k.items()},
        "by_type": group_accuracy(closed, _type),
        "by_type_shuffled": group_accuracy(shuffled, _type),
        "majority_of_type": {name: {"answer": a, "share": s} for name, (a, s) in majority.items()},
        "by_modality": group_accuracy(closed, _modality),
        "by_chain_length": group_accuracy(closed, _chain_length),
    }


def ask_all(model: Model, shown: Sequence[Shown], k: int, shift: int) -> Iterator[Outcome]:
    """Every question of every picture, asked about the picture `shift` places further on."""
    for asked in questions_at_a_time(shown, shift, f"k={k}, shuffled" if shift else f"k={k}"):
        requests = [
            Request(one.picture, one.sample.question, k=k, max_new_tokens=room_for(model, one.sample)) for one in asked
        ]
        for one, answer in zip(asked, model.generate_batch(requests), strict=True):
            yield Outcome(one.sample, one.modality, answer.text, answer.usage.completion_tokens)


def room_for(model: Model, sample: Sample) -> int:
    """Tokens that may be written: an answer, and before it a thought of twice the length of the sample's own chain."""
    return MAX_ANSWER_TOKENS + 2 * len(model.processor.tokenizer("\n".join(sample.chain))["input_ids"])


def questions_at_a_time(shown: Sequence[Shown], shift: int, title: str) -> Iterator[list[Question]]:
    """The questions of a few pictures at a time, each with the picture `shift` places further on, behind a bar."""
    first_of_chunk = range(0, len(shown), PICTURES_AT_A_TIME)
    for first in track(first_of_chunk, title, console=Console(stderr=True)):
        asked = []
        for index in range(first, min(first + PICTURES_AT_A_TIME, len(shown))):
            one = shown[index]
            picture = one.picture if shift == 0 else shown[(index + shift) % len(shown)].picture
            asked += [Question(picture, one.modality, sample, index) for sample in one.samples]
        yield asked


def majority_of_type(outcomes: Sequence[Outcome]) -> dict[str, tuple[str, float]]:
    """Per question type: its most common answer and that answer's share."""
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for outcome in outcomes:
        answers[outcome.sample.question_type][normalise(outcome.sample.answer)] += 1
    common = {name: counts.most_common(1)[0] for name, counts in answers.items()}
    return {name: (answer, count / answers[name].total()) for name, (answer, count) in common.items()}


def accuracy(outcomes: Sequence[Outcome]) -> float:
    return sum(outcome.is_right for outcome in outcomes) / len(outcomes) if outcomes else float("nan")


def group_accuracy(outcomes: Sequence[Outcome], key: Callable[[Outcome], str]) -> dict[str, dict[str, float]]:
    groups: defaultdict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        groups[key(outcome)].append(outcome)
    return {name: {"accuracy": accuracy(found), "questions": len(found)} for name, found in sorted(groups.items())}


def print_report(report: dict[str, Any]) -> None:
    console = Console()
    console.print(
        f"{report['pictures']} {report['split']} pictures, k={report['k']}: "
        f"{report['accuracy']:.1%} of {report['closed_questions']} closed questions right "
        f"(most common answer per type {report['majority_accuracy']:.1%}, images shuffled "
        f"{report['shuffled_accuracy']:.1%}; open descriptions word for word {report['describe_accuracy']:.1%})"
    )
    table = Table("question type", *(f"k={k}" for k in report["by_k"]), "shuffled", "most common answer", "questions")
    for name, group in report["by_type"].items():
        per_k = [f"{groups[name]['accuracy']:.1%}" for groups in report["by_k_and_type"].values()]
        majority = report["majority_of_type"][name]
        shuffled = f"{report['by_type_shuffled'][name]['accuracy']:.1%}"
        table.add_row(
            name, *per_k, shuffled, f"{majority['share']:.1%} ({majority['answer']})", str(group["questions"])
        )
    overall = [f"{value:.1%}" for value in report["by_k"].values()]
    summary = (f"{report['shuffled_accuracy']:.1%}", f"{report['majority_accuracy']:.1%}")
    table.add_row("all", *overall, *summary, str(report["closed_questions"]), style="bold")
    table.add_row("tokens written", *(f"{tokens:.1f}" for tokens in report["tokens_by_k"].values()))
    console.print(table)
    for title, key in (("modality", "by_modality"), ("chain length", "by_chain_length")):
        table = Table(title, f"k={report['k']}", "questions")
        for name, group in report[key].items():
            table.add_row(name, f"{group['accuracy']:.1%}", str(group["questions"]))
        console.print(table)


def _closed(outcomes: Sequence[Outcome]) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.sample.closed]


def _type(outcome: Outcome) -> str:
    return outcome.sample.question_type


def _modality(outcome: Outcome) -> str:
    return outcome.modality


def _chain_length(outcome: Outcome) -> str:
    return str(outcome.sample.num_steps)
