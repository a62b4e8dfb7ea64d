"""Whether latents matter: what becomes of answers when z_1..z_{K-1} are not the question's own.

The last latent is left to be thought, from what was given and with the prompt's keys and values in reach: the answer's
first token is read from it, so another question's would bring its answer along, which OTHER_WHOLE shows. Answers that
stay say that the steps before the last hold nothing the answer needs; answers that follow, that they carry it.

N questions, K latent steps, d backbone width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from vitalrt.api import Model
from vitalrt.engine.request import Answer
from vitalrt.errors import VitalError
from vitalrt_training.data.phantom import Sample
from vitalrt_training.evaluate import MAX_ANSWER_TOKENS, Question, Shown, normalise, questions_at_a_time

OWN = "its own"
OTHER_PICTURE = "another picture's"
"""Of the same question about it."""
OTHER_QUESTION = "another question's"
"""Of the same type."""
MEAN = "the mean"
"""Of all questions, step by step."""
NOISE = "noise"
"""Normal, with the mean and deviation of all questions, step by step and feature by feature."""
OTHER_WHOLE = "another's, the last too"

Given = Callable[[int], torch.Tensor]
"""Of a question, by its number, the latents that stand for its own: [J, d]."""


def patch_latents(model: Model, shown: Sequence[Shown], k: int) -> dict[str, Any]:
    """Closed questions only, greedy, with k latent steps.

    "latents" has for each kind of latents: accuracy, overall and by question type; unchanged, the share of answers that
    are those with the question's own; follows, of the questions to which the two pictures get different answers, the
    share that gets the other picture's (None where there are none).  Raises VitalError where there is nothing to patch.
    """
    if k < 2:
        raise VitalError(f"k: expected at least 2 latent steps, as the last one is never patched, got {k}")
    if len(shown) < 2:
        raise VitalError(f"count: expected at least 2 pictures, got {len(shown)}")
    samples: list[Sample] = []
    own: list[Answer] = []
    other: list[Answer] = []
    for asked in questions_at_a_time(shown, 0, f"k={k}"):
        samples += [one.sample for one in asked if one.sample.closed]
        own += _run(model, asked, k)
    if not samples:
        raise VitalError("samples: expected some whose answers are compared word for word, got none")
    for asked in questions_at_a_time(shown, 1, f"k={k}, another picture"):
        other += _run(model, asked, k)
    kinds = _kinds_of_latents(samples, own, other)
    found: dict[str, list[str]] = {kind: [] for kind in kinds}
    for asked in questions_at_a_time(shown, 0, f"k={k}, other latents"):
        for kind, given in kinds.items():
            answers = _run(model, asked, k, given, first=len(found[kind]))
            found[kind] += [answer.text for answer in answers]
    return {
        "k": k,
        "closed_questions": len(samples),
        "answers_that_differ": sum(mine.text != theirs.text for mine, theirs in zip(own, other, strict=True)),
        "latents": {kind: _outcome(samples, own, other, texts) for kind, texts in found.items()},
    }


def print_patched(report: dict[str, Any]) -> None:
    """report: of patch_latents."""
    console = Console()
    console.print(
        f"{report['closed_questions']:,} closed questions, k={report['k']}, answered with other latents for the first "
        f"{report['k'] - 1}. {report['answers_that_differ']:,} have another answer about another picture."
    )
    table = Table("latents", "right", "as with its own", "as about the other")
    for kind, one in report["latents"].items():
        table.add_row(kind, *("" if share is None else f"{share:.1%}" for share in list(one.values())[:3]))
    console.print(table)


def _run(model: Model, asked: Sequence[Question], k: int, given: Given | None = None, first: int = 0) -> list[Answer]:
    """Answers to the closed ones of a few questions.  first: the number of the first of these."""
    closed = [one for one in asked if one.sample.closed]
    prompts = [model.prepare(one.picture, one.sample.question) for one in closed]
    latents = None if given is None else [given(first + n) for n in range(len(closed))]
    return model.run(prompts, k, MAX_ANSWER_TOKENS, latents=latents)


def _kinds_of_latents(samples: Sequence[Sample], own: Sequence[Answer], other: Sequence[Answer]) -> dict[str, Given]:
    latents = torch.stack([answer.latents for answer in own])
    mean, deviation = latents.mean(dim=0), latents.std(dim=0)
    donor = _next_of_type(samples)
    generator = torch.Generator().manual_seed(0)

    def noise(_: int) -> torch.Tensor:
        return (mean + deviation * torch.randn(mean.shape, generator=generator))[:-1]

    return {
        OWN: lambda n: latents[n, :-1],
        OTHER_PICTURE: lambda n: other[n].latents[:-1],
        OTHER_QUESTION: lambda n: latents[donor[n], :-1],
        MEAN: lambda n: mean[:-1],
        NOISE: noise,
        OTHER_WHOLE: lambda n: other[n].latents,
    }


def _next_of_type(samples: Sequence[Sample]) -> list[int]:
    """For each question the next one of its type; the first for the last."""
    numbers: defaultdict[str, list[int]] = defaultdict(list)
    for number, sample in enumerate(samples):
        numbers[sample.question_type].append(number)
    following = {a: b for of_type in numbers.values() for a, b in zip(of_type, of_type[1:] + of_type[:1], strict=True)}
    return [following[number] for number in range(len(samples))]


def _outcome(
    samples: Sequence[Sample], own: Sequence[Answer], other: Sequence[Answer], texts: Sequence[str]
) -> dict[str, Any]:
    is_right = [normalise(text) == normalise(sample.answer) for sample, text in zip(samples, texts, strict=True)]
    by_type: defaultdict[str, list[bool]] = defaultdict(list)
    for sample, right in zip(samples, is_right, strict=True):
        by_type[sample.question_type].append(right)
    together = list(zip(own, other, texts, strict=True))
    return {
        "accuracy": _share(is_right),
        "unchanged": _share([text == mine.text for mine, _, text in together]),
        "follows": _share([text == theirs.text for mine, theirs, text in together if mine.text != theirs.text]),
        "by_type": {kind: _share(found) for kind, found in sorted(by_type.items())},
    }


def _share(hits: Sequence[bool]) -> float | None:
    return sum(hits) / len(hits) if hits else None
