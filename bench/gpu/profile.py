"""Where a step's time goes: every launch of a replayed answer token, the gaps between them, and waits of the host."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from bench.gpu.ours import Ours
from bench.gpu.record import Record, SkippedError
from bench.gpu.shapes import prompt_of
from vitalrt.engine.graphs import answer_alone
from vitalrt.model.qwen3_vl import Qwen3VL
from vitalrt.model_cost import Card, step_cost

PROMPT = 500
TIMELINE = 16  # launches that are told one by one
WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaMemcpy")
LOOP = "request's loop"
EVENT_WAIT = "cudaEventSynchronize"


def measure(record: Record, model: Qwen3VL, card: Card) -> dict[str, Any]:
    ours = Ours(model, 1, PROMPT + 512)
    if ours.device.type != "cuda":
        raise SkippedError("the launches of a CUDA graph are seen on a CUDA device only")
    prompt = prompt_of(model.config, PROMPT)
    ours.request(prompt, 4, 4)
    ours.begin(prompt)
    ours.answer_tokens(3)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        ours.answer_tokens(1)
        torch.cuda.synchronize()
    launches = [event for event in profiled.events() if event.device_type == DeviceType.CUDA]
    record.tell("profile", request=host_waits(ours, prompt))
    if not launches:
        raise SkippedError("the profiler has seen no launch of the replayed graph")
    launches = sorted(launches, key=lambda event: event.time_range.start)
    took, gaps = _shares(launches)
    dtype = "fp32" if ours.step.rows.hidden.dtype == torch.float32 else "bf16"
    cost = step_cost(model.config.decoder, answers=True, context=PROMPT, dtype=dtype)
    floor_us = 1000 * cost.floor_ms(card)
    outcome: dict[str, Any] = {"launches": len(launches), "span_us": round(sum(took) + gaps, 1)}
    outcome |= {"gaps_us": round(gaps, 1), "floor_us": round(floor_us, 1)}
    planned = _in_order(model.config.decoder.num_hidden_layers)
    # cuBLAS may have taken some: more launches than ours would have been.
    names = planned if len(launches) == len(planned) else [event.name for event in launches]
    floors = Counter[str]()
    for operation in cost.operations:
        moved = operation.weight_bytes + operation.kv_bytes
        floors[operation.name] = operation.launches * 1000 * card.floor_ms(moved, operation.flops)
    spent = Counter[str]()
    for name, time in zip(names, took, strict=True):
        spent[name] += time
    losses = {name: time - floors.get(name, 0.0) for name, time in spent.items()} | {"gaps": gaps}
    worst = sorted(losses.items(), key=lambda pair: -pair[1])
    outcome["us_by_operation"] = {
        name: {"us": round(time, 1), "floor_us": round(floors.get(name, 0.0), 1)}
        for name, time in spent.most_common(16)
    }
    first = launches[0].time_range.start
    outcome["timeline_us"] = [  # of the first layers
        {"name": name, "start": round(event.time_range.start - first, 2), "end": round(event.time_range.end - first, 2)}
        for name, event in list(zip(names, launches, strict=True))[:TIMELINE]
    ]
    outcome["largest_losses"] = [{"what": name, "us": round(loss, 1)} for name, loss in worst[:3]]
    return outcome


def _shares(launches: list[Any]) -> tuple[list[float], float]:
    """Of the time from the first start to the last end: what each launch took, in microseconds, and all gaps.

    A launch that began while the one before it still ran is given what it took after that one's end.
    """
    took, gaps = [], 0.0
    end = launches[0].time_range.start
    for launch in launches:
        start, own_end = launch.time_range.start, max(end, launch.time_range.end)
        gaps += max(0.0, start - end)
        took.append(own_end - max(start, end))
        end = own_end
    return took, gaps


def host_waits(ours: Ours, prompt: Any) -> dict[str, Any]:
    """Calls inside a request's loop (thinking and answering) that make the host wait for all of the device's work."""
    ours.begin(prompt, 4)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled, record_function(LOOP):
        tokens = list(answer_alone(ours.graphs, ours.reader, 4, 20, ()))
    events = profiled.events()
    loop = next(event.time_range for event in events if event.name == LOOP and event.device_type == DeviceType.CPU)
    # The profiler itself waits for the device before it ends.
    inside = [event for event in events if loop.start <= event.time_range.start <= loop.end]
    calls = Counter(event.name for event in inside)
    waits = {name: calls[name] for name in WAITS if calls[name]}
    return {"tokens": len(tokens), "host_waits": waits, "waits_for_one_token": calls[EVENT_WAIT]}


def _in_order(num_layers: int) -> list[str]:
    """Names of an answer step's launches, as vitalrt.model_cost calls them."""
    layer = ["QKV", "attention", "O", "gate/up", "down"]
    return ["embedding", *layer * num_layers, "final norm", "head, argmax"]
