"""The kernels' own tests and compute-sanitizer, as bench.gpu runs them: verdicts and hazards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench.gpu.record import Record, Section

ROOT = Path(__file__).parents[2]


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
