"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def replace_whole(path: Path, write: Callable[[Path], Any], mode: int = 0o644) -> None:
    """Write beside the target and rename, so that nobody ever finds half a file.  mode: its permissions."""
    descriptor, name = tempfile.mkstemp(prefix=".partial-", dir=path.parent)
    os.close(descriptor)
    partial = Path(name)
    try:
        write(partial)
        partial.chmod(mode)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
