"""The bundled checkpoint: what it may weigh, and that it answers by looking."""

from __future__ import annotations

from pathlib import Path

import pytest

import vitalrt
from vitalrt.api import BUNDLED
from vitalrt_training.evaluate import evaluate_phantoms

DEMO = Path(__file__).parents[1] / "examples" / "demo.png"


@pytest.fixture(scope="module")
def model():
    return vitalrt.load(device="cpu")


def test_it_is_small_and_holds_no_pickle(model):
    assert sum(parameter.numel() for parameter in model.weights.parameters()) <= 6_000_000
    assert sum(file.stat().st_size for file in BUNDLED.iterdir()) <= 14_000_000
    assert {file.suffix for file in BUNDLED.iterdir()} <= {".json", ".jinja", ".safetensors"}


@pytest.mark.parametrize(
    ("question", "answer"),
    [("Where is the cyst?", "lower left"), ("Can the kidney be seen here?", "no")],
)
def test_the_demo_is_answered_right(model, question, answer):
    assert str(model.generate(DEMO, question)) == answer


def test_it_answers_fresh_phantoms_and_fails_when_it_is_shown_other_images(model):
    """A sample of what `vitalrt eval` measures on 2,000; the thresholds leave room for its smaller number."""
    report = evaluate_phantoms(model, "test", seed=11, count=60, steps=None)
    assert report["closed_questions"] > 300
    assert report["accuracy"] >= 0.80
    assert report["shuffled_accuracy"] <= report["majority_accuracy"] + 0.15
