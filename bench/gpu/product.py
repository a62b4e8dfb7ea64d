"""The product on this device: the bundled model's answers, alone, in a batch and explained, held to those on the CPU.

Needs vitalrt built for this checkout, as `pip install --no-build-isolation --no-deps -e .` builds it without a network;
a checkout alone has no C++ core to keep pages with, and the section says so.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

import vitalrt
from bench.gpu.record import Record, SkippedError

PHANTOMS = 12
LATENTS = (0, 1, 2, 4)  # in turns, so that a batch has all of them
FURTHEST = 2e-3  # of a latent in fp32, relative; of a heat map's cosine, as it is
EXPLAINED = 4


def measure(record: Record, device: torch.device) -> dict[str, Any]:
    """In fp32, where every token has to be the same; and how many answers are in the checkpoint's own dtype."""
    if importlib.util.find_spec("vitalrt._core") is None:
        raise SkippedError("vitalrt is not built for this checkout: pip install --no-build-isolation --no-deps -e .")
    from vitalrt_training.data.phantom import ask, draw_phantom  # whose packages a mere checkout need not have

    phantoms = [draw_phantom("test", seed=5, index=index) for index in range(PHANTOMS)]
    questions = [(phantom.image, sample.question) for phantom in phantoms for sample in ask(phantom)[:2]]
    requests = [
        vitalrt.Request(image, question, k=LATENTS[index % len(LATENTS)])
        for index, (image, question) in enumerate(questions)
    ]
    expected = [vitalrt.load(device="cpu").generate_batch([request])[0] for request in requests]
    model = vitalrt.load(device=device, dtype="float32")
    alone = [model.generate_batch([request])[0] for request in requests]
    batch = model.generate_batch(requests)
    own = vitalrt.load(device=device).generate_batch(requests)
    errors = [
        float((mine.latents - theirs.latents).norm() / theirs.latents.norm())
        for mine, theirs in zip([*alone, *batch], [*expected, *expected], strict=True)
        if len(theirs.latents)
    ]

    def same(answers: list[Any]) -> int:
        return sum(mine.token_ids == theirs.token_ids for mine, theirs in zip(answers, expected, strict=True))

    outcome = {"questions": len(requests), "same_alone": same(alone), "same_in_batch": same(batch)}
    outcome |= {"same_in_own_dtype": same(own), "largest_latent_error": max(errors)}
    outcome |= _explained(model, questions[:EXPLAINED])
    record.tell("product", **outcome)
    answers_differ = min(outcome["same_alone"], outcome["same_in_batch"]) < len(requests)
    words_differ = outcome["same_words"] < outcome["steps"]
    if answers_differ or words_differ or not max(*errors, outcome["largest_heatmap_error"]) < FURTHEST:
        raise RuntimeError(f"expected the CPU's answers and words, latents and maps within {FURTHEST}, got {outcome}")
    return outcome


def _explained(model: vitalrt.Model, questions: list[tuple[Any, str]]) -> dict[str, Any]:
    """How many steps are read in the same words, and the largest difference of a heat map's cosines."""
    on_cpu = vitalrt.load(device="cpu")
    pairs = [
        steps
        for image, question in questions
        for steps in zip(model.explain(image, question).steps, on_cpu.explain(image, question).steps, strict=True)
    ]
    errors = [
        float((m - t).abs().max())
        for mine, theirs in pairs
        for m, t in zip(mine.heatmaps, theirs.heatmaps, strict=True)
    ]
    return {
        "steps": len(pairs),
        "same_words": sum(mine.text == theirs.text for mine, theirs in pairs),
        "largest_heatmap_error": max(errors),
    }
