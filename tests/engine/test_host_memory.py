"""Freed memory stays with the process on the CPU, unless its owner has tuned malloc."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys

import pytest

from vitalrt.engine import scheduler

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")

# Faults of a round of activations as a batch of small images has them, once the heap has grown.
ROUNDS = """
import ctypes, resource, statistics, sys
import torch
from vitalrt.engine.host_memory import _M_MMAP_THRESHOLD, keep_freed_memory

torch.set_num_threads(1)
# What malloc begins with. It adapts, to what depends on where blocks happen to lie: here, setting it stops that.
ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 128 * 1024)
kept = sys.argv[1] == "keep" and keep_freed_memory()
x = torch.ones(1920, 384)
faults = []
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    activations = [x * 2.0 for _ in range(6)]
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    del activations
print(kept, statistics.median_low(faults))
"""


def faults(how: str, **environment: str) -> tuple[str, int]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    run = [sys.executable, "-c", ROUNDS, how]
    kept, count = subprocess.run(
        run, env=clean | environment, check=True, capture_output=True, text=True
    ).stdout.split()
    return kept, int(count)


def test_freed_memory_is_used_again() -> None:
    every_page = 6 * 1920 * 384 * 4 // resource.getpagesize()
    assert faults("leave")[1] > every_page // 2
    kept, count = faults("keep")
    assert kept == "True"
    assert count < every_page // 20


def test_an_engine_on_the_cpu_asks_for_it(tiny, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(scheduler, "keep_freed_memory", lambda: asked.append(True))
    tiny.load()
    assert asked


@pytest.mark.parametrize(
    "environment", [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}]
)
def test_whoever_tunes_malloc_is_left_alone(environment) -> None:
    assert faults("keep", **environment)[0] == "False"
