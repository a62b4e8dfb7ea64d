"""Time on a device: events around replayed graphs on CUDA, the clock elsewhere; and what the card can do at best."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from vitalrt.engine.graphs import Graphs
from vitalrt.spread import Spread


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_ms(function: Callable[[], Any], device: torch.device) -> float:
    """Of one call, its work on the device included."""
    synchronize(device)
    began = time.perf_counter()
    function()
    synchronize(device)
    return (time.perf_counter() - began) * 1000


def spread_of(values: list[float]) -> dict[str, float]:
    spread = Spread.of(values)
    return {name: round(value, 5) for name, value in spread._asdict().items()} | {"rounds": len(values)}


def replayed_us(function: Callable[[int], Any], calls: int, device: torch.device, rounds: int = 7) -> dict[str, float]:
    """Microseconds of one function(i), i = 0 .. calls - 1 one after the other, in a CUDA graph where there is CUDA.

    i chooses among inputs that together do not fit into L2, so that every call reads them from memory.
    """

    def all_calls() -> None:
        for i in range(calls):
            function(i)

    if device.type != "cuda":
        all_calls()
        return spread_of([time_ms(all_calls, device) * 1000 / calls for _ in range(rounds)])
    graphs = Graphs(device)

    def replay() -> None:
        graphs("all calls", all_calls, dry_run=all_calls)

    replay()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    once: list[float] = []
    for _ in range(rounds):
        start.record()
        for _ in range(4):
            replay()
        stop.record()
        stop.synchronize()
        once.append(start.elapsed_time(stop) * 1000 / (4 * calls))
    return spread_of(once)


def copy_bandwidth(device: torch.device, num_bytes: int) -> float:
    """Bytes a second, read and written, of a copy much larger than L2: median of several."""
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = [time_ms(lambda: target.copy_(source), device) / 1000 for _ in range(9)]
    return 2 * num_bytes / statistics.median(seconds)


def matmul_flops(device: torch.device, size: int, dtype: torch.dtype) -> float:
    """FLOPs a second of a square product of random matrices: median of several."""
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)
    seconds = [time_ms(lambda: torch.mm(a, b, out=out), device) / 1000 for _ in range(9)]
    return 2 * size**3 / statistics.median(seconds)
