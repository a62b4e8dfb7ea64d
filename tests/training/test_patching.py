"""Whether latents matter, measured on models of which that is known."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import vitalrt
from vitalrt.cli import main
from vitalrt.engine.request import Answer, Timings, Usage
from vitalrt_training.data.phantom import Sample
from vitalrt_training.evaluate import Phantoms, Shown
from vitalrt_training.patching import (
    LAST_TOO,
    LATENTS,
    MEAN,
    NOISE,
    OTHER_PICTURE,
    OTHER_QUESTION,
    OWN,
    ZEROS,
    patch_latents,
    print_patched,
)

K, WIDTH = 3, 4


class Known:
    """Thinks of a picture's number and a question's number, and answers with the number of the picture in words.

    It looks at the picture where follows_latents is False, else at its first latent. thought: written before each
    answer, with a number of its own.
    """

    weights = None
    processor = SimpleNamespace(tokenizer=lambda text: {"input_ids": text.split()})

    def __init__(self, follows_latents, thought=""):
        self.follows_latents = follows_latents
        self.thought = thought
        self.given = []
        self.answers = itertools.count()

    def prepare(self, picture, question):
        return int(picture[0, 0, 0]), int(question)

    def run(self, prompts, k, max_new_tokens, latents=None):
        assert max_new_tokens == 24 + 2 * 3, "the chain has three words"
        self.given += latents or []
        answers = []
        for index, (picture, question) in enumerate(prompts):
            own = torch.tensor([[picture, question, step, 1] for step in range(k)], dtype=torch.float32)
            given = own if latents is None else latents[index]
            own[: len(given)] = given
            read = own[0, 0] if self.follows_latents or len(given) == k else picture
            usage, timings = Usage(1, 0, k, 1), Timings(0.0, 0.0, 0.0, 0.0, 0.0)
            thought = self.thought and f"{self.thought} {next(self.answers)}\n</think>\n"
            answers.append(Answer(f"{thought}number  {float(read):g}", [1], "stop", own, usage, timings))
        return answers


def shown(count):
    """Pictures of which every first question is open, and two are right with the picture's number."""
    pictures = []
    for number in range(count):
        answers = [("x", False), (f"Number {number}", True), (f"number {number}", True)]
        samples = [
            Sample(str(place), answer, "yesno" if place < 2 else "location", "t", "organ", ("a b", "c"), closed)
            for place, (answer, closed) in enumerate(answers)
        ]
        pictures.append(Shown(np.full((2, 2, 3), number, np.uint8), "ct", samples))
    return pictures


def test_answers_are_compared_not_the_thoughts_written_before_them():
    for follows_latents in (False, True):
        quiet, aloud = (Known(follows_latents, thought) for thought in ("", "It is thought number"))
        assert patch_latents(aloud, shown(3), K) == patch_latents(quiet, shown(3), K)
        assert patch_latents(aloud, shown(1) * 2, K)["answers_that_differ"] == 0


@pytest.mark.parametrize("count", [2, 19])  # 19: of more than one part
def test_answers_from_the_picture_stay(count):
    report = patch_latents(Known(follows_latents=False), shown(count), K)
    assert report["closed_questions"] == report["answers_that_differ"] == 2 * count
    assert set(report["latents"]) == set(LATENTS)
    for kind in (OWN, MEAN, OTHER_PICTURE, OTHER_QUESTION, NOISE, ZEROS):
        one = report["latents"][kind]
        assert (one["accuracy"], one["unchanged"], one["follows"]) == (1.0, 1.0, 0.0)
    assert report["latents"][LAST_TOO]["follows"] == 1.0


@pytest.mark.parametrize("count", [2, 19])
def test_answers_from_latents_follow(count):
    report = patch_latents(Known(follows_latents=True), shown(count), K)
    own, other = report["latents"][OWN], report["latents"][OTHER_PICTURE]
    assert (own["accuracy"], own["follows"]) == (1.0, 0.0)
    assert (other["accuracy"], other["unchanged"], other["follows"]) == (0.0, 0.0, 1.0)
    assert other["by_type"] == {"location": 0.0, "yesno": 0.0}
    assert report["latents"][OTHER_QUESTION]["follows"] == 1.0  # the next of the type is about the next picture
    assert report["latents"][NOISE]["accuracy"] == 0.0
    assert report["latents"][ZEROS]["accuracy"] == 1 / count  # as about the picture of number 0
    mean = (count - 1) / 2  # the middle picture's number, where there is one
    assert report["latents"][MEAN]["accuracy"] == (1 / count if mean.is_integer() else 0.0)


def test_shares_are_of_the_questions_they_are_told_to_be_of():
    """Two of five pictures look alike, so that their questions have the same answer about either."""
    pictures = shown(5)
    pictures[1] = pictures[1]._replace(picture=pictures[0].picture)  # whose answers are wrong therefore
    report = patch_latents(Known(follows_latents=True), pictures, K)
    assert report["answers_that_differ"] == 8
    other = report["latents"][OTHER_PICTURE]
    assert (other["unchanged"], other["follows"]) == (0.2, 1.0)
    staying = patch_latents(Known(follows_latents=False), pictures, K)["latents"][OTHER_PICTURE]
    assert (staying["unchanged"], staying["follows"]) == (1.0, 0.0)
    assert report["latents"][OWN]["accuracy"] == 0.8
    assert report["latents"][OWN]["by_type"] == {"location": 0.8, "yesno": 0.8}


