"""What benchmarks share: which sources a result is of, how to run uninstalled."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("bench", "kernels", "training", "vitalrt")


def commit() -> str:
    """Of this checkout, marked -dirty where tracked files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def sources() -> str:
    """Of what runs: a digest of all Python files and tables of the product and its benchmarks, whatever git knows."""
    digest = hashlib.sha256()
    found = [path for folder in FOLDERS for kind in ("*.py", "tuned.json") for path in (ROOT / folder).rglob(kind)]
    for path in sorted(found):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def from_checkout() -> dict[str, str]:
    """Environment of a Python that finds a checkout's sources, which nobody has installed."""
    folders = [str(ROOT / name) for name in ("", "kernels", "training")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])}
