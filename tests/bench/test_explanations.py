"""The measurement of explanations: it counts what it says, and tells windows that show nothing."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from bench.explanations import Hits, K, main, peaks_within, summary
from vitalrt.api import BUNDLED
from vitalrt.model.scaffold import Scaffold


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
