"""What launches that overlap ask of the driver. That they wait for each other is read off the machine code."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="the Triton forms need triton: pip install triton")

from vitalrt_kernels.gpu import overlap


class Kernel:
    """As a launch gives it."""

    def __init__(self, function: int | None) -> None:
        self.function = function


def test_kernels_of_one_row_ask_once_for_the_same_share(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int | None, int, int]] = []
    driver = SimpleNamespace(
        cuFuncSetAttribute=lambda function, name, value: asked.append((function.value, name, value))
    )
    monkeypatch.setattr(overlap, "_driver", lambda: driver)
    first, second = Kernel(11), Kernel(12)
    for kernel, num_rows in ((first, 2), (first, 1), (first, 1), (second, 1), (Kernel(None), 1), (None, 1)):
        overlap.share_alike(kernel, num_rows)
    preferred_shared_memory_carveout = 9  # cuda.h
    assert asked == [(function, preferred_shared_memory_carveout, overlap.SHARED_PERCENT) for function in (11, 12)]
