"""The report of a finished run, from logs and figures made up here."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
from PIL import Image

from vitalrt.engine.request import RESEARCH_NOTICE
from vitalrt_training import report
from vitalrt_training.losses import LossConfig
from vitalrt_training.recipes import vital_8b
from vitalrt_training.report import markdown_table, settings_of, write_report

TASK_ONLY = LossConfig(text_weight=0.0, visual_weight=0.0)


def groups(**accuracies):
    return {name: {"accuracy": accuracy, "questions": 1000} for name, accuracy in accuracies.items()}


def evaluation(*ks):
    """In memory, as evaluate gives it: the keys of by_k are numbers."""
    by_type = groups(yesno=0.9, location=0.75)
    return {
        "split": "validation",
        "pictures": 400,
        "k": ks[-1],
        "closed_questions": 2000,
        "accuracy": 0.825,
        "majority_accuracy": 0.3625,
        "by_k": dict.fromkeys(ks, 0.825),
        "tokens_by_k": dict.fromkeys(ks, 3.25),
        "by_k_and_type": dict.fromkeys(ks, by_type),
        "by_type": by_type,
        "majority_of_type": {
            "yesno": {"answer": "yes", "share": 0.51},
            "location": {"answer": "left", "share": 0.215},
        },
        "by_modality": groups(ct=0.8, mri=0.85),
        "by_chain_length": groups(**{"1": 0.9, "2": 0.7}),
    }


def write_run(run_dir, losses, stages):
    """recipe.json, and log.jsonl with the given number of steps of each stage; a loss sinks to 1 / steps done."""
    (run_dir / "recipe.json").write_text(json.dumps(asdict(replace(vital_8b(), losses=losses, seed=7))))
    names = ["task", *(n for n in ("text", "visual") if getattr(losses, f"{n}_weight"))]
    with (run_dir / "log.jsonl").open("w") as log:
        for stage, num_steps in stages.items():
            for step in range(num_steps):
                # A batch without latent steps has no loss but the task's.
                parts = {f"loss_{name}": 1 / (step + 1) for name in (names if step % 5 else names[:1])}
                record = {"stage": stage, "step": step, "loss": 1.5 / (step + 1), **parts, "grad_norm": 0.5}
                log.write(json.dumps({**record, "learning_rate": 1e-4, "samples": 4, "seconds": 0.25}) + "\n")


def test_a_full_report(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/vitalrt", "train", "vital_8b", "--set", "seed=7"])
    write_run(tmp_path, LossConfig(), {"phase 1": 40, "phase 2": 60})
    probes = {
        "samples": 64,
        "batches": 2,
        "cosine": [[1.0, 0.5], [0.5, 1.0]],
        "gradient_norms": {"task": 0.25, "text": 0.5, "visual": 0.0125},
    }
    directory = write_report(tmp_path, evaluation(0, 2), probes)
    assert directory == tmp_path / "report"
    names = {path.name for path in directory.iterdir()}
    assert names == {"report.md", "report.json", "curves.png", "accuracy.png", "cosine.png", "gradients.png"}
    found = json.loads((directory / "report.json").read_text())
    assert (found["variant"], found["settings"]["seed"]) == ("VITAL", 7)
    assert found["command"] == "vitalrt train vital_8b --set seed=7"
    assert found["evaluation"]["by_k"] == {"0": 0.825, "2": 0.825}
    assert found["probes"] == probes
    first, second = found["stages"]
    assert (first["stage"], first["steps"], first["seconds"]) == ("phase 1", 40, 10.0)
    assert second["loss_task"] == pytest.approx((1 / 58 + 1 / 59 + 1 / 60) / 3)
    text = (directory / "report.md").read_text()
    assert text.startswith("# VITAL, three_phase, seed 7\n")
    for expected in (
        RESEARCH_NOTICE,
        "2,000 closed questions about 400 validation pictures",
        "| yesno (1,000) | 90.0% | 90.0% | 51.0% |",
        "| losses.visual_weight | 0.1 |",
        "| peft |",
        "`vitalrt train vital_8b --set seed=7`",
    ):
        assert expected in text
    for name in names:
        if name.endswith(".png"):
            assert f"]({name})" in text
            with Image.open(directory / name) as picture:
                assert min(picture.size) > 200


def test_a_run_of_one_loss_and_one_step(tmp_path):
    """And of two steps of training, in a loss that may be 0."""
    write_run(tmp_path, TASK_ONLY, {"phase 1": 2})
    probes = {"samples": 4, "batches": 1, "cosine": [[1.0]], "gradient_norms": {"task": 0.0}}
    directory = write_report(tmp_path, evaluation(1), probes)
    assert not (directory / "cosine.png").exists()
    text = (directory / "report.md").read_text()
    assert text.startswith("# task-only, three_phase")
    assert "cosine.png" not in text
    assert "nothing to compare" in text
    assert "| phase | steps | seconds | loss | loss task |\n" in text


def test_an_interrupted_report_leaves_the_old_one(tmp_path, monkeypatch):
    write_run(tmp_path, TASK_ONLY, {"phase 1": 2})
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.md").write_text("old")

    def fail(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "_markdown", fail)
    probes = {"samples": 4, "batches": 1, "cosine": [], "gradient_norms": {"task": 0.1}}
    with pytest.raises(KeyboardInterrupt):
        write_report(tmp_path, evaluation(0), probes)
    assert [path.name for path in tmp_path.rglob("report*")] == ["report", "report.md"]
    assert (tmp_path / "report" / "report.md").read_text() == "old"


def test_settings_have_the_names_of_the_command_line():
    recipe = {"seed": 1, "losses": {"text_weight": 0.5}}
    assert settings_of(recipe) == {"seed": 1, "losses.text_weight": 0.5}


def test_a_bar_in_a_cell_does_not_end_it():
    assert markdown_table(["a", "b"], [["x|y", 1]]) == "| a | b |\n| --- | ---: |\n| x\\|y | 1 |\n"
