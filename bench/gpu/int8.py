"""e: int8 weights against the model's own, step by step in turns."""

from __future__ import annotations

from typing import Any

from bench.gpu.ours import Ours
from bench.gpu.record import Record
from bench.gpu.shapes import prompt_of
from bench.gpu.timing import spread_of, time_ms
from vitalrt.engine.device_step import StepWeights
from vitalrt.model.qwen3_vl import Qwen3VL

PROMPT, STEPS = 500, 16


def measure(record: Record, model: Qwen3VL) -> dict[str, Any]:
    """Errors of z and logits are in the section numerics."""
    prompt = prompt_of(model.config, PROMPT)
    rows = PROMPT + 1024
    both = {"int8": Ours(model, 1, rows, StepWeights(model.decoder, int8=True)), "plain": Ours(model, 1, rows)}
    times: dict[tuple[str, str], list[float]] = {}
    for ours in both.values():
        ours.request(prompt, 1, 2)
        ours.begin(prompt, 8)
        ours.latent_steps(1)
    for _ in record.rounds(7):
        for kind, ours in both.items():
            ours.begin(prompt, 4 * STEPS)
            times.setdefault(("latent step", kind), []).append(
                time_ms(lambda ours=ours: ours.latent_steps(STEPS), ours.device) / STEPS
            )
            ours.begin(prompt)
            times.setdefault(("answer token", kind), []).append(
                time_ms(lambda ours=ours: ours.answer_tokens(STEPS), ours.device) / STEPS
            )
    ms: dict[str, Any] = {}
    for what in ("latent step", "answer token"):
        ms[what] = spread_of(times[what, "int8"])
        ms[what]["plain_p50"] = spread_of(times[what, "plain"])["p50"]
        ms[what]["speedup"] = round(ms[what]["plain_p50"] / ms[what]["p50"], 4)
    return {"ms": ms}