def test_the_donor_is_about_another_picture_and_of_the_type_where_there_is_one():
    pictures = shown(3)
    pictures[0].samples[2] = Sample("2", "number 0", "yesno", "t", "organ", ("a",), closed=True)  # the second of a type
    pictures[1].samples[2] = Sample("7", "number 1", "rare", "t", "organ", ("a",), closed=True)
    known = Known(follows_latents=True)
    patch_latents(known, pictures, K)
    given = torch.stack([one[0, :2] for one in known.given if len(one) == K - 1])
    kinds = given.view(len(LATENTS) - 1, 6, 2)  # the last kind gives all K; one part, so kinds follow each other
    donors = kinds[list(LATENTS).index(OTHER_QUESTION)].tolist()  # picture and question
    assert donors == [[1, 1], [1, 1], [2, 1], [2, 1], [0, 1], [0, 1]]


def test_noise_is_of_the_latents_mean_and_deviation_step_by_step():
    known = Known(follows_latents=False)
    patch_latents(known, shown(200), K)
    pairs = torch.stack([one for one in known.given if len(one) == K - 1]).view(-1, K - 1, WIDTH)
    noisy = pairs[
        (pairs[..., 1] % 1 != 0).any(dim=1) & (pairs[..., 3] == 1).all(dim=1) & (pairs[..., 1] != 1.5).any(dim=1)
    ]
    assert len(noisy) == 400
    mean, deviation = noisy.mean(dim=0), noisy.std(dim=0)
    assert mean[:, 0].tolist() == pytest.approx([99.5] * 2, abs=12) and mean[:, 1].tolist() == pytest.approx(
        [1.5] * 2, abs=0.1
    )
    assert mean[:, 2].tolist() == [0.0, 1.0]  # the step's own number, which does not vary
    assert deviation[:, 0].tolist() == pytest.approx([57.8] * 2, rel=0.12)
    assert deviation[:, 1].tolist() == pytest.approx([0.5] * 2, rel=0.1)
    assert float(torch.corrcoef(noisy[:, :, 0].T)[0, 1]) == pytest.approx(0.0, abs=0.15)


def test_the_last_latent_is_thought_unless_it_is_given():
    known = Known(follows_latents=True)
    patch_latents(known, shown(2), K)
    assert [len(one) for one in known.given].count(K) == 4 and {len(one) for one in known.given} == {K - 1, K}


def test_what_cannot_be_patched_is_refused():
    known = Known(follows_latents=True)
    for count, k, message in ((2, 1, "k: expected at least 2"), (1, K, "pictures: expected at least 2 .* got 1")):
        with pytest.raises(vitalrt.VitalError, match=message):
            patch_latents(known, shown(count), k)
    with pytest.raises(vitalrt.VitalError, match="pictures: expected at least 2 with closed questions, got 0"):
        patch_latents(known, [one._replace(samples=one.samples[:1]) for one in shown(2)], K)


def test_the_bundled_model_as_it_is():
    """Replayed latents change nothing; the last latent carries the answer, those before it little of the question."""
    report = patch_latents(vitalrt.load(device="cpu"), Phantoms("test", seed=3, count=12), 4)
    latents = report["latents"]
    assert latents[OWN]["unchanged"] == 1.0
    assert latents[OTHER_PICTURE]["unchanged"] > 0.9 and latents[MEAN]["unchanged"] > 0.9
    assert latents[ZEROS]["unchanged"] < 0.6
    assert latents[LAST_TOO]["follows"] > 0.7
    assert report["answers_that_differ"] > 30


def test_the_table_has_every_kind_in_its_row(capsys):
    latents = {
        kind: {"accuracy": 0.5, "unchanged": 0.25, "follows": None if kind == OWN else number / 10, "by_type": {}}
        for number, kind in enumerate(LATENTS)
    }
    print_patched({"k": 4, "closed_questions": 3249, "answers_that_differ": 2140, "latents": latents})
    out = " ".join(capsys.readouterr().out.split())
    assert "3,249 closed questions, k=4" in out and "the first 3; a point is 32.5 questions. 2,140 have" in out
    assert "│ zeros │ 50.0% │ 25.0% │ 50.0% │" in out and "│ its own │ 50.0% │ 25.0% │ │" in out


def test_eval_prints_it(capsys):
    arguments = ["eval", "--count", "3", "-k", "2", "--patch"]
    assert main(arguments) == 0
    assert "│ zeros " in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["patched"]["k"] == 2 and set(report["patched"]["latents"]) == set(LATENTS)
    assert main(["eval", "--count", "3", "-k", "2", "-k", "1", "--patch"]) == 1
    assert "k: expected at least 2" in capsys.readouterr().err
