"""What answers and explanations look like on the command line, and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

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
