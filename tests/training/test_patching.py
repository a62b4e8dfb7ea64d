"""Whether latents matter, measured on models of which that is known."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import vitalrt
from vitalrt.cli import main
from vitalrt.engine.request import Answer, Timings, Usage
from vitalrt_training import patching
from vitalrt_training.data.phantom import Sample
from vitalrt_training.evaluate import Phantoms, Shown
from vitalrt_training.patching import MEAN, NOISE, OTHER_PICTURE, OTHER_QUESTION, OTHER_WHOLE, OWN, patch_latents

K, WIDTH = 3, 4


class Known:
    """Thinks of a picture's number and a question's number, and answers with the number of the picture.

    It looks at the picture where follows_latents is False, else at its first latent.
    """

    def __init__(self, follows_latents):
        self.follows_latents = follows_latents

    def prepare(self, picture, question):
        return int(picture[0, 0, 0]), int(question)

    def run(self, prompts, k, max_new_tokens, latents=None):
        answers = []
        for index, (picture, question) in enumerate(prompts):
            own = torch.tensor([[picture, question, 1, step] for step in range(k)], dtype=torch.float32)
            given = own if latents is None or latents[index] is None else latents[index]
            own[: len(given)] = given
            read = own[0, 0] if self.follows_latents or len(given) == k else picture
            usage, timings = Usage(1, 0, k, 1), Timings(0.0, 0.0, 0.0, 0.0, 0.0)
            answers.append(Answer(f"{float(read):g}", [1], "stop", own, usage, timings))
        return answers


def shown(count):
    """Pictures of which every first question is open, and two are right with the picture's number."""
    pictures = []
    for number in range(count):
        answers = [("x", False), (str(number), True), (str(number), True)]
        samples = [
            Sample(str(place), answer, "yesno" if place < 2 else "location", "t", "organ", ("a",), closed)
            for place, (answer, closed) in enumerate(answers)
        ]
        pictures.append(Shown(np.full((2, 2, 3), number, np.uint8), "ct", samples))
    return pictures


@pytest.mark.parametrize("count", [2, 19])  # 19: of more than one part
def test_answers_from_the_picture_stay(count):
    report = patch_latents(Known(follows_latents=False), shown(count), K)
    assert report["closed_questions"] == report["answers_that_differ"] == 2 * count
    for kind in (OWN, OTHER_PICTURE, OTHER_QUESTION, MEAN, NOISE):
        one = report["latents"][kind]
        assert (one["accuracy"], one["unchanged"], one["follows"]) == (1.0, 1.0, 0.0)
    assert report["latents"][OTHER_WHOLE]["follows"] == 1.0


@pytest.mark.parametrize("count", [2, 19])
def test_answers_from_latents_follow(count):
    report = patch_latents(Known(follows_latents=True), shown(count), K)
    own, other = report["latents"][OWN], report["latents"][OTHER_PICTURE]
    assert (own["accuracy"], own["follows"]) == (1.0, 0.0)
    assert (other["accuracy"], other["unchanged"], other["follows"]) == (0.0, 0.0, 1.0)
    assert other["by_type"] == {"location": 0.0, "yesno": 0.0}
    assert report["latents"][OTHER_QUESTION]["follows"] == 1.0  # the next of the type is about the next picture
    assert report["latents"][NOISE]["accuracy"] == 0.0
    mean = (count - 1) / 2  # the middle picture's number, where there is one
    assert report["latents"][MEAN]["accuracy"] == (1 / count if mean.is_integer() else 0.0)


def test_the_last_latent_is_thought_unless_it_is_given(monkeypatch):
    lengths = set()
    original = Known.run

    def run(self, prompts, k, max_new_tokens, latents=None):
        lengths.add(tuple(sorted({len(one) for one in latents or ()})))
        return original(self, prompts, k, max_new_tokens, latents)

    monkeypatch.setattr(Known, "run", run)
    patch_latents(Known(follows_latents=True), shown(2), K)
    assert lengths == {(), (K - 1,), (K,)}


def test_what_cannot_be_patched_is_refused():
    for count, k, message in ((2, 1, "k: expected at least 2"), (1, K, "count: expected at least 2")):
        with pytest.raises(vitalrt.VitalError, match=message):
            patch_latents(Known(follows_latents=True), shown(count), k)
    with pytest.raises(vitalrt.VitalError, match="word for word"):
        patch_latents(Known(True), [one._replace(samples=one.samples[:1]) for one in shown(2)], K)


def test_the_bundled_model_as_it_is():
    """Replayed latents change nothing; the last latent carries the answer, those before it next to nothing."""
    report = patch_latents(vitalrt.load(device="cpu"), Phantoms("test", seed=3, count=12), 4)
    latents = report["latents"]
    assert latents[OWN]["unchanged"] == 1.0
    assert latents[OTHER_PICTURE]["unchanged"] > 0.9
    assert latents[OTHER_WHOLE]["follows"] > 0.7
    assert report["answers_that_differ"] > 30


def test_eval_prints_it(capsys):
    arguments = ["eval", "--count", "3", "-k", "2", "--patch"]
    assert main(arguments) == 0
    assert patching.OTHER_WHOLE in " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["patched"]["k"] == 2 and set(report["patched"]["latents"]) >= {OWN, MEAN}
    assert main(["eval", "--count", "3", "-k", "2", "-k", "1", "--patch"]) == 1
    assert "k: expected at least 2" in capsys.readouterr().err
