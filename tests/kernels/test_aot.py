"""Every kernel, compiled ahead of time for three architectures at production shapes: what its machine code shows."""

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

LARGEST_SHARED = {80: 163 * 1024, 90: 227 * 1024, 120: 99 * 1024}  # of a block

# What memory gives a multiprocessor in a clock: A100 80GB 2.04 TB/s, 108 of them, 1.41 GHz; H200 4.3 (as copied), 132,
# 1.755; RTX PRO 6000 1.79, 188, 2.6.
BYTES_A_CLOCK = {80: 13.4, 90: 18.6, 120: 3.7}

TRAINED = {"_layer_norm", "_layer_norm_backward", "_gelu_residual", "_gelu_residual_backward"}  # launched in turn


@pytest.fixture(scope="module")
def all_compiled() -> dict[str, Any]:
    pytest.importorskip("triton", reason="compiling the kernels needs triton: pip install triton")
    program = Path(__file__).with_name("aot.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(program), *map(str, LIMITS)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


@pytest.fixture
def compiled(all_compiled: dict[str, Any]) -> dict[str, Any]:
    """As in production: in bf16."""
    return all_compiled | {"rows": [row for row in all_compiled["rows"] if row.get("x") != "float32"]}


@pytest.fixture
def over_weights(compiled: dict[str, Any]) -> list[dict[str, Any]]:
    rows = [{**row} for row in compiled["rows"] if "weight" in row]
    assert rows and all("loop" in row for row in rows), "each is one loop over weights"
    return rows


def test_every_kernel_is_compiled(compiled: dict[str, Any]) -> None:
    for capability in LIMITS:
        assert {row["kernel"] for row in compiled["rows"] if row["capability"] == capability} == {*compiled["kernels"]}


def test_blocks_fit_into_shared_memory(all_compiled: dict[str, Any]) -> None:
    rows = all_compiled["rows"]
    assert [row for row in rows if row["SHARED"] + row["dynamic_shared"] > LARGEST_SHARED[row["capability"]]] == []
    assert {row["weight"] for row in rows if row.get("x") == "float32"} == {"float32", "int8"}


def test_no_kernel_spills(compiled: dict[str, Any]) -> None:
    assert [row for row in compiled["rows"] if row["STACK"] or row["LOCAL"]] == []


def test_occupancy(compiled: dict[str, Any]) -> None:
    rows = [row | {"fits": _blocks_that_fit(row)} for row in compiled["rows"]]
    assert [row for row in rows if row["fits"] < row["blocks_per_sm"]] == []


def test_kernels_of_a_step_wait_before_they_touch_anything(compiled: dict[str, Any]) -> None:
    """Read off the machine code: an overlapping launch may run beside the one before it until it waits.

    It may load weights, and scales of int8, which no launch writes. Attention that appends loads what nobody has
    written since the launch before began: from L2, as L1 may be older. What it attends to without appending, the launch
    before has just written.
    """
    steps = [row for row in compiled["rows"] if row["kernel"] not in TRAINED]
    assert [row for row in steps if row["waits"] != (row["capability"] >= 90)] == []
    early = [row for row in steps if row["waits"] and row["accesses_before"]]
    attention = [row for row in early if row["kernel"] == "_paged_attention_kernel"]
    assert attention and all(row["appends"] for row in attention)
    assert [row for row in attention if row["accesses_before"] != row["loads_from_l2_before"]] == []
    others = [row for row in early if row not in attention]
    assert others == [row for row in steps if row["waits"] and row.get("weight") == "int8"] != []
    assert [row for row in others if row["accesses_before"] != row["loads_before"]] == []
    assert all(row["accesses_before"] for row in steps if not row["waits"]), "the pattern finds accesses"


def test_weights_are_asked_for_before_the_wait(over_weights: list[dict[str, Any]]) -> None:
    """A row's first round of them, but for int8, to registers; and norms, in lines of 128 bytes, to L2."""
    for row in over_weights:
        lines = row["fetches_before"] * 32 * row["warps"]
        assert lines * 128 >= row["fetched"] if row["waits"] else not lines, row
    early = [row for row in over_weights if row["weights_before"]]
    assert early == [row for row in over_weights if row["waits"] and row["rows"] == 1 and row["weight"] != "int8"] != []
    assert [row for row in early if row["weights_before"] * 32 * row["warps"] < row["bytes_a_round"]] == []


def test_attention_fuses_no_products(compiled: dict[str, Any]) -> None:
    """Fused into sums, they would make the last bits of these depend on which warp writes them."""
    attention = [row for row in compiled["rows"] if row["kernel"] == "_paged_attention_kernel"]
    assert attention and not any(row["fuses"] for row in attention) and any(row["fuses"] for row in compiled["rows"])


def test_attention_asks_for_its_first_block_at_once_and_before_it_waits(compiled: dict[str, Any]) -> None:
    """64 keys and values of 256 bytes each; of one row none is waited for, so that q comes beside them."""
    appends = [row for row in compiled["rows"] if row["appends"] and row["kernel"] == "_paged_attention_kernel"]
    block = 64 * 2 * 256
    early = [row["wide_loads_before"] * 32 * row["warps"] * 16 == block for row in appends if row["waits"]]
    one_row = [row for row in appends if row["waits"] and not row["copies_to_shared"]]
    assert early and all(early) and one_row
    assert {row["stores_to_shared_before"] > 0 for row in one_row} == {False}
    assert {row["stores_to_shared_before"] > 0 for row in appends if row["copies_to_shared"]} == {True}, (
        "they are found"
    )


def test_warps_of_attention_meet_for_no_sum_of_weights(compiled: dict[str, Any]) -> None:
    """After the wait nobody fills the time in which warps meet. A reduction takes two or three barriers."""
    appends = [row for row in compiled["rows"] if row["appends"] and row["kernel"] == "_paged_attention_kernel"]
    waiting = [row for row in appends if row["waits"]]
    most = {8: 22, 2: 20}  # of one row, and of 16; 19 and 17 with triton 3.6
    assert waiting and [row for row in waiting if row["barriers_after"] > most[row["splits_at_once"]]] == []


def test_attention_of_many_rows_has_the_next_block_on_its_way(compiled: dict[str, Any]) -> None:
    """And that of one, whose splits are of a block each, does not pay for it."""
    attention = [row for row in compiled["rows"] if row["kernel"] == "_paged_attention_kernel"]
    assert {(row["splits_at_once"], row["copies_to_shared"] > 0) for row in attention} == {(8, False), (2, True)}


def test_kernels_of_one_row_share_a_multiprocessor_alike(compiled: dict[str, Any]) -> None:
    """And attention where each block may have a multiprocessor of its own: contexts of up to 1,024 tokens."""
    of_step = ("_begin_step_kernel", "_linear_decode_kernel", "_head_argmax_kernel", "_paged_attention_kernel")
    for row in compiled["rows"]:
        if row["kernel"] in of_step:
            is_one = row["grid"][0] == 1 if row["kernel"].startswith(("_begin", "_paged")) else row["rows"] == 1
            is_large = row["kernel"].startswith("_paged") and row["grid"][1] * row["grid"][2] > 132
            assert row["shares_alike"] == (row["waits"] and is_one and not is_large), row


def test_a_short_context_is_combined_at_once(compiled: dict[str, Any]) -> None:
    attention = [row for row in compiled["rows"] if row["kernel"] == "_paged_attention_kernel"]
    assert {row["splits_at_once"] for row in attention} == {2, 8}, "of 16 rows, and of one: 512 tokens"


def test_warps_of_one_row_do_not_wait_for_each_other(over_weights: list[dict[str, Any]]) -> None:
    """In the loop over a weight's columns a barrier would let all of them wait for the slowest load."""
    assert [row for row in over_weights if row["rows"] == 1 and row["loop"]["barriers"]] == []
    assert all(row["loop"]["barriers"] for row in over_weights if row["rows"] == 16), "barriers are found"


def test_lanes_share_the_sums_of_one_row(over_weights: list[dict[str, Any]]) -> None:
    """Each of a warp's 32 lanes gives away all sums but its own, one exchange for each; a few more for what is left of
    them, for the norm and between warps. Summed up in every lane it would be five for each, and more barriers."""
    one_row = [row for row in over_weights if row["rows"] == 1 and row["kernel"] == "_linear_decode_kernel"]
    assert [row for row in one_row if not row["sums"] - 2 <= row["exchanges"] <= row["sums"] + 16] == []
    assert {row["sums"] for row in one_row} == {8, 16}
    assert [row for row in one_row if row["waits"] and not 0 < row["barriers_after"] <= 5] == []


def test_a_single_row_is_on_its_way_before_its_loop_unless_normed(over_weights: list[dict[str, Any]]) -> None:
    """Only it is loaded to be evicted last. Not for int8, whose loads would come apart; the first norm is fetched."""
    for row in over_weights:
        if row["rows"] == 1:
            assert row["row_before_loops"] == (row["weight"] != "int8" and not row["fetched"]), row


def test_weights_are_not_waited_for_one_by_one(over_weights: list[dict[str, Any]]) -> None:
    """All that a thread loads in a round, it asks for before it needs any of it; of int8, half of it or more, and on
    sm_120, whose multiprocessors are brought a fifth as much in a clock as an H200's, a quarter."""
    for row in over_weights:
        asked = row["loop"]["bytes_before_use"] * 32 * row["warps"]
        share = 1.0 if row["weight"] != "int8" else 0.25 if row["capability"] == 120 else 0.5
        assert row["rows"] == 16 or asked >= row["bytes_a_round"] * share, row


def test_enough_is_on_its_way_to_fill_the_memory(over_weights: list[dict[str, Any]]) -> None:
    """On an H200: 4.3 TB/s for 0.8 us, what a load takes, over its multiprocessors. For several rows half of it: their
    default tiles are those that were fastest there."""
    multiprocessors, needed = 132, 4.3e12 * 0.8e-6 / 132
    of_h200 = [row for row in over_weights if row["capability"] == 90]
    for row in of_h200:
        resident = min(_blocks_that_fit(row), row["blocks"] / multiprocessors)
        rounds = 1 if row["rows"] == 1 else row["stages"] - 1  # one is being multiplied
        row["on_their_way"] = round(resident * rounds * row["bytes_a_round"])
        row["needed"] = needed if row["rows"] == 1 else needed / 2
    assert [row for row in of_h200 if row["on_their_way"] < row["needed"]] == []


def test_memory_leaves_time_for_the_instructions(over_weights: list[dict[str, Any]]) -> None:
    """Weights come at the card's bandwidth while its multiprocessors issue four instructions a clock, of any warps, and
    convert sixteen numbers in the units that do it."""
    for row in over_weights:
        clocks = row["bytes_a_round"] / BYTES_A_CLOCK[row["capability"]]
        row["issued"] = row["loop"]["instructions"] * row["warps"] / 4 / clocks
        row["converted"] = row["loop"]["conversions"] * row["warps"] * 2 / clocks
    old_int8 = {row["capability"] for row in over_weights if row["converted"]}
    assert old_int8 == {80}, "conversions are found: several rows of int8 are converted so, on what is slower anyway"
    assert [row for row in over_weights if max(row["issued"], row["converted"]) > 0.9] == []
    assert [row for row in over_weights if row["weight"] == "bfloat16" and row["issued"] > 0.5] == []


def _blocks_that_fit(row: dict[str, Any]) -> int:
    registers, shared, threads = LIMITS[row["capability"]]
    warp_registers = -(-row["REG"] * 32 // 256) * 256  # handed out to a warp in units of 256
    by_registers = registers // (warp_registers * row["warps"])
    by_shared = shared // max(1024, row["SHARED"] + row["dynamic_shared"])  # each block also costs the driver 1 KiB
    return min(by_registers, by_shared, threads // (32 * row["warps"]))
