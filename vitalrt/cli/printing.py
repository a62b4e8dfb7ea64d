"""What answers and explanations look like on the command line, and as JSON."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console

from vitalrt.errors import VitalError

if TYPE_CHECKING:
    from vitalrt.engine.request import Answer, Request
    from vitalrt.explain.explanation import Explanation


def answer_record(request: Request, answer: Answer) -> dict[str, Any]:
    images = request.image if isinstance(request.image, list) else [request.image]
    return {
        "images": [str(image) for image in images],
        "question": request.question,
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "usage": asdict(answer.usage),
        "timings_ms": asdict(answer.timings),
        "notice": answer.notice,
    }


def print_answer(request: Request, answer: Answer) -> None:
    timings = answer.timings
    parts = ("preprocess", "prefill", "latent", "decode", "total")
    print(f"Question      {request.question}")
    print(f"Answer        {answer.text}")
    print(f"Latent steps  {answer.usage.latent_steps}")
    print(f"Tokens        {answer.usage.prompt_tokens} prompt, {answer.usage.completion_tokens} answer")
    print("Timings (ms)  " + ", ".join(f"{part} {getattr(timings, part):.1f}" for part in parts))


def print_steps(explanation: Explanation) -> None:
    from vitalrt.explain.visual_window import peak_of

    for number, step in enumerate(explanation.steps, start=1):
        print(f"Step {number}")
        if step.text is not None:
            print(f"  words       {step.text} ({step.text_probability:.0%})")
        for index, heatmap in enumerate(step.heatmaps, start=1):
            picture = f"picture {index}" if len(step.heatmaps) > 1 else "picture"
            print(f"  {picture:<12}most alike at {peak_of(heatmap)} (cosine {float(heatmap.max()):.2f})")
        if step.neighbours:
            alike = "; ".join(f"{one.label} ({one.cosine:.2f})" for one in step.neighbours)
            print(f"  neighbours  {alike}")
    for what, why in explanation.missing.items():
        print(f"No {what}: {why}")
    print(explanation.notice)


def print_model_cost(arguments: argparse.Namespace) -> None:
    """`bench --model-cost`: for all known cards, one of them, or one of the given bandwidth."""
    from vitalrt.model_cost import CARDS, DEFAULT_MODEL, Card, ModelCost

    if arguments.bandwidth is not None:
        if arguments.card is not None or not 0 < arguments.bandwidth < float("inf"):
            raise VitalError(f"--bandwidth: expected GB/s above 0 and no --card, got {arguments.bandwidth}")
        cards = [Card(f"{arguments.bandwidth:g} GB/s", arguments.bandwidth * 1e9, None, "as given")]
    elif arguments.card is not None:
        if arguments.card not in CARDS:
            raise VitalError(f"--card: expected one of {sorted(CARDS)}, got {arguments.card!r}")
        cards = [CARDS[arguments.card]]
    else:
        cards = list(CARDS.values())
    cost = ModelCost.of(
        arguments.model or DEFAULT_MODEL,
        context=arguments.context or 0,
        batch=1 if arguments.batch is None else arguments.batch,
        dtype="int8" if arguments.int8 else "bf16" if arguments.dtype == "auto" else arguments.dtype,
    )
    if arguments.json:
        print(json.dumps(cost.record(cards), indent=2))
    else:
        Console().print(cost.operations_table(), cost.floors_table(cards), sep="\n")
