"""Choosing tiles: what is fastest is taken, noise is not, and all are compiled before they are timed."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bench.gpu.record import Record, Section


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
