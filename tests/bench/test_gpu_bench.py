"""python -m bench.gpu on whatever machine this is; without a GPU it has to run through, and say what it leaves out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import vitalrt
from bench.gpu import record as record_module
from bench.gpu.record import Record, Section, SkippedError

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


def test_a_section_that_fails_or_takes_too_long_takes_no_other_with_it(tmp_path: Path) -> None:
    def fails(record: Record) -> dict[str, Any]:
        record.tell("fails", half=1)
        raise RuntimeError("out of luck")

    def sleeps(record: Record) -> dict[str, Any]:
        for _ in record.rounds(1000):
            time.sleep(0.05)
        time.sleep(30)
        return {}

    def skips(record: Record) -> dict[str, Any]:
        raise SkippedError("no such thing here")

    record = Record(tmp_path / "out" / "x.json", {"device": "none"}, Console(quiet=True), total_s=30)
    sections = [Section("fails", fails, 5), Section("sleeps", sleeps, 2), Section("skips", skips, 5)]
    began = time.monotonic()
    record.run([*sections, Section("works", lambda record: {"value": 3}, 5)])
    assert time.monotonic() - began < 10
    written = json.loads(record.path.read_text())["sections"]
    assert [section["status"] for section in written.values()] == ["failed", "failed", "skipped", "done"]
    assert written["fails"]["half"] == 1 and "out of luck" in written["fails"]["reason"]
    assert "TimeoutError" in written["sleeps"]["reason"] and written["works"]["value"] == 3


def test_a_part_may_be_given_up(tmp_path: Path) -> None:
    def run(record: Record) -> dict[str, Any]:
        with pytest.raises(TimeoutError), record.at_most(0.3):
            time.sleep(20)
        return {"left": record.seconds_left}

    record = Record(tmp_path / "x.json", {}, Console(quiet=True), total_s=30)
    record.run([Section("part", run, 10)])
    assert record.results["part"]["status"] == "done" and record.results["part"]["left"] > 5


def test_a_run_ends_when_its_time_is_over(tmp_path: Path) -> None:
    record = Record(tmp_path / "x.json", {}, Console(quiet=True), total_s=0.5)
    record.run([Section("late", lambda record: {}, 5)])
    assert record.results["late"]["status"] == "skipped" and "used up" in record.results["late"]["reason"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it would be tuned")
def test_only_a_card_is_tuned(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from bench.gpu.__main__ import main

    with pytest.raises(SystemExit):
        main(["--tune", "--out", str(tmp_path)])
    assert "expected a CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_fastest_tile_of_each_matrix_is_what_kernels_then_take(tmp_path: Path, monkeypatch) -> None:
    """The clock is the test's: it looks into the table. One matrix is fastest by cuBLAS, one tile is broken, and what
    there is no time for keeps its entry."""
    pytest.importorskip("triton")
    from bench.gpu import tune
    from bench.gpu.shapes import random_model, small_config
    from vitalrt_kernels import tuned

    good, fair, broken = tuned.Tile(16, 256, 1, 1), tuned.Tile(8, 512, 1, 2), tuned.Tile(16, 512, 1, 2)
    monkeypatch.setattr(tune, "TILES", {1: (fair, broken, good), 16: (tuned.Tile(16, 64, 2, 4),)})
    monkeypatch.setattr(tuned, "TABLE", tmp_path / "tuned.json")
    monkeypatch.setattr(tune, "TABLE", tmp_path / "tuned.json")
    monkeypatch.setattr(tuned, "_card", lambda device: "card")
    config = small_config()
    wide, d = config.decoder.intermediate_size, config.decoder.hidden_size
    down, unknown = tuned.Shape(1, d, wide, "float32"), tuned.Shape(1, 7, 7, "bfloat16")
    old = [tuned.entry(unknown, good), tuned.entry(down, good)]
    tuned.TABLE.write_text(json.dumps({"another": old, "untouched": [], "card": old}))
    tuned.choices.cache_clear()
    model = random_model(config, torch.device("cpu"), torch.float32)
    captured: list[tuple[bool, dict[tuned.Shape, Any]]] = []

    def capture(self: tune.Steps, answers: bool):
        table = dict(tuned.choices_of(torch.device("cpu")))
        captured.append((answers, table))
        if broken in table.values():
            raise RuntimeError("out of resource")
        speed = {good: 1.0, fair: 0.5, "cublas": 0.1}
        gained = sum(speed.get(use, 0) for shape, use in table.items() if shape not in (down, unknown))
        return lambda: 50 - gained - 3 * (table.get(down) == "cublas")

    monkeypatch.setattr(tune.Steps, "captured", capture)
    record = Record(tmp_path / "x.json", {}, Console(quiet=True), total_s=300)
    try:
        with torch.no_grad():
            record.run([Section("tune", lambda r: tune.measure(r, model), 250)])
        outcome = record.results["tune"]
        assert outcome["status"] == "done", outcome
        assert [row["matrix"] for row in outcome["rows"]] == ["qkv", "o", "gate_up", "down", "head"] * 4
        assert "out of resource" in outcome["rows"][0]["failed"][str([*broken])]
        assert [answers for answers, _ in captured].count(True) == (5 + 2 + 4 + 2), "of heads, in steps that answer"
        tune.write_table("card", outcome["entries"])
        written = json.loads(tuned.TABLE.read_text())
        assert written["another"] == old and "untouched" not in written, "no card of which nothing is said"
        tuned.choices.cache_clear()
        found = tuned.choices("card")
        assert found.pop(unknown) == good, "of a model that is not this one"
        assert found.pop(down) == "cublas" and {*found.values()} == {good}
        # Those of one row: qkv, o, gate_up and head, in fp32 and in int8, and down in int8.
        assert len(found) == 9 and {shape.rows for shape in found} == {1}
    finally:
        tuned.choices.cache_clear()


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


def test_noise_chooses_nothing(tmp_path: Path, monkeypatch) -> None:
    """Faster by its median, but not in every round."""
    pytest.importorskip("triton")
    from bench.gpu import tune
    from bench.gpu.shapes import random_model, small_config
    from vitalrt_kernels import tuned

    monkeypatch.setattr(tune, "TILES", {1: (tuned.Tile(16, 256, 1, 1),)})
    monkeypatch.setattr(tuned, "_card", lambda device: "a card of no entries")
    clock = iter([10.0, 9.5, 9.5] * 2 + [10.0, 10.1, 10.1] + [10.0, 9.5, 9.5] * 2)  # default, tile, cuBLAS in turns

    def capture(self: tune.Steps, answers: bool):
        return lambda: next(clock, 10.0)

    monkeypatch.setattr(tune.Steps, "captured", capture)
    all_in_order = tune._in_order
    monkeypatch.setattr(tune, "_in_order", lambda model: [next(all_in_order(model))])
    model = random_model(small_config(), torch.device("cpu"), torch.float32)
    record = Record(tmp_path / "x.json", {}, Console(quiet=True), total_s=60)
    with torch.no_grad():
        record.run([Section("tune", lambda r: tune.measure(r, model), 50)])
    outcome = record.results["tune"]
    assert outcome["entries"] == [] and outcome["rows"][0]["ms"]["[16, 256, 1, 1]"] == 9.5


def test_steps_are_timed_with_what_the_table_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as are told, each begun anew; of several rows too."""
    from bench.gpu import tune
    from bench.gpu.shapes import random_model, small_config
    from vitalrt.engine.graphs import StepGraphs

    stepped: list[tuple[int, bool]] = []
    step = StepGraphs.step
    monkeypatch.setattr(StepGraphs, "step", lambda self, *args: (stepped.append(args), step(self, *args)))
    with torch.no_grad():
        steps = tune.Steps(random_model(small_config(), torch.device("cpu"), torch.float32), 2, as_int8=True)
        timed = steps.captured(answers=True)
        before = steps._ours.step.rows.lengths.tolist()
        took = [timed(), timed()]
    assert min(took) > 0 and stepped == [(2, True)] * (1 + 2 * tune.STEPS)
    assert steps._ours.step.rows.lengths.tolist() == [length + tune.STEPS - 1 for length in before]


