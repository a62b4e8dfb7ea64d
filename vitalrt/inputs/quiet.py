"""Keeps file readers silent: their warnings and log lines quote values out of the file, a patient's name among them."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

_LOGGERS = ("pydicom", "pylibjpeg", "nibabel.global", "PIL")

# Warning filters and loggers belong to the whole process: the first thread in silences them, the last one out restores.
_lock = threading.Lock()
_num_inside = 0
_silence = ExitStack()


@contextmanager
def quietly() -> Iterator[None]:
    """No Python warning, and nothing from the readers' loggers or their children, leaves the block, in any thread."""
    global _num_inside
    with _lock:
        if _num_inside == 0:
            _silence.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            for name in _LOGGERS:
                _silence.enter_context(_muted(logging.getLogger(name)))
        _num_inside += 1
    try:
        yield
    finally:
        with _lock:
            _num_inside -= 1
            if _num_inside == 0:
                _silence.close()


@contextmanager
def _muted(logger: logging.Logger) -> Iterator[None]:
    before = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [logging.NullHandler()], False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before
