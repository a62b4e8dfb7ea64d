"""What launches that overlap ask of the driver. That they wait for each other is read off the machine code."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="the Triton forms need triton: pip install triton")

from vitalrt_kernels.gpu import overlap


class Kernel:
    """As a launch gives it."""

    def __init__(self, function: int | None) -> None:
        self.function = function


def test_kernels_of_one_row_ask_for_the_same_share(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int | None, int, int]] = []
    driver = SimpleNamespace(
        cuFuncSetAttribute=lambda function, name, value: asked.append((function.value, name, value))
    )
    monkeypatch.setattr(overlap, "_driver", lambda: driver)
    monkeypatch.setattr(overlap, "can_overlap", lambda device: device.type == "meta")
    monkeypatch.setattr(overlap, "num_multiprocessors", lambda device: 132)
    one, two, elsewhere = torch.empty(1, 8, device="meta"), torch.empty(2, 8, device="meta"), torch.empty(1, 8)
    first, second = Kernel(11), Kernel(12)
    launches = [
        (first, two, 1),
        (first, one, 1),
        (first, one, 1),
        (second, one, 128),
        (second, one, 256),
        (first, two, 1),
    ]
    for kernel, rows, num_blocks in [*launches, (Kernel(None), one, 1), (None, one, 1), (Kernel(13), elsewhere, 1)]:
        overlap.share_alike(kernel, rows, num_blocks)
    carveout, drivers_choice = 9, -1  # PREFERRED_SHARED_MEMORY_CARVEOUT and its default, in cuda.h
    small = overlap.SHARED_PERCENT
    assert asked == [
        (f, carveout, percent) for f, percent in ((11, small), (12, small), (12, drivers_choice), (11, -1))
    ]