RACE = """========= Error: Race reported between Read access at {0}+0x2e0
=========     and Write access at {0}+0x3cf0 [16 hazards]
"""


@pytest.mark.parametrize(
    ("memcheck", "racecheck", "reason"),
    [
        ("ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards displayed", None),
        ("ERROR SUMMARY: 0 errors", RACE.format("cudnn_sdpa_kernel0_0") + "RACECHECK SUMMARY: 1 hazard", None),
        (
            "ERROR SUMMARY: 0 errors",
            RACE.format("void cut::f<int, 3>(T)") + RACE.format("_swiglu_kernel") * 2 + "RACECHECK SUMMARY: 3 hazards",
            "{'_swiglu_kernel': 2}",
        ),
        ("ERROR SUMMARY: 0 errors", "no device", "no verdict"),
        ("ERROR SUMMARY: 1 error", "RACECHECK SUMMARY: 0 hazards displayed", "memcheck"),
    ],
)
def test_hazards_count_where_they_are_in_our_kernels(memcheck, racecheck, reason, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("triton")
    from bench.gpu import checks

    program = tmp_path / "compute-sanitizer"
    said = {"memcheck": memcheck, "racecheck": racecheck}
    program.write_text(f"#!{sys.executable}\nimport sys\nprint({said}[sys.argv[sys.argv.index('--tool') + 1]])\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    record = Record(tmp_path / "x.json", {}, Console(quiet=True), 60)
    record.run([Section("sanitizer", checks.run_sanitizer, 50)])
    outcome = record.results["sanitizer"]
    assert outcome["status"] == ("failed" if reason else "done"), outcome
    assert reason is None or reason in outcome["reason"]
    if "cudnn" in racecheck:
        assert outcome["racecheck"]["of libraries"] == {"cudnn_sdpa_kernel0_0": 1}


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


def test_a_broken_device_is_left_to_a_new_process(tmp_path: Path) -> None:
    """A section that fails without breaking it is not."""
    ran: list[str] = []

    def section(name: str, fails: bool) -> Section:
        def run(record: Record) -> dict[str, Any]:
            ran.append(name)
            if fails:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return {}

        return Section(name, run, 5)

    def restart() -> None:
        written = json.loads((tmp_path / "x.json").read_text())["sections"]
        assert written["breaks it"]["status"] == "failed"
        ran.append("a new process")
        raise SystemExit  # whoever becomes another program does not return

    record = Record(
        tmp_path / "x.json", {}, Console(quiet=True), 30, is_broken=lambda: "breaks it" in ran, restart=restart
    )
    with pytest.raises(SystemExit):
        record.run([section("works", False), section("fails", True), section("breaks it", True), section("left", True)])
    assert ran == ["works", "fails", "breaks it", "a new process"]


def test_a_call_that_never_returns_is_left_to_a_new_process(tmp_path: Path, monkeypatch, capfd) -> None:
    """It waits without a look at signals, as in a library."""
    monkeypatch.setattr(record_module, "GRACE_S", 0.2)
    returned = threading.Event()

    def hangs(record: Record) -> dict[str, Any]:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        try:
            assert returned.wait(20)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
        return {}

    written: list[dict[str, Any]] = []

    def restart() -> None:
        written.append(json.loads((tmp_path / "x.json").read_text())["sections"]["hangs"])
        returned.set()

    record = Record(tmp_path / "x.json", {}, Console(quiet=True), 30, restart=restart)
    record.run([Section("hangs", hangs, 1.5)])
    assert written[0]["status"] == "failed" and "did not return" in written[0]["reason"]
    assert "in hangs" in capfd.readouterr().err


def test_a_hanging_device_is_found_broken(tmp_path: Path, monkeypatch) -> None:
    """Whoever asks it may wait as long."""
    monkeypatch.setattr(record_module, "GRACE_S", 0.2)
    asked = threading.Event()

    def fails(record: Record) -> dict[str, Any]:
        raise TimeoutError("expected to be done")

    record = Record(tmp_path / "x.json", {}, Console(quiet=True), 30, is_broken=lambda: not asked.wait(20))
    record.restart = asked.set
    record.run([Section("fails", fails, 5)])
    assert asked.is_set() and "did not return" in record.results["fails"]["reason"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a miniature is resumed")
def test_a_new_process_goes_on_where_the_one_before_broke(tmp_path: Path, monkeypatch) -> None:
    """It keeps what was told, and when the run began, and makes anew what the others need, if there are any."""
    from bench.gpu import __main__ as gpu

    commands: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda program, command: commands.append(command))
    arguments = ["--only", "int8", "--only", "profile", "--quick", "--out", str(tmp_path)]
    record = Record(tmp_path / "gpu-cpu.json", {"created": "then", "command": "python"}, Console(quiet=True), 300)
    record.started -= 100
    record.results = {"model": {"status": "failed", "reason": "hung"}, "int8": {"status": "failed", "reason": "broke"}}
    record.write()
    gpu.restart(arguments, record)
    assert commands[0][:3] == [sys.executable, "-m", "bench.gpu"]
    gpu.main(commands[0][3:])
    told = json.loads(record.path.read_text())
    assert told["created"] == "then" and told["command"] == "python" and told["seconds"] > 100
    sections = told["sections"]
    assert sections["int8"] == {"status": "failed", "reason": "broke"} and sections["profile"]["status"] == "skipped"
    assert sections["model"]["status"] == "done" and "reason" not in sections["model"]
    gpu.restart(commands[0][3:], record)  # once more
    monkeypatch.setattr(gpu.Bench, "build", lambda self, record: pytest.fail("nobody needs it"))
    gpu.main(commands[1][3:])
    assert json.loads(record.path.read_text()) == told


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


def test_every_tile_is_compiled_ahead() -> None:
    """Of every matrix, on one layer."""
    pytest.importorskip("triton")
    from bench.gpu.compile_ahead import jobs
    from bench.gpu.shapes import small_config
    from bench.gpu.tune import TILES

    with torch.no_grad():
        tiles = list(jobs(small_config(), torch.device("cpu")))
        assert tiles[0]().shape == (1, 128) and tiles[1]().shape == (1, 128)
    too_many = sum(tile.outputs > 16 for tile in TILES[1])  # for gate and up together
    assert too_many and len(tiles) == 2 * (5 * sum(1 + len(of_rows) for of_rows in TILES.values()) - too_many)


def test_processes_that_compile_ahead_are_waited_for_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of no known model each says why it ends; one that takes too long is ended."""
    from bench.gpu.compile_ahead import run_parts

    said = run_parts(2, 60, "no such model", "cpu")["processes"]
    assert [part["status"] for part in said] == [1, 1] and all("no such model" in part["last"] for part in said)
    assert [part["status"] for part in run_parts(1, 0.1, "no such model", "cpu")["processes"]] == [-signal.SIGKILL]


@pytest.mark.parametrize("processes", [0, 2])
def test_what_cannot_be_collected_is_told(processes: int, tmp_path: Path) -> None:
    (tmp_path / "test_good.py").write_text("def test_good(): pass\n")
    (tmp_path / "test_broken.py").write_text("import no_such_module\n")
    path = tmp_path / "verdicts.jsonl"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.gpu.verdicts", "-p", "no:cacheprovider"]
    subprocess.run(
        [*command, "-n", str(processes), "--continue-on-collection-errors", f"--verdicts={path}"],
        cwd=tmp_path, capture_output=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    told = {verdict["test"]: verdict for verdict in map(json.loads, path.read_text().splitlines())}
    assert told["test_broken.py"]["outcome"] == "failed" and "no_such_module" in told["test_broken.py"]["why"]


@pytest.mark.parametrize("fails", [False, True])
def test_every_verdict_is_told_as_soon_as_it_is_reached(fails: bool, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import os, pytest\ndef test_good(): pass\n@pytest.mark.skip\ndef test_left(): pass\n"
        f"def test_bad(): assert not {fails}\ndef test_end(): os._exit(3)\n"
    )
    path = tmp_path / "verdicts.jsonl"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.gpu.verdicts", "-p", "no:cacheprovider"]
    subprocess.run(
        [*command, f"--verdicts={path}", "test_it.py"],
        cwd=tmp_path, capture_output=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    told = [json.loads(line) for line in path.read_text().splitlines()]
    assert [verdict["outcome"] for verdict in told] == ["passed", "skipped", "failed" if fails else "passed"]
    assert not fails or "assert not True" in told[2]["why"]
