"""Losses against values computed by hand. N samples, K steps."""

from __future__ import annotations

import math

import pytest
import torch

from vitalrt.errors import VitalError
from vitalrt_training.losses import IGNORED, LossConfig, task_loss, text_loss, visual_loss, visual_targets


def test_task_loss_counts_answer_tokens_only():
    logits = torch.zeros(1, 3, 4)
    logits[0, 0, 1] = math.log(3.0)  # p = 3/6
    loss = task_loss(logits, torch.tensor([[1, 2, IGNORED]])).value()
    assert loss.item() == pytest.approx((-math.log(3 / 6) - math.log(1 / 4)) / 2)


def test_text_loss_averages_tokens_then_steps_then_samples():
    """Sample 0: step 0 with tokens at ln 4 and ln 2, step 1 at ln 2. Sample 1: one step at ln 4. Sample 2: no chain."""
    logits = torch.zeros(3, 2, 2, 4)
    chain_ids = torch.full((3, 2, 2), IGNORED)
    chain_ids[0, 0] = torch.tensor([0, 1])
    chain_ids[0, 1, 0] = 2
    chain_ids[1, 0, 0] = 3
    for n, k, position, token in ((0, 0, 1, 1), (0, 1, 0, 2)):
        logits[n, k, position, token] = math.log(3.0)  # p = 3/6 = 1/2
    steps = [(math.log(4) + math.log(2)) / 2, math.log(2)]
    expected = (sum(steps) / 2 + math.log(4)) / 2
    assert text_loss(logits, chain_ids).value().item() == pytest.approx(expected)


def test_text_loss_without_any_chain_is_zero_and_still_differentiable():
    logits = torch.randn(1, 1, 2, 4, requires_grad=True)
    loss = text_loss(logits, torch.full((1, 1, 2), IGNORED)).value()
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize(("reduction", "scale"), [("mean", 1.0), ("sum", 2.0)])
def test_visual_loss_averages_over_the_steps_a_sample_has(reduction, scale):
    projected = torch.tensor([[[1.0, 0.0], [9.0, 9.0]], [[0.0, 0.0], [0.0, 2.0]], [[5.0, 5.0], [5.0, 5.0]]])
    targets = torch.zeros(3, 2, 2)
    has_step = torch.tensor([[True, False], [True, True], [False, False]])
    expected = scale * (0.5 + (0.0 + 1.0) / 2) / 2
    assert visual_loss(projected, targets, has_step, reduction).value().item() == pytest.approx(expected)


def test_a_missing_roi_gets_no_gradient():
    projected = torch.randn(2, 1, 3, requires_grad=True)
    loss = visual_loss(projected, torch.zeros(2, 1, 3), torch.tensor([[True], [False]]), "mean").value()
    loss.backward()
    assert projected.grad[0].abs().min() > 0
    assert torch.equal(projected.grad[1], torch.zeros(1, 3))


def test_shared_target_is_the_roi_at_every_step():
    roi = torch.nn.functional.normalize(torch.randn(2, 5), dim=-1)
    targets = visual_targets(roi, None, torch.tensor([1, 3]), 3, "shared")
    assert torch.equal(targets, roi[:, None].expand(2, 3, 5))


def test_per_step_targets_end_at_the_roi():
    roi = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    overall = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    targets = visual_targets(roi, overall, torch.tensor([4, 2]), 4, "per_step")
    middle = torch.tensor([0.67, 0.33]) / math.hypot(0.67, 0.33)
    torch.testing.assert_close(targets[0, 0], overall[0])
    torch.testing.assert_close(targets[0, 2], middle)
    torch.testing.assert_close(targets[0, 3], roi[0])
    torch.testing.assert_close(targets[1, 0], middle)
    torch.testing.assert_close(targets[1, 1], roi[1])


def test_bad_switches_are_errors():
    for arguments in ({"visual_reduction": "median"}, {"visual_target": "last"}, {"text_weight": -1.0}):
        with pytest.raises(VitalError, match=next(iter(arguments))):
            LossConfig(**arguments)
    with pytest.raises(VitalError, match="global_feature"):
        visual_targets(torch.ones(1, 2), None, torch.tensor([1]), 1, "per_step")


def test_two_halves_divided_by_their_common_count_are_the_whole():
    torch.manual_seed(0)
    projected, targets = torch.randn(4, 2, 3), torch.randn(4, 2, 3)
    has_step = torch.tensor([[True, True], [True, False], [False, False], [True, True]])
    whole = visual_loss(projected, targets, has_step, "mean")
    halves = [visual_loss(projected[rows], targets[rows], has_step[rows], "mean") for rows in ([0, 2], [1, 3])]
    together = sum(half.total for half in halves) / sum(half.counted for half in halves)
    torch.testing.assert_close(together, whole.value())
