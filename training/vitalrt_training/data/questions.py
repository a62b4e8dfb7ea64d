"""The six types of question about a phantom. Wording never gives the answer away: see scene.py for the balance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from vitalrt_training.data import teacher
from vitalrt_training.data.modalities import CATALOG, KINDS
from vitalrt_training.data.records import Phantom, Sample, Target, make_rng
from vitalrt_training.data.scene import COUNT_ODDS
from vitalrt_training.data.teacher import Verdict

QUESTION_TYPES = ("yesno", "identify", "location_choice", "location", "describe", "reasoning")

PRESENCE = ("Is the {name} visible in this image?", "Can the {name} be seen here?", "Does this image show the {name}?")
IDENTIFY = {
    "organ": ("Which structure is shown in this image?", "What structure can be seen here?"),
    "lesion": ("Which abnormality is shown in this image?", "What abnormality can be seen here?"),
}
IDENTIFY_PLACE = ("What is in the {place} of the image?", "What can be seen in the {place}?")
SIDE = ("Is the {name} in the left or the right half of the image?", "Is the {name} on the left or on the right?")
LOCATION = ("Where in the image is the {name}?", "Where is the {name}?")
DESCRIBE = ("Describe the {name}.", "What does the {name} look like?")
LARGER = ("Is the {a} larger than the {b}?",)
BESIDE = (("Is the {a} to the left of the {b}?",), ("Is the {a} above the {b}?",))
INSIDE = ("Is the {a} inside the {b}?",)
COUNT = ("Are there more than two {plural}?",)
LARGER_SIDE = ("Is the larger {name} on the left?",)

ABSENT_FROM_OTHER_MODALITY = 0.2
"""Share of the questions with answer no that name something another modality shows."""


def ask(phantom: Phantom) -> list[Sample]:
    """All questions of one phantom, about seven; the same phantom always gives the same samples."""
    rng = make_rng(phantom.split, phantom.seed, phantom.index, stream=1)
    shown: dict[str, list[Target]] = {}
    for target in phantom.targets:
        shown.setdefault(target.name, []).append(target)
    single = [targets[0] for targets in shown.values() if len(targets) == 1]
    single = [single[i] for i in rng.permutation(len(single))]
    return [
        *_presence(rng, phantom, shown),
        *_identify(rng, phantom, shown),
        *_side(rng, single),
        *_location(rng, single),
        *_describe(rng, phantom, single),
        *_compare(rng, phantom, single),
        *_inside(rng, phantom, single),
        *_count(rng, phantom, shown),
    ]


def _sample(
    rng: np.random.Generator, question_type: str, templates: Sequence[str], target: str, verdict: Verdict, **words: str
) -> Sample:
    """One sample about the target of this name, with a random wording."""
    question = templates[int(rng.integers(len(templates)))].format(**words)
    closed = question_type != "describe"
    return Sample(question, verdict.answer, question_type, target, KINDS[target].type, verdict.chain, closed)


def _presence(rng: np.random.Generator, phantom: Phantom, shown: dict[str, list[Target]]) -> Iterator[Sample]:
    """Two of the modality's three names, whether present or not: each is in half of the scenes."""
    for slot in rng.permutation(3)[:2]:
        name = CATALOG[phantom.modality].kinds[slot].name
        if name not in shown and rng.random() < ABSENT_FROM_OTHER_MODALITY:
            # The kind at the same place of another modality: every name loses as many questions as it gains.
            others = [other for other in CATALOG if other != phantom.modality]
            name = CATALOG[others[rng.integers(len(others))]].kinds[slot].name
        verdict = teacher.judge_presence(name, shown.get(name, []))
        yield _sample(rng, "yesno", PRESENCE, name, verdict, name=name)


def _identify(rng: np.random.Generator, phantom: Phantom, shown: dict[str, list[Target]]) -> Iterator[Sample]:
    """The only structure or the only abnormality, or what lies in one place."""
    for target_type, templates in IDENTIFY.items():
        names = [name for name in shown if KINDS[name].type == target_type]
        if len(names) == 1:
            verdict = teacher.name_target(shown[names[0]][0])
            if verdict:
                yield _sample(rng, "identify", templates, names[0], verdict)
    if phantom.layout == "spread" and phantom.targets and rng.random() < 0.5:
        target = phantom.targets[rng.integers(len(phantom.targets))]
        verdict, spot = teacher.name_target(target), teacher.place(target.mask)
        if verdict and spot:
            yield _sample(rng, "identify", IDENTIFY_PLACE, target.name, verdict, place=spot)


def _side(rng: np.random.Generator, single: list[Target]) -> Iterator[Sample]:
    for target in single[:2]:
        if verdict := teacher.judge_side(target):
            yield _sample(rng, "location_choice", SIDE, target.name, verdict, name=target.name)


def _location(rng: np.random.Generator, single: list[Target]) -> Iterator[Sample]:
    for target in single[:2]:
        if verdict := teacher.locate(target):
            yield _sample(rng, "location", LOCATION, target.name, verdict, name=target.name)


def _describe(rng: np.random.Generator, phantom: Phantom, single: list[Target]) -> Iterator[Sample]:
    for target in single[:1]:
        if verdict := teacher.describe(phantom.image, target):
            yield _sample(rng, "describe", DESCRIBE, target.name, verdict, name=target.name)


def _compare(rng: np.random.Generator, phantom: Phantom, single: list[Target]) -> Iterator[Sample]:
    """Size and position of two things; `single` comes in random order, so either answer is as likely."""
    if phantom.layout != "spread" or len(single) < 2:
        return
    a, b = single[:2]
    if verdict := teacher.compare_size(a, b):
        yield _sample(rng, "reasoning", LARGER, a.name, verdict, a=a.name, b=b.name)
    axis = int(rng.integers(2))
    if verdict := teacher.compare_position(a, b, axis):
        yield _sample(rng, "reasoning", BESIDE[axis], a.name, verdict, a=a.name, b=b.name)


def _inside(rng: np.random.Generator, phantom: Phantom, single: list[Target]) -> Iterator[Sample]:
    """Only in nested scenes, half of which have the inner thing inside."""
    if phantom.layout != "nested":
        return
    by_name = {target.name: target for target in single}
    outer, inner = (by_name[name] for name in CATALOG[phantom.modality].nested)
    if verdict := teacher.judge_inside(inner, outer):
        yield _sample(rng, "reasoning", INSIDE, inner.name, verdict, a=inner.name, b=outer.name)


def _count(rng: np.random.Generator, phantom: Phantom, shown: dict[str, list[Target]]) -> Iterator[Sample]:
    """How many of the one lesion kind that a spread scene of at most two kinds may repeat."""
    lesions = [name for name in shown if KINDS[name].type == "lesion"]
    if phantom.layout != "spread" or len(shown) > 2 or not lesions:
        return
    repeated = [name for name in lesions if len(shown[name]) > 1]
    name = repeated[0] if repeated else lesions[rng.integers(len(lesions))]
    targets = shown[name]
    # Low counts are more frequent: some go unasked, so that yes and no are even.
    odds_few, odds_many = sum(COUNT_ODDS[:2]), sum(COUNT_ODDS[2:])
    verdict = teacher.judge_count(targets)
    if verdict and (len(targets) > 2 or rng.random() < odds_many / odds_few):
        yield _sample(rng, "reasoning", COUNT, name, verdict, plural=KINDS[name].plural)
    if len(targets) == 2 and (verdict := teacher.judge_larger_side(targets)):
        yield _sample(rng, "reasoning", LARGER_SIDE, name, verdict, name=name)
