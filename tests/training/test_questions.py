"""Questions: every answer follows from the masks, every type is covered, and no wording gives an answer away."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from functools import lru_cache

import numpy as np
import pytest

from vitalrt_training.data.modalities import KINDS
from vitalrt_training.data.phantom import MODALITIES, Phantom, Sample, ask, draw_phantom
from vitalrt_training.data.questions import QUESTION_TYPES

NUM_STEPS = {
    "yesno": {1},
    "identify": {1},
    "location_choice": {1},
    "location": {2},
    "describe": {2, 3},
    "reasoning": {3, 4},
}
LEAKS = ("mask", "overlay", "highlight", "annotat", "segment", "outline", "contour", "marked", "label", "ground truth",
         "patient", "bounding", "region", "red", "yellow")  # fmt: skip


@lru_cache(maxsize=4)
def drawn(seed: int, count: int = 700) -> list[tuple[Phantom, Sample]]:
    phantoms = (draw_phantom("train", seed, index) for index in range(count))
    return [(phantom, sample) for phantom in phantoms for sample in ask(phantom)]


def samples(seed: int) -> list[Sample]:
    return [sample for _, sample in drawn(seed)]


def middle(mask: np.ndarray) -> tuple[float, float]:
    """(x, y) centroid as fractions, 0 to 1."""
    rows, columns = np.nonzero(mask)
    return (columns.mean() + 0.5) / mask.shape[1], (rows.mean() + 0.5) / mask.shape[0]


def spell_place(mask: np.ndarray) -> str:
    x, y = middle(mask)
    if max(abs(x - 0.5), abs(y - 0.5)) < 0.09:
        return "center"
    return f"{'upper' if y < 0.5 else 'lower'} {'left' if x < 0.5 else 'right'}"


def yes(truth: bool) -> str:
    return "yes" if truth else "no"


def recompute(phantom: Phantom, sample: Sample) -> str:
    """The answer from the question and the masks alone, without the teacher."""
    masks = defaultdict(list)
    for target in phantom.targets:
        masks[target.name].append(target.mask)
    question, name = sample.question, sample.target_name
    if sample.question_type == "yesno":
        assert name in question
        return yes(name in masks)
    if sample.question_type == "identify":
        if found := re.search(r"in the (upper left|upper right|lower left|lower right|center)", question):
            return next(t.name for t in phantom.targets if spell_place(t.mask) == found[1])
        wanted = "organ" if "structure" in question else "lesion"
        (only,) = {t.name for t in phantom.targets if t.type == wanted}
        return only
    if sample.question_type == "location_choice":
        return "left" if middle(masks[name][0])[0] < 0.5 else "right"
    if sample.question_type == "location":
        return spell_place(masks[name][0])
    if found := re.fullmatch(r"Is the (.+) larger than the (.+)\?", question):
        return yes(masks[found[1]][0].sum() > masks[found[2]][0].sum())
    if found := re.fullmatch(r"Is the (.+) to the left of the (.+)\?", question):
        return yes(middle(masks[found[1]][0])[0] < middle(masks[found[2]][0])[0])
    if found := re.fullmatch(r"Is the (.+) above the (.+)\?", question):
        return yes(middle(masks[found[1]][0])[1] < middle(masks[found[2]][0])[1])
    if found := re.fullmatch(r"Is the (.+) inside the (.+)\?", question):
        inner, outer = masks[found[1]][0], masks[found[2]][0]
        return yes((inner & outer).sum() > 0.5 * inner.sum())
    if question == f"Are there more than two {KINDS[name].plural}?":
        return yes(len(masks[name]) > 2)
    assert question == f"Is the larger {name} on the left?" and len(masks[name]) == 2
    return yes(middle(max(masks[name], key=np.sum))[0] < 0.5)


def test_every_closed_answer_follows_from_the_masks():
    for phantom, sample in drawn(0):
        assert sample.closed == (sample.question_type != "describe")
        if sample.closed:
            assert sample.answer == recompute(phantom, sample), (sample, phantom.seed, phantom.index)


def test_answers_are_bare_and_names_are_those_of_the_phantom():
    for phantom, sample in drawn(0):
        assert KINDS[sample.target_name].type == sample.target_type
        if sample.closed:
            assert sample.answer == sample.answer.lower().strip(" .")
        if sample.question_type == "describe":
            (target,) = (t for t in phantom.targets if t.name == sample.target_name)
            assert sample.answer.endswith(f"{sample.target_name} in the {spell_place(target.mask)}.")


def test_margins_are_generous():
    for phantom, sample in drawn(0):
        shown = [t.mask for t in phantom.targets if t.name == sample.target_name]
        if sample.question_type == "location_choice":
            assert abs(middle(shown[0])[0] - 0.5) >= 0.08
        if "larger than" in sample.question:
            areas = sorted(t.mask.sum() for t in phantom.targets if t.name in sample.question)
            assert areas[-1] >= 1.6 * areas[0]


def test_chains_have_the_length_of_their_type_and_short_steps():
    for sample in samples(0):
        assert sample.num_steps == len(sample.chain) and sample.num_steps in NUM_STEPS[sample.question_type]
        assert all(0 < len(step.split()) <= 14 and step.endswith(".") for step in sample.chain)


def test_reasoning_steps_are_true_of_the_masks():
    for phantom, sample in drawn(0):
        shown = defaultdict(list)
        for target in phantom.targets:
            shown[target.name].append(target.mask)
        for step in sample.chain:
            if found := re.fullmatch(r"The (.+) is in the (upper|lower) half\.", step):
                assert (middle(shown[found[1]][0])[1] < 0.5) == (found[2] == "upper")
            elif found := re.fullmatch(r"The (.+) one is in the (.+)\.", step):
                pick = {"larger": (max, np.sum), "smaller": (min, np.sum), "highest": (min, lambda m: middle(m)[1])}
                choose, key = pick[found[1]]
                assert spell_place(choose(shown[sample.target_name], key=key)) == found[2]
            elif found := re.fullmatch(r"The (.+) is in the (.+)\.", step):
                assert found[2] in [spell_place(mask) for mask in shown[found[1]]]
            elif found := re.fullmatch(r"There are (two|three|four) (.+)\.", step):
                assert len(shown[sample.target_name]) == ("zero", "one", "two", "three", "four").index(found[1])
            elif found := re.fullmatch(r"The (.+) is larger than the (.+)\.", step):
                assert shown[found[1]][0].sum() > shown[found[2]][0].sum()
            elif found := re.fullmatch(r"No (.+) is present\.", step):
                assert found[1] not in shown


def test_no_wording_speaks_of_masks_or_patients_or_names_the_modality():
    for sample in samples(0):
        for text in (sample.question, sample.answer, *sample.chain):
            assert not [word for word in LEAKS if re.search(rf"\b{word}", text.lower())], text
            assert not [name for name in MODALITIES if re.search(rf"\b{name}\b", text.lower())], text


def test_the_vocabulary_is_small():
    texts = [text for sample in samples(0) for text in (sample.question, sample.answer, *sample.chain)]
    assert len({word for text in texts for word in re.findall(r"[a-z]+", text.lower())}) < 200


@pytest.mark.parametrize("modality", MODALITIES)
def test_every_modality_covers_every_type(modality):
    found = {sample.question_type for i in range(60) for sample in ask(draw_phantom("train", 9, i, modality))}
    assert found == set(QUESTION_TYPES)


def test_answers_are_balanced():
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in samples(0) + samples(1):
        counts[sample.question_type][sample.answer] += 1
    for question_type in ("yesno", "reasoning"):
        share = counts[question_type]["yes"] / counts[question_type].total()
        assert 0.44 < share < 0.56, question_type
    assert 0.44 < counts["location_choice"]["left"] / counts["location_choice"].total() < 0.56
    assert max(counts["location"].values()) < 0.27 * counts["location"].total()
    assert min(counts["location"].values()) > 0.12 * counts["location"].total()
    assert len(counts["location"]) == 5


def test_the_question_alone_does_not_give_the_answer():
    """The majority answer of each exact question, fitted on other phantoms, is hardly better than that of its type."""

    def accuracy(key) -> float:
        votes: dict[str, Counter[str]] = defaultdict(Counter)
        for sample in samples(1):
            if sample.closed:
                votes[key(sample)][sample.answer] += 1
        closed = [sample for sample in samples(0) if sample.closed]
        right = [bool(votes[key(s)]) and votes[key(s)].most_common(1)[0][0] == s.answer for s in closed]
        return float(np.mean(right))

    assert accuracy(lambda s: s.question) - accuracy(lambda s: s.question_type) < 0.05
