"""The command line: what goes to stdout, what goes to stderr, and exit codes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitalrt.api import BUNDLED, Model
from vitalrt.cli import main

DEMO = str(Path(__file__).parents[1] / "examples" / "demo.png")
QUESTION = "Where is the cyst?"


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_ask_prints_question_answer_steps_timings_and_notice(capsys):
    code, out, _ = run(capsys, "ask", DEMO, QUESTION, "-k", 2)
    assert code == 0
    for part in (QUESTION, "lower left", "Latent steps  2", "prefill", "not for clinical decisions"):
        assert part in out


def test_ask_json_is_one_object(capsys):
    code, out, _ = run(capsys, "ask", DEMO, QUESTION, "--json")
    record = json.loads(out)
    assert code == 0
    assert record["text"] == "lower left"
    assert record["usage"]["latent_steps"] == 4
    assert set(record["timings_ms"]) == {"preprocess", "prefill", "latent", "decode", "total"}


def test_several_images_make_one_prompt(capsys):
    counts = []
    for images in ([DEMO], [DEMO, DEMO]):
        _, out, _ = run(capsys, "ask", *images, QUESTION, "--json")
        counts.append(json.loads(out)["usage"]["prompt_tokens"])
    assert counts[1] > counts[0] + 20


def test_batch_answers_line_by_line_each_with_its_own_k(capsys, tmp_path):
    lines = [{"image": DEMO, "question": QUESTION, "k": k} for k in (0, 3)]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    code, out, _ = run(capsys, "ask", "--batch", path)
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [record["usage"]["latent_steps"] for record in records] == [0, 3]


def test_explain_prints_what_each_step_shows_and_writes_a_page(capsys, tmp_path):
    page = tmp_path / "page.html"
    code, out, _ = run(capsys, "explain", DEMO, QUESTION, "-k", 2, "--out", page)
    assert code == 0
    for part in (
        "lower left",
        "Step 1\n  words       The cyst is in the lower half. (",
        "Step 2\n  words       It is in",
    ):
        assert part in out
    for part in ("  picture     most alike at ", "  neighbours  ", "not a faithful trace"):
        assert part in out
    assert out.count("not for clinical decisions") == 1
    assert "The cyst is in the lower half." in page.read_text()


def test_explain_json_is_one_object(capsys):
    code, out, err = run(capsys, "explain", DEMO, QUESTION, "-k", 1, "--json")
    record = json.loads(out)
    [step] = record["steps"]
    assert (code, err) == (0, "")
    assert (record["text"], record["images"], record["missing"]) == ("lower left", [DEMO], {})
    assert np.array(step["heatmaps"]).shape == (1, 12, 12) and len(step["neighbours"]) == 5
    assert "faithful" in record["notice"]


def test_explain_passes_every_option_on_and_tells_what_is_missing(capsys, tmp_path, monkeypatch):
    asked = {}
    original = Model.explain
    monkeypatch.setattr(Model, "explain", lambda *of, **by: asked.update(by) or original(*of, **by))
    model = shutil.copytree(BUNDLED, tmp_path / "model")
    encoder = (model / "encoder").rename(tmp_path / "encoder")
    options = {"k": 1, "max-new-tokens": 3, "temperature": 0.5, "top-p": 0.9, "top-k": 7, "seed": 2}
    flags = [word for name, value in options.items() for word in ("-k" if name == "k" else f"--{name}", value)]
    code, out, _ = run(capsys, "explain", DEMO, DEMO, QUESTION, *flags, "--model", model)
    assert code == 0 and "No pictures: no siglip-" in out and "most alike" not in out
    assert {name.replace("-", "_"): value for name, value in options.items()}.items() <= asked.items()
    code, out, _ = run(capsys, "explain", DEMO, DEMO, QUESTION, *flags, "--model", model, "--encoder", encoder)
    assert code == 0 and "  picture 1   most alike" in out and "  picture 2   most alike" in out


def test_explain_is_silent_but_for_what_was_asked():
    """In a process of its own, whose libraries have not been told to be quiet."""
    command = [sys.executable, "-m", "vitalrt.cli", "explain", DEMO, QUESTION, "-k", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["text"] == "lower left"
    assert done.stderr == ""


@pytest.mark.parametrize("words", ["--help", "info --json", "bench --model-cost", "bench --model-cost --json"])
def test_who_stops_reading_gets_no_traceback(words):
    """As `vitalrt ... | head` does: found out by print, by rich, or not before what was printed is flushed."""
    command = [sys.executable, "-m", "vitalrt.cli", *words.split()]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=buffered)
    process.stdout.close()
    assert (process.stderr.read(), process.wait(timeout=60)) == ("", 1)


def test_info_names_model_memory_and_why_backends_are_not_used(capsys):
    code, out, _ = run(capsys, "info", "--json", "--cache-tokens", 64)
    report = json.loads(out)
    assert code == 0
    assert report["model"]["cache tokens"] == 64
    assert report["model"]["parameters"] > 1_000_000
    assert report["machine"]["backend: cuda"].startswith(("found", "not used: "))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ask", "missing.png", QUESTION], "missing.png"),
        (["ask", DEMO], "IMAGE"),
        (["ask", DEMO, QUESTION, "-k", "65"], "k: expected"),
        (["ask", DEMO, QUESTION, "--frame", "1"], "frame"),
        (["ask", DEMO, QUESTION, "--window", "a,b"], "--window"),
        (["ask", DEMO, QUESTION, "--model", "no/such/place"], "model"),
        (["ask", DEMO, QUESTION, "--adapter", "/nowhere"], "adapter"),
        (["ask", DEMO, QUESTION, "--cache-tokens", "16"], "cache_tokens"),
        (["ask", "--batch", "/nowhere.jsonl"], "--batch"),
        (["explain", DEMO], "IMAGE"),
        (["explain", DEMO, QUESTION, "--encoder", "/nowhere"], "encoder"),
        (["explain", DEMO, QUESTION, "--out", "/nowhere/page.html"], "--out"),
        (["bench", "--rounds", "0"], "--rounds"),
        (["train", "nonsense", "--out", "x"], "recipe"),
        (["train", "phantom", "--set", "steps", "--out", "x"], "KEY=VALUE"),
        (["train", "vital_8b"], "--out"),
        (["eval", "--count", "1"], "count"),
    ],
)
def test_errors_take_one_line_and_exit_code_1(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert code == 1
    assert out == ""
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match=r"missing\.png"):
        main(["ask", "missing.png", QUESTION, "--debug"])


def test_a_bad_line_of_a_batch_is_named(capsys, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"image": DEMO, "question": QUESTION}) + "\n{broken\n")
    code, _, err = run(capsys, "ask", "--batch", path)
    assert code == 1
    assert "line 2" in err


def test_data_phantom_writes_what_it_says(capsys, tmp_path):
    code, out, _ = run(capsys, "data", "phantom", "--count", 3, "--validation", 2, "--out", tmp_path / "p", "--json")
    assert code == 0
    assert json.loads(out)["phantoms"] == {"train": 3, "validation": 2}
    assert len(list((tmp_path / "p" / "images").glob("train-*.png"))) == 3
    assert len(list((tmp_path / "p" / "images").glob("validation-*.png"))) == 2
    code, out, _ = run(capsys, "eval", "--data", tmp_path / "p", "--split", "validation", "--json")
    report = json.loads(out)
    assert code == 0
    assert (report["split"], report["pictures"]) == ("validation", 2)
    assert 0 <= report["accuracy"] <= 1 and set(report["by_type"])


def test_data_roi_needs_an_encoder(capsys, tmp_path):
    with pytest.raises(SystemExit):
        run(capsys, "data", "roi", tmp_path)
    assert "--encoder" in capsys.readouterr().err
    code, _, err = run(capsys, "data", "roi", tmp_path, "--encoder", tmp_path)
    assert code == 1 and "samples.parquet" in err


def test_bench_reports_rows_as_json(capsys, tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(path)
    code, out, _ = run(capsys, "bench", "--rounds", 1, "--image", path, "--json")
    report = json.loads(out)
    assert code == 0
    assert [row["thought"] for row in report["rows"]][:4] == ["K=0", "K=1", "K=2", "K=4"]
    assert all(row["ms"]["p50"] > 0 for row in report["rows"])


def test_dry_run_prints_the_papers_counts(capsys):
    code, out, _ = run(capsys, "train", "vital_8b", "--dry-run", "--json")
    assert code == 0
    assert json.loads(out)["trainable"] == 1_925_059_840


def test_8_bits_are_one_option_of_whatever_loads_a_model(capsys):
    code, out, _ = run(capsys, "info", "--int8", "--json", "--model", BUNDLED)
    told = json.loads(out)["model"]
    assert code == 0 and told["dtype"] == "float32, decoder int8" and "relative error of latents" in told["int8"]
    code, out, _ = run(capsys, "bench", "--model-cost", "--int8", "--json")
    assert code == 0 and json.loads(out)["dtype"] == "int8"
