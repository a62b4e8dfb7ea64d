"""The kernels' tests again, on what Triton compiles for three architectures; and that the machine sees what is wrong.

The interpreter's bf16 tl.dot is wrong, it knows no assembly, and nothing in it runs beside anything else.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).parent
NUM_KERNEL_TESTS = {80: 100, 90: 300, 120: 100}  # and more

# Each of 64 threads gives its number to the thread of the same place in the other warp, through shared memory.
SWAP = """
.visible .entry swap(
    .param .u64 .ptr .global .align 1 swap_param_0
)
.reqntid 64
{
    .reg .b32 %r<9>;
    .reg .b64 %rd<9>;
    ld.param.b64 %rd1, [swap_param_0];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd2, %r1, 4;
    add.s64 %rd3, %rd1, %rd2;
    ld.global.b32 {%r2}, [%rd3];
    shl.b32 %r3, %r1, 2;
    st.shared.b32 [%r3], %r2;
    bar.sync 0;
    xor.b32 %r4, %r3, 128;
    ld.shared.b32 %r5, [%r4];
    griddepcontrol.wait;
    st.global.b32 [%rd3], {%r5};
    ret;
}
"""


@pytest.fixture
def run_swap(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], tuple[np.ndarray, set[int]]]:
    """run_swap(text): what 64 threads leave, and which memory they touched early."""
    monkeypatch.syspath_prepend(str(HERE))
    from ptx import run
    from ptx_memory import Memory
    from ptx_program import parse

    def run_text(text: str) -> tuple[np.ndarray, set[int]]:
        memory = Memory()
        address = memory.allocate(np.arange(64, dtype=np.uint32).view(np.uint8))
        early = run(parse(text), memory, [address], (1,))
        return memory.bytes_of(0).view(np.uint32), early

    return run_text


def test_threads_meet_at_a_barrier(run_swap) -> None:
    swapped, early = run_swap(SWAP)
    assert swapped.tolist() == [*range(32, 64), *range(32)]
    assert early == {0}, "was read before the launch before had ended"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("    bar.sync 0;\n", "", "race"),
        ("mul.wide.u32 %rd2, %r1, 4;", "mul.wide.u32 %rd2, %r1, 8;", "outside of global memory"),
        ("add.s64 %rd3, %rd1, %rd2;", "add.s64 %rd3, %rd1, -4;", "outside of global memory"),
        ("shl.b32 %r3, %r1, 2;", "shl.b32 %r3, %r1, 16;", "outside of shared memory"),
        ("shl.b32 %r3, %r1, 2;", "mov.b32 %r3, 0;", "two warps write"),
        ("xor.b32", "brev.b32", "no such instruction"),
    ],
)
def test_what_is_wrong_is_seen(run_swap, old: str, new: str, says: str) -> None:
    assert old in SWAP
    with pytest.raises(Exception, match=says) as raised:
        run_swap(SWAP.replace(old, new))
    assert type(raised.value).__name__ == "PtxError"


def test_a_copy_arrives_when_it_is_waited_for(run_swap) -> None:
    copy = "cp.async.ca.shared.global [%r3], [%rd3], 4;\n    cp.async.commit_group;"
    through_copy = SWAP.replace("st.shared.b32 [%r3], %r2;", copy + "\n    cp.async.wait_group 0;")
    assert run_swap(through_copy)[0].tolist() == [*range(32, 64), *range(32)]
    too_early = run_swap(through_copy.replace("wait_group 0", "wait_group 1"))[0]
    assert (too_early == 0xFFFFFFFF).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the tests run on the GPU")
@pytest.mark.parametrize("capability", [80, 90, 120])
def test_kernels_as_compiled(capability: int) -> None:
    pytest.importorskip("triton", reason="compiling the kernels needs triton: pip install triton")
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "PTX_CAPABILITY": str(capability),
        "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "ptx_launches", "-p", "no:cacheprovider", str(HERE)]
    # fp16: one test, by its name; sm_120 multiplies fp16 into fp32 in one instruction.
    chosen = "not as_compiled" if capability == 90 else "(bfloat16 or begin_step or fp16) and not as_compiled"
    command += ["-k", chosen, f"--ignore={HERE / 'test_aot.py'}"]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout[-5000:] + finished.stderr[-2000:]
    passed = re.search(r"(\d+) passed", finished.stdout)
    assert passed and int(passed[1]) >= NUM_KERNEL_TESTS[capability] and "skipped" not in finished.stdout
