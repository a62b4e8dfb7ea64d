"""The measurement of explanations: it counts what it says, and tells windows that show nothing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import vitalrt
from bench.explanations import Hits, K, Windows, aim_all, ask_all, main, summary
from vitalrt.api import BUNDLED
from vitalrt.engine.request import Request
from vitalrt.explain.visual_window import aim, heatmaps
from vitalrt.model.scaffold import Scaffold
from vitalrt_training.data.phantom import draw_phantom
from vitalrt_training.data.roi import peaks_within, phantom_mask, roi_features
from vitalrt_training.evaluate import is_right


def measure(tmp_path, *arguments):
    code = main([*arguments, "--count", "16", "--out", str(tmp_path)])
    return code, json.loads((tmp_path / "explanations.json").read_text())


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    return measure(tmp_path_factory.mktemp("results"))


def test_the_bundled_models_windows_keep_their_promises(measured):
    code, result = measured
    assert code == 0 and len(result["claims"]) == 3
    assert result["words"]["share"] > 0.6 and result["neighbours"]["share"] > 0.6
    assert result["pictures"]["steps"] == K * result["pictures"]["questions"]
    assert result["words"]["by_step"][0] > result["words"]["by_step"][2]


def test_random_scaffolding_fails(measured, tmp_path):
    model = shutil.copytree(BUNDLED, tmp_path / "model")
    scaffold = Scaffold.load(model)
    torch.manual_seed(0)
    for parameter in (*scaffold.pj_in.parameters(), *scaffold.projector.parameters()):
        parameter.copy_(torch.randn_like(parameter) * parameter.std().nan_to_num(1.0))
    scaffold.save(model)
    code, result = measure(tmp_path / "results", "--model", str(model))
    assert code == 1
    assert result["words"]["share"] < 0.2 and result["neighbours"]["share"] < 0.3
    assert result["pictures"]["regions_own_feature"] == measured[1]["pictures"]["regions_own_feature"]


def test_hits_are_of_the_question_the_other_picture_and_the_region_itself():
    model = vitalrt.load(device="cpu")
    windows = Windows.of(model)
    asked = [one for found in ask_all(model, "test", 0, 6) for one in found]
    shown = unlike = 0
    for one in asked:
        mask = phantom_mask(one.phantom, one.sample.target_name)
        pictures, neighbours = aim_all(windows, one)
        assert bool(pictures) == bool(neighbours) == (mask is not None)
        if mask is None:
            continue
        [picture], [neighbour] = pictures, neighbours
        label = f"{one.sample.target_name}, {one.phantom.modality}"
        for latents, within, alike in (
            (one.answer.latents, picture.own, neighbour.own),
            (one.other, picture.other, neighbour.other),
        ):
            aims = aim(windows.scaffold, latents)
            [maps] = heatmaps(windows.encoder, [one.phantom.image], aims)
            assert within == [peaks_within(heatmap, mask) for heatmap in maps]
            assert alike == [found.label == label for [found] in windows.index.nearest(aims, 1)]
        [roi] = roi_features(windows.encoder, [(one.phantom.image, mask)])
        [[nearest]] = windows.index.nearest(torch.from_numpy(roi.feature)[None], 1)
        assert neighbour.best == (nearest.label == label)
        assert picture.chance == pytest.approx(mask.mean())
        assert neighbour.chance == np.mean([known == label for known in windows.index.labels])
        unlike += (picture.own, neighbour.own) != (picture.other, neighbour.other)
        shown += 1
    assert shown > 20 and unlike > 5
    right = {is_right(one.answer.text, replace(one.sample, answer="?")) for one in asked}
    assert right == {False} and any(is_right(one.answer.text, one.sample) for one in asked)
    others = [Request(draw_phantom("test", 0, 1).image, one.sample.question, k=K) for one in asked[:3]]
    for one, other in zip(asked, model.generate_batch(others), strict=False):
        assert one.phantom.index == 0
        torch.testing.assert_close(one.other, other.latents, rtol=1e-4, atol=1e-4)


def test_one_phantom_has_no_other(capsys):
    with pytest.raises(SystemExit):
        main(["--count", "1"])
    assert "--count: expected at least 2" in capsys.readouterr().err


def test_a_peak_counts_where_the_middle_of_its_patch_lies():
    heatmap = torch.zeros(2, 4)
    heatmap[1, 2] = 1
    mask = np.zeros((20, 40), bool)
    mask[15, 25] = True
    assert peaks_within(heatmap, mask)
    assert not peaks_within(heatmap, ~mask)


def test_a_summary_counts_steps_not_questions():
    hits = [
        Hits("location", True, [True, True, False], [False, True, False], chance=0.1, best=True),
        Hits("yesno", False, [False], [False], chance=0.5, best=False),
    ]
    found = summary(hits)
    assert (found["questions"], found["steps"]) == (2, 4)
    assert (found["share"], found["other_picture"]) == (0.5, 0.25)
    assert found["by_step"] == [0.5, 1.0, 0.0, None]
    assert found["by_type"] == {"location": pytest.approx(2 / 3), "yesno": 0.0}
    assert (found["answer_right"], found["answer_wrong"]) == (pytest.approx(2 / 3), 0.0)
    assert (found["chance"], found["regions_own_feature"]) == (pytest.approx(0.2), 0.75)
