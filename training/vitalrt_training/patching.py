"""Whether latents matter: what becomes of answers when z_1..z_{K-1} are not the question's own.

The last latent is left to be thought, from what was given and with the prompt's keys and values in reach: the answer's
first token is read from it, so another question's would bring its answer along, which LAST_TOO shows. z_0 stays too.
Answers that stay say that what the latents know of this question is not needed; answers that follow, that it is used.
Latents have much in common, which the mean keeps and zeros do not.

N questions, K latent steps, d backbone width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from vitalrt.api import Model
from vitalrt.engine.request import Answer
from vitalrt.errors import VitalError
from vitalrt.inputs.prompt import Prompt
from vitalrt_training.data.phantom import Sample
from vitalrt_training.evaluate import Shown, is_right, questions_at_a_time, room_for
from vitalrt_training.written import answer_of

OWN, MEAN, OTHER_PICTURE, OTHER_QUESTION = "own", "mean", "other_picture", "other_question"
NOISE, ZEROS, LAST_TOO = "noise", "zeros", "other_picture_last_too"
LATENTS = {
    OWN: "its own",
    MEAN: "the mean of all questions, step by step",
    OTHER_PICTURE: "of the same question about another picture",
    OTHER_QUESTION: "of another question of its type",
    NOISE: "noise with the mean and deviation of all",
    ZEROS: "zeros",
    LAST_TOO: "of another picture, and its last latent too",
}
"""What stands for a question's own latents, the first K - 1 but for the last kind. The other question is about another
picture, and of any type where its own has none."""

Given = Callable[[int], torch.Tensor]
"""Of a question, by its number, the latents that stand for its own: [J, d]."""


class Asked(NamedTuple):
    """Closed questions.  pictures: the number of each one's own.  room: tokens that may be written."""

    prompts: list[Prompt]
    samples: list[Sample]
    pictures: list[int]
    room: int


def patch_latents(model: Model, shown: Sequence[Shown], k: int) -> dict[str, Any]:
    """Closed questions only, greedy, with k latent steps.

    "latents" has for each of LATENTS: accuracy, overall and by question type; unchanged, the share of answers that are
    those with the question's own; follows, of the questions to which the two pictures get different answers, the share
    that gets the other picture's (None where there are none).  Raises VitalError where there is nothing to patch, and
    for an ONNX export.
    """
    _ = model.weights  # raises for an ONNX export, before anything is asked
    if k < 2:
        raise VitalError(f"k: expected at least 2 latent steps, one to replace and one to think from it, got {k}")
    samples: list[Sample] = []
    pictures: list[int] = []
    own: list[Answer] = []
    other: list[Answer] = []
    for asked in _closed_at_a_time(model, shown, 0, f"k={k}"):
        samples += asked.samples
        pictures += asked.pictures
        own += model.run(asked.prompts, k, asked.room)
    if len(set(pictures)) < 2:
        raise VitalError(f"pictures: expected at least 2 with closed questions, got {len(set(pictures))}")
    for asked in _closed_at_a_time(model, shown, 1, f"k={k}, another picture"):
        other += model.run(asked.prompts, k, asked.room)
    kinds = _kinds_of_latents(samples, pictures, own, other)
    found: dict[str, list[str]] = {kind: [] for kind in kinds}
    for asked in _closed_at_a_time(model, shown, 0, f"k={k}, other latents"):
        for kind, given in kinds.items():
            first = len(found[kind])
            latents = [given(first + n) for n in range(len(asked.prompts))]
            found[kind] += [answer.text for answer in model.run(asked.prompts, k, asked.room, latents=latents)]
    return {
        "k": k,
        "closed_questions": len(samples),
        "answers_that_differ": sum(
            answer_of(mine.text) != answer_of(theirs.text) for mine, theirs in zip(own, other, strict=True)
        ),
        "latents": {kind: _outcome(samples, own, other, texts) for kind, texts in found.items()},
    }


def print_patched(report: dict[str, Any]) -> None:
    """report: of patch_latents."""
    console = Console()
    questions = report["closed_questions"]
    console.print(
        f"{questions:,} closed questions, k={report['k']}, answered with other latents in place of the first "
        f"{report['k'] - 1}; a point is {questions / 100:.1f} questions. {report['answers_that_differ']:,} have another"
        " answer about another picture."
    )
    table = Table("latents", "right", "unchanged", "the other's")
    for kind, one in report["latents"].items():
        shares = (one["accuracy"], one["unchanged"], one["follows"])
        table.add_row(LATENTS[kind], *("" if share is None else f"{share:.1%}" for share in shares))
    console.print(table)


def _closed_at_a_time(model: Model, shown: Sequence[Shown], shift: int, title: str) -> Iterator[Asked]:
    """shift, title: as in questions_at_a_time."""
    for asked in questions_at_a_time(shown, shift, title):
        closed = [one for one in asked if one.sample.closed]
        if not closed:
            continue
        yield Asked(
            [model.prepare(one.picture, one.sample.question) for one in closed],
            [one.sample for one in closed],
            [one.number for one in closed],
            max(room_for(model, one.sample) for one in closed),
        )


def _kinds_of_latents(
    samples: Sequence[Sample], pictures: Sequence[int], own: Sequence[Answer], other: Sequence[Answer]
) -> dict[str, Given]:
    latents = torch.stack([answer.latents for answer in own])
    mean, deviation = latents.mean(dim=0), latents.std(dim=0)
    donors = _donors(samples, pictures)
    generator = torch.Generator().manual_seed(0)

    def noise(_: int) -> torch.Tensor:
        return (mean + deviation * torch.randn(mean.shape, generator=generator))[:-1]

    return {
        OWN: lambda n: latents[n, :-1],
        MEAN: lambda n: mean[:-1],
        OTHER_PICTURE: lambda n: other[n].latents[:-1],
        OTHER_QUESTION: lambda n: latents[donors[n], :-1],
        NOISE: noise,
        ZEROS: lambda n: torch.zeros_like(mean[:-1]),
        LAST_TOO: lambda n: other[n].latents,
    }


def _donors(samples: Sequence[Sample], pictures: Sequence[int]) -> list[int]:
    """For each question the next one, round and round, about another picture: of its type where there is one."""
    donors = []
    for number, sample in enumerate(samples):
        following = chain(range(number + 1, len(samples)), range(number))
        elsewhere = (n for n in following if pictures[n] != pictures[number])
        first = next(elsewhere)
        of_type = (n for n in chain([first], elsewhere) if samples[n].question_type == sample.question_type)
        donors.append(next(of_type, first))
    return donors


def _outcome(
    samples: Sequence[Sample], own: Sequence[Answer], other: Sequence[Answer], texts: Sequence[str]
) -> dict[str, Any]:
    hits = [is_right(text, sample) for sample, text in zip(samples, texts, strict=True)]
    by_type: defaultdict[str, list[bool]] = defaultdict(list)
    for sample, hit in zip(samples, hits, strict=True):
        by_type[sample.question_type].append(hit)
    together = [
        tuple(map(answer_of, (mine.text, theirs.text, text)))
        for mine, theirs, text in zip(own, other, texts, strict=True)
    ]
    return {
        "accuracy": _share(hits),
        "unchanged": _share([answer == mine for mine, _, answer in together]),
        "follows": _share([answer == theirs for mine, theirs, answer in together if mine != theirs]),
        "by_type": {kind: _share(found) for kind, found in sorted(by_type.items())},
    }


def _share(hits: Sequence[bool]) -> float | None:
    return sum(hits) / len(hits) if hits else None
