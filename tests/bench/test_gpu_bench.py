"""python -m bench.gpu on whatever machine this is; without a GPU it has to run through, and say what it leaves out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import vitalrt
from bench.gpu.record import Record, Section

ROOT = Path(__file__).parents[2]
# Whoever runs it has a checkout and nothing built from it: importing what is installed would hide what is missing.
WITHOUT_EXTENSION = """
import runpy, sys
sys.modules |= dict.fromkeys(["vitalrt._core", "pydicom", "nibabel", "pybind11", "pyarrow"])
sys.argv = ["bench.gpu", *sys.argv[1:]]
runpy.run_module("bench.gpu", run_name="__main__")
"""


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    """Results, what was printed, and the folder. The kernels' own tests run beside this one and need not run twice."""
    folder = tmp_path_factory.mktemp("gpu")
    names = ["kernels", "requests", "numerics", "batches", "profile", "int8", "projector", "product", "sanitizer"]
    command = [sys.executable, "-c", WITHOUT_EXTENSION, "--quick", "--out", str(folder)]
    command += [word for name in names for word in ("--only", name)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"COLUMNS": "140"}
    finished = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=480, check=False
    )
    assert finished.returncode == 0, finished.stderr
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text()), finished.stdout, folder


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU says")
def test_what_cannot_run_is_said_and_the_rest_runs(quick) -> None:
    results, printed, folder = quick
    sections = results["sections"]
    assert {name: section["status"] for name, section in sections.items()} == {
        "model": "done",
        "card": "done",
        "kernels": "done",
        "requests": "done",
        "numerics": "done",
        "batches": "done",
        "profile": "skipped",
        "int8": "done",
        "projector": "done",
        "product": "skipped",
        "sanitizer": "skipped",
    }
    assert "miniature" in printed and "CUDA device" in sections["profile"]["reason"]
    assert "reduce-overhead" in json.dumps(sections["requests"]["skipped"]) or "--quick" in json.dumps(sections)
    assert sections["requests"]["claims"] == [], "what is promised of a GPU is not judged on a CPU"
    (picture,) = folder.glob("*.png")
    assert picture.stat().st_size > 10_000


def test_everybody_does_every_kind_of_work(quick) -> None:
    ms = quick[0]["sections"]["requests"]["ms"]
    for what in ("latent step", "answer token", "request K=0", "request K=4"):
        assert {"vitalrt", "plain torch, graphed", "transformers"} <= ms[what].keys(), what
    assert {"request K=1", "request K=2", "prefill 300", "prefill 1500"} <= ms.keys()
    assert any(what.startswith("request CoT") for what in ms)
    assert any(what.startswith("patches") and len(by_name) == 2 for what, by_name in ms.items())
    assert quick[0]["sections"]["requests"]["patches_agree"]


def test_the_projector_is_measured_beside_torchs(quick) -> None:
    section = quick[0]["sections"]["projector"]
    assert [name.split(",")[0] for name in section["ms"]] == ["projector forward", "projector forward and backward"] * 2
    assert all(set(by_name) == {"vitalrt", "torch"} for by_name in section["ms"].values())
    assert section["difference"] < 1e-5
    assert "nothing is compiled" in section["skipped"]["torch, compiled"]


def test_errors_are_of_this_model(quick) -> None:
    """In float32 both are exact to rounding; int8 is not, and is not far off."""
    errors = quick[0]["sections"]["numerics"]["errors"]
    if not torch.cuda.is_available():
        assert max(*errors["vitalrt"]["z"], errors["vitalrt"]["logits"], errors["transformers"]["logits"]) < 1e-4
    assert 1e-5 < errors["vitalrt, int8"]["logits"] < 0.1


def test_the_bundled_model_answers_as_on_the_cpu(tmp_path: Path, monkeypatch) -> None:
    """Its answers being others', the section fails and says how many are the same."""
    from bench.gpu import product

    record = Record(tmp_path / "x.json", {}, Console(quiet=True), 120)
    section = Section("product", lambda r: product.measure(r, torch.device("cpu")), 100)
    record.run([section])
    outcome = record.results["product"]
    assert outcome["status"] == "done" and outcome["same_alone"] == outcome["questions"] == 24
    assert outcome["same_words"] == outcome["steps"] == 16 and outcome["largest_heatmap_error"] < 1e-4
    explained = product._explained
    for changed in ({"same_words": 15}, {"largest_heatmap_error": 0.1}):
        monkeypatch.setattr(product, "_explained", lambda *of, changed=changed: explained(*of) | changed)
        record.results.clear()
        record.run([section])
        assert record.results["product"]["status"] == "failed"
    monkeypatch.setattr(product, "_explained", explained)
    load = vitalrt.load

    def load_another(device: object, dtype: str = "auto") -> vitalrt.Model:
        model = load(device=device, dtype=dtype)
        if dtype == "float32":
            with torch.no_grad():
                model.weights.decoder.head.weight.neg_()
        return model

    monkeypatch.setattr(product.vitalrt, "load", load_another)
    record.results.clear()
    record.run([section])
    outcome = record.results["product"]
    assert outcome["status"] == "failed" and outcome["same_alone"] < 24 == outcome["questions"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="waits of the host are seen on a CUDA device only")
def test_the_host_never_waits_for_all_of_the_device_inside_a_request() -> None:
    from bench.gpu.ours import Ours
    from bench.gpu.profile import host_waits
    from bench.gpu.shapes import prompt_of, random_model, small_config

    with torch.no_grad():
        ours = Ours(random_model(small_config(), torch.device("cuda"), torch.bfloat16), 1, 256)
        prompt = prompt_of(small_config(), 60)
        ours.request(prompt, 4, 4)
        assert host_waits(ours, prompt)["host_waits"] == {}


def test_a_kernel_that_fails_leaves_the_others_measured(tmp_path: Path, monkeypatch) -> None:
    """Whatever its error is."""
    from bench.gpu import kernels
    from bench.gpu.shapes import random_model, small_config
    from vitalrt.model_cost import Card

    class CompilationError(Exception):
        pass

    def breaks(index: int) -> None:
        raise CompilationError("at 27:4")

    def cases(model: Any, num_rows: int) -> list[kernels.Case]:
        good = kernels.Case("good", lambda i: None, None, None, 8, 8, 2)
        return [kernels.Case("broken", breaks, None, None, 8, 8, 2), good]

    monkeypatch.setattr(kernels, "cases", cases)
    model = random_model(small_config(), torch.device("cpu"), torch.float32)
    record = Record(tmp_path / "x.json", {}, Console(quiet=True), 60)
    card = Card("none", 1e9, 1e9, "a test")
    record.run([Section("kernels", lambda r: kernels.measure(r, model, card), 30)])
    outcome = record.results["kernels"]
    assert outcome["status"] == "failed" and [row["kernel"] for row in outcome["rows"]] == ["good", "good"]
    assert outcome["failed"] == [f"broken, {rows} rows: CompilationError: at 27:4" for rows in (1, 16)]


def test_sources_tell_every_file_that_decides_what_runs(tmp_path: Path, monkeypatch) -> None:
    from bench import files

    monkeypatch.setattr(files, "ROOT", tmp_path)
    seen = {files.sources()}
    for name in ("kernels/a.py", "kernels/deep/tuned.json", "vitalrt/b.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        for text in ("1", "2"):
            path.write_text(text)
            seen.add(files.sources())
    (tmp_path / "kernels" / "notes.md").write_text("of no consequence")
    assert len(seen) == 7 and files.sources() in seen
