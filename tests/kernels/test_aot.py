"""Every kernel, compiled ahead of time for three architectures at production shapes: no spills, and the occupancy that
is written beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# Per multiprocessor: registers, shared memory in bytes, threads (CUDA C programming guide, compute capabilities).
LIMITS = {80: (65536, 164 * 1024, 2048), 90: (65536, 228 * 1024, 2048), 120: (65536, 100 * 1024, 1536)}

TRAINED = {"_layer_norm", "_layer_norm_backward", "_gelu_residual", "_gelu_residual_backward"}  # launched in turn


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    pytest.importorskip("triton", reason="compiling the kernels needs triton: pip install triton")
    program = Path(__file__).with_name("aot.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(program), *map(str, LIMITS)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def test_every_kernel_is_compiled(compiled: dict[str, Any]) -> None:
    for capability in LIMITS:
        assert {row["kernel"] for row in compiled["rows"] if row["capability"] == capability} == {*compiled["kernels"]}


def test_no_kernel_spills(compiled: dict[str, Any]) -> None:
    assert [row for row in compiled["rows"] if row["STACK"] or row["LOCAL"]] == []


def test_occupancy(compiled: dict[str, Any]) -> None:
    rows = [row | {"fits": _blocks_that_fit(row)} for row in compiled["rows"]]
    assert [row for row in rows if row["fits"] < row["blocks_per_sm"]] == []


def test_kernels_of_a_step_wait_before_they_touch_anything(compiled: dict[str, Any]) -> None:
    """Read off the machine code: an overlapping launch may run beside the one before it until it waits.

    Attention that appends loads what nobody has written since the launch before began: from L2, as L1 may be older.
    What it attends to without appending, the launch before has just written.
    """
    steps = [row for row in compiled["rows"] if row["kernel"] not in TRAINED]
    assert [row for row in steps if row["waits"] != (row["capability"] >= 90)] == []
    early = [row for row in steps if row["waits"] and row["accesses_before"]]
    appending = [row for row in steps if row["kernel"] == "_paged_attention_kernel" and row["appends"] and row["waits"]]
    assert early == appending != []
    assert [row for row in early if row["accesses_before"] != row["loads_from_l2_before"]] == []
    assert all(row["accesses_before"] for row in steps if not row["waits"]), "the pattern finds accesses"


def test_weights_are_asked_for_before_the_wait(compiled: dict[str, Any]) -> None:
    rows = [row for row in compiled["rows"] if row["kernel"] in ("_linear_decode_kernel", "_head_argmax_kernel")]
    assert [row for row in rows if (row["fetches_before"] > 0) != (row["capability"] >= 90)] == []


def test_warps_of_one_row_do_not_wait_for_each_other(compiled: dict[str, Any]) -> None:
    """In the loop over a weight's columns a barrier would let all of them wait for the slowest load.

    Loops of sm_120 end in ways that the pattern does not know.
    """
    linear = [row for row in compiled["rows"] if row["kernel"] == "_linear_decode_kernel" and row["capability"] < 120]
    assert [row for row in linear if row["rows"] == 1 and row["barriers_in_loop"]] == []
    assert all(row["barriers_in_loop"] for row in linear if row["rows"] == 16), "the pattern finds barriers"


def _blocks_that_fit(row: dict[str, Any]) -> int:
    registers, shared, threads = LIMITS[row["capability"]]
    warp_registers = -(-row["REG"] * 32 // 256) * 256  # handed out to a warp in units of 256
    by_registers = registers // (warp_registers * row["warps"])
    by_shared = shared // max(1024, row["SHARED"] + row["dynamic_shared"])  # each block also costs the driver 1 KiB
    return min(by_registers, by_shared, threads // (32 * row["warps"]))
