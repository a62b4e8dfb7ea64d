"""Comparing finished runs, from reports made up here."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from vitalrt.engine.request import RESEARCH_NOTICE
from vitalrt.errors import VitalError
from vitalrt_training.compare import group_runs, write_comparison

WEIGHTS = {"task-only": (0.0, 0.0), "+text": (1.0, 0.0), "+visual": (0.0, 0.1), "VITAL": (1.0, 0.1)}


def make_report(variant="VITAL", seed=0, accuracy=0.8, similarity=0.5, **settings):
    text_weight, visual_weight = WEIGHTS[variant]
    groups = {"yesno": {"accuracy": accuracy + 0.1, "questions": 100}}
    return {
        "command": f"vitalrt train --set seed={seed}",
        "variant": variant,
        "settings": {
            "seed": seed,
            "schedule": "three_phase",
            "losses.text_weight": text_weight,
            "losses.visual_weight": visual_weight,
            "projector": "res_mlp_ln",
            **settings,
        },
        "evaluation": {
            "pictures": 10,
            "closed_questions": 100,
            "k": 2,
            "accuracy": accuracy,
            "majority_accuracy": 0.4,
            "by_k": {"0": accuracy - 0.1, "2": accuracy},
            "by_type": groups,
            "by_chain_length": {"1": {"accuracy": accuracy, "questions": 100}},
        },
        "probes": {"samples": 4, "cosine": [[1.0, similarity], [similarity, 1.0]]},
    }


def write_runs(folder, reports):
    for name, report in reports.items():
        (folder / name / "report").mkdir(parents=True)
        (folder / name / "report" / "report.json").write_text(json.dumps(report))
    return {name: folder / name for name in reports}


def labels(*reports):
    conditions = group_runs({str(index): report for index, report in enumerate(reports)})
    return {condition.label: condition.seeds for condition in conditions}


def test_written_steps_are_told_by_the_variant_alone():
    assert list(labels(make_report(written=False), make_report(written=True))) == ["VITAL, three_phase"]


def test_seeds_are_one_condition_and_whatever_else_varies_another():
    assert labels(make_report(seed=0), make_report(seed=3)) == {"VITAL, three_phase": [0, 3]}
    variants = labels(*(make_report(variant) for variant in WEIGHTS), make_report(schedule="full_mix"))
    assert list(variants) == [f"{name}, three_phase" for name in WEIGHTS] + ["VITAL, full_mix"]
    weighted = labels(make_report(), make_report("task-only"), make_report(**{"losses.text_weight": 0.5}))
    assert list(weighted) == [
        "VITAL, three_phase, text_weight 1.0",
        "task-only, three_phase, text_weight 0.0",
        "VITAL, three_phase, text_weight 0.5",
    ]
    assert labels(make_report(), make_report(projector="mlp")) == {
        "VITAL, three_phase, projector res_mlp_ln": [0],
        "VITAL, three_phase, projector mlp": [0],
    }


def test_a_comparison(tmp_path):
    runs = write_runs(
        tmp_path,
        {
            "a": make_report(seed=0, accuracy=0.8, similarity=0.5),
            "b": make_report(seed=1, accuracy=0.9, similarity=0.7),
            "c": make_report("task-only", accuracy=0.7, similarity=0.98),
        },
    )
    backbone = {**make_report()["evaluation"], "accuracy": 0.65}
    out = write_comparison(runs, tmp_path / "out", backbone)
    assert {path.name for path in out.iterdir()} == {
        "comparison.md",
        "comparison.json",
        "accuracy.png",
        "cosine.png",
    }
    vital, task_only = json.loads((out / "comparison.json").read_text())["conditions"]
    assert (vital["label"], vital["seeds"], list(vital["runs"])) == ("VITAL, three_phase", [0, 1], ["a", "b"])
    assert vital["by_k"] == {"0": pytest.approx([0.7, 0.8]), "2": [0.8, 0.9]}
    assert vital["cosine"] == [pytest.approx([1.0, 0.6]), pytest.approx([0.6, 1.0])]
    assert task_only["by_k"]["2"] == [0.7]
    text = (out / "comparison.md").read_text()
    for expected in (
        RESEARCH_NOTICE,
        "| VITAL, three_phase | 2 | 75.0% (70.0% to 80.0%) | 85.0% (80.0% to 90.0%) |",
        "| task-only, three_phase | 1 | 60.0% | 70.0% |",
        "| backbone | – | 65.0% | – |",
        "| yesno | 95.0% | 80.0% |",
        "| b | VITAL, three_phase | 1 | `vitalrt train --set seed=1` |",
    ):
        assert expected in text
    for name in ("accuracy.png", "cosine.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 300


def test_runs_that_think_once_have_no_picture_of_latents(tmp_path):
    report = make_report()
    report["probes"]["cosine"] = [[1.0]]
    out = write_comparison(write_runs(tmp_path, {"only": report}), tmp_path / "out")
    assert not (out / "cosine.png").exists()
    assert "cosine.png" not in (out / "comparison.md").read_text()


def test_accuracies_on_different_questions_are_not_compared(tmp_path):
    other = make_report("task-only")
    other["evaluation"]["pictures"] = 11
    with pytest.raises(VitalError, match=r"one set of questions.*for a .*11.* for b"):
        write_comparison(write_runs(tmp_path, {"a": make_report(), "b": other}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_report_is_named(tmp_path):
    runs = write_runs(tmp_path, {"a": make_report()}) | {"b": tmp_path / "b"}
    with pytest.raises(VitalError, match=r"runs: b: expected a finished run with report/report.json"):
        write_comparison(runs, tmp_path / "out")
    with pytest.raises(VitalError, match="at least one"):
        write_comparison({}, tmp_path / "out")
