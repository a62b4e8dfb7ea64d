"""The prefix cache's fuzz target on random bytes, under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parent.parent / "csrc"
SOURCES = [
    "fuzz/prefix_cache_fuzz.cpp",
    "fuzz/driver.cpp",
    "prefix_cache.cpp",
    "prefix_cache_integrity.cpp",
    "prefix_key.cpp",
    "block_pool.cpp",
]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
COMPILER = next(filter(None, map(shutil.which, [os.environ.get("CXX", "c++"), "g++", "clang++"])), None)


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_random_calls_agree_with_the_model(tmp_path: Path) -> None:
    """With two bits of hash, so that all pages collide and only the full comparison tells them apart."""
    target = tmp_path / "prefix_cache_fuzz"
    options = ["-std=c++17", "-O1", "-g", "-DVITALRT_HASH_BITS=2", *SANITIZE, f"-I{CSRC}"]
    subprocess.run([COMPILER, *options, *(CSRC / source for source in SOURCES), "-o", target], check=True)
    done = subprocess.run([target, "--seconds", "3"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 0
