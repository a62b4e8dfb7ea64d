"""The kernels' own tests and compute-sanitizer, on this device, each in a process of its own."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.files import from_checkout
from bench.gpu.record import Record, SkippedError

ROOT = Path(__file__).parents[2]
RACES = re.compile(r"Race reported between .*? at (?P<name>.+?)\+0x", re.DOTALL)


def run_tests(record: Record) -> dict[str, Any]:
    """a: the kernels' own tests, on this device: float64 references, dtypes, odd sizes, gradients."""
    select = ["-k", "float32 or bfloat16 or dtype0 or dtype2"] if record.quick else []
    processes = max(1, min(12, (os.cpu_count() or 2) - 1))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "verdicts.jsonl"
        command = [sys.executable, "-m", "pytest", "-q", "tests/kernels", "--ignore=tests/kernels/test_aot.py"]
        command += ["--ignore=tests/kernels/test_ptx.py", "-p", "bench.gpu.verdicts", f"--verdicts={path}"]
        command += [*(["-n", str(processes)] if _has_xdist() else []), *select]
        said, over = "", None
        try:
            said = _run(command, record.seconds_left - 4)
        except TimeoutError as error:
            over = error
        if not path.is_file():
            raise over or RuntimeError(f"pytest came to no verdict: {said[-400:]}")
        verdicts = [json.loads(line) for line in path.read_text().splitlines()]
    counted = Counter(verdict["outcome"] for verdict in verdicts)
    failed = [verdict for verdict in verdicts if verdict["outcome"] == "failed"]
    device = "CUDA device" if torch.cuda.is_available() else "Triton's interpreter"
    outcome = {"on": device, "passed": counted["passed"], "skipped": counted["skipped"], "failed": failed}
    record.tell("tests", **outcome)
    if failed:
        raise RuntimeError(f"{len(failed)} tests failed, the first is {failed[0]['test']}")
    if over:
        raise TimeoutError(f"{len(verdicts)} tests had ended before the time was over")
    return outcome


def run_sanitizer(record: Record) -> dict[str, Any]:
    """a: one case of every kernel under compute-sanitizer, where it is installed.

    memcheck: no error at all. racecheck: no hazard in a kernel of ours; those that it sees in a library's are told.
    """
    program = shutil.which("compute-sanitizer")
    if not torch.cuda.is_available() or program is None:
        raise SkippedError("no CUDA device" if program else "compute-sanitizer is not installed")
    command = [program, "--print-limit", "0", "--report-api-errors", "no", "--tool"]
    target = [sys.executable, "-m", "bench.gpu.sanitized"]
    said = _run([*command, "memcheck", *target], 0.5 * record.seconds_left)
    record.tell("sanitizer", memcheck=said[-300:])
    if "ERROR SUMMARY: 0 errors" not in said:
        raise RuntimeError(f"memcheck: {said[-2000:]}")
    said = _run([*command, "racecheck", *target], record.seconds_left - 2)
    if "RACECHECK SUMMARY" not in said:
        raise RuntimeError(f"racecheck came to no verdict: {said[-2000:]}")
    ours, others = races_of(said, our_kernels())
    record.tell("sanitizer", racecheck={"ours": ours, "of libraries": others, "said": said[-300:]})
    if ours:
        raise RuntimeError(f"racecheck: expected no hazard in our kernels, got {ours}")
    return {}


def races_of(said: str, ours: set[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Kernels with hazards, and how many reports of each: ours, and others."""
    reports = Counter(match["name"] for match in RACES.finditer(said))
    in_ours = {name: count for name, count in reports.items() if name in ours}
    return in_ours, {name: count for name, count in reports.items() if name not in ours}


def our_kernels() -> set[str]:
    """Names of everything in vitalrt_kernels.gpu that Triton compiles, as launches are called."""
    from triton.runtime.jit import KernelInterface

    import vitalrt_kernels.gpu as package

    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    values = [value for name in names for value in vars(importlib.import_module(f"{package.__name__}.{name}")).values()]
    return {value.fn.__name__ for value in values if isinstance(value, KernelInterface)}


def _run(command: Sequence[str], seconds: float) -> str:
    """What it printed. Runs from the root of the checkout, with the sources' folders on the path."""
    try:
        finished = subprocess.run(
            command, cwd=ROOT, env=from_checkout(), capture_output=True, text=True, timeout=max(1, seconds), check=False
        )
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"{Path(command[0]).name} took more than {seconds:.0f} s") from error
    return (finished.stdout + finished.stderr).strip()


def _has_xdist() -> bool:
    return importlib.util.find_spec("xdist") is not None
