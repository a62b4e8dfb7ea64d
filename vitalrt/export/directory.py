"""A directory that appears whole or not at all."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vitalrt.errors import VitalError


def require_empty(out: Path) -> None:
    """Raises VitalError where `out` is there and has content, or is a file."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise VitalError(f"out: expected a new or empty directory, got {str(out)!r}")


@contextmanager
def building(out: Path, num_bytes: int) -> Iterator[Path]:
    """A directory beside `out`, on the same disk: it becomes `out` if the block ends well, and is gone if not.

    num_bytes: what will be written.  Raises VitalError where the disk is too small for it, or full.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < num_bytes:
        raise VitalError(f"out: the export needs {num_bytes:,} bytes, {out.parent} has {free:,} free")
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    scratch.chmod(0o755)  # mkdtemp keeps it to its owner; an export is for others
    try:
        yield scratch
        scratch.rename(out)  # onto an empty directory: replaces it
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise VitalError(f"out: {out.parent} is full; the export needs {num_bytes:,} bytes") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
