"""The paper's parameter counts, from shapes alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vitalrt.errors import VitalError
from vitalrt_training.plan import plan
from vitalrt_training.recipes import vital_2b, vital_8b, with_settings


@pytest.fixture(scope="module")
def paper_plan():
    return plan(vital_8b())


def test_parameter_counts_of_the_paper(paper_plan):
    """VITAL section 4.1 and table 12, to the digit given."""
    millions = {name: round(count / 1e6, 1) for name, count in paper_plan.parameters.items()}
    assert millions["LoRA"] == 174.6
    assert millions["visual projector"] == 21.5
    assert millions["pj_in"] == 8.4
    assert millions["text decoder"] == 1720.6
    assert round(paper_plan.trainable / 1e6, 1) == 1925.1


def test_samples_and_steps_of_the_phases(paper_plan):
    assert [round(n / 1000, 1) for n in paper_plan.samples] == [19.6, 39.4, 52.2]
    assert paper_plan.steps == [19_556 // 48 * 5, 39_428 // 48 * 5, 52_199 // 48 * 10]


def test_other_recipes_and_schedules_are_planned():
    assert plan(replace(vital_2b(), schedule="reverse")).samples == [10_975, 32_643, 52_199]
    smaller = plan(with_settings(vital_8b(), {"adapter.rank": "32"}))
    assert smaller.parameters["LoRA"] * 2 == plan(vital_8b()).parameters["LoRA"]


def test_tokens_and_memory(paper_plan):
    steps = 2_035 + 4_105 + 10_870
    assert paper_plan.tokens == steps * 48 * 300
    assert paper_plan.weight_bytes == 2 * 8_767_123_696 + 16 * paper_plan.trainable
    assert paper_plan.activation_bytes == 48 * 300 * 4096 * 36 * 34


def test_an_unknown_backbone_is_an_error():
    with pytest.raises(VitalError, match="backbone"):
        plan(replace(vital_8b(), backbone="someone/else"))
