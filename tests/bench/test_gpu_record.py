"""What a run of bench.gpu leaves behind when sections fail, take too long, or break the device."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bench.gpu import record as record_module
from bench.gpu.record import Record, Section, SkippedError


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
