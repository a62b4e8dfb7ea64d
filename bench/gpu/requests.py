"""End to end and step by step, ours and the others' in turns: prefill, latent steps, answer tokens, whole requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bench.gpu.ours import PAGE, InTurn, Ours
from bench.gpu.peers import Compiled, Eager, TorchGraph
from bench.gpu.record import Record, SkippedError, in_short
from bench.gpu.shapes import MINIATURE, BenchPrompt, prompt_of, transformers_model
from bench.gpu.timing import spread_of, synchronize, time_ms
from vitalrt.engine.graphs import StepGraphs
from vitalrt.inputs.processor import PatchOptions, patchify, patchify_on
from vitalrt.model.qwen3_vl import Qwen3VL
from vitalrt.model_cost import Card, step_cost
from vitalrt_kernels.gpu.overlap import can_overlap

PROMPT = 500
PREFILLS = (300, 500, 1000, 1500)
LATENTS = (0, 1, 2, 4)
QUESTION, ANSWER, THOUGHT = 16, 20, 920
PICTURE = 1500  # pixels a side, before it is resized
BATCHES = (1, 8, 64)
STEPS = 16  # timed as one, so that the host's way in and out does not count


class Contenders:
    """Everybody, each built once; what cannot run here is left out and told in `skipped`."""

    def __init__(self, model: Qwen3VL, quick: bool) -> None:
        self.model = model
        self.skipped: dict[str, str] = {}
        self.ours = Ours(model, num_rows=2, row_tokens=2048)
        self.all: list[Any] = [self.ours]
        self.in_turn: InTurn | None = None
        if can_overlap(self.ours.device):
            self.in_turn = InTurn(model, num_rows=2, row_tokens=2048)
            self.all.append(self.in_turn)
        else:
            self.skipped[InTurn.name] = "launches overlap on cards of compute capability 9.0 on"
        self.all.append(TorchGraph(model, 2048))
        theirs = transformers_model(model)
        self.eager = Eager(theirs)
        self.all.append(self.eager)
        try:
            if quick:
                raise SkippedError("--quick: compiling takes a minute or more")
            self.all.append(Compiled(theirs, 2048))
        except SkippedError as reason:
            self.skipped[Compiled.name] = str(reason)

    def overlap_agrees(self, prompt: BenchPrompt) -> bool | None:
        """Whether launches that overlap give the very numbers that launches in turn give, every time.

        Both run the same kernels in the same order of sums: any difference is one that did not wait for another. None
        where there is nothing to compare.
        """
        if self.in_turn not in self.all:
            return None
        first, *others = [self._everything(ours, prompt) for ours in [self.in_turn, *[self.ours] * 5]]
        return all(torch.equal(mine, exact) for other in others for mine, exact in zip(other, first, strict=True))

    @staticmethod
    def _everything(ours: Ours, prompt: BenchPrompt) -> list[torch.Tensor]:
        """A request's tokens and latents, what is left of a later question, and both rows after a step of two."""
        tokens = torch.tensor(ours.request(prompt, LATENTS[-1], ANSWER))
        found = [tokens, ours.step.latents[: LATENTS[-1]].clone()]
        ours.begin(prompt, 0, row=1)
        ours.begin(prompt, 1)
        found.append(ours.go_on(prompt, QUESTION).clone())
        ours.two_rows()
        return [*found, ours.step.rows.hidden[:2].clone(), ours.step.rows.tokens[:2].clone()]

    def warm_up(self, record: Record, prompt: BenchPrompt) -> None:
        """Compile, capture, choose kernels. Who fails or takes most of the section's time is left out, and told."""
        for contender in list(self.all):
            try:
                with record.at_most(0.65 * record.seconds_left):
                    for k in (*LATENTS, 0):  # twice the same: vision is captured the second time
                        contender.request(prompt, k, 3)
                    contender.begin(prompt, 64)
                    contender.latent_steps(2)
                    contender.answer_tokens(2)
            except Exception as error:
                if contender is self.ours:
                    raise
                self.all.remove(contender)
                self.skipped[contender.name] = in_short(error)


def measure_requests(record: Record, contenders: Contenders, is_promised: bool) -> dict[str, Any]:
    """c and d: every contender once per round.  is_promised: whether `claims` are of this model and kind of device."""
    device, prompt = contenders.ours.device, prompt_of(contenders.model.config, PROMPT)
    contenders.warm_up(record, prompt)
    record.tell("requests", skipped=contenders.skipped, overlap_agrees=contenders.overlap_agrees(prompt))
    times: dict[tuple[str, str], list[float]] = {}
    thought = THOUGHT if device.type == "cuda" else THOUGHT // MINIATURE

    def note(what: str, who: Any, function: Callable[[], Any], per: int = 1) -> None:
        times.setdefault((what, who.name), []).append(time_ms(function, device) / per)

    for round_ in record.rounds(3 if record.quick else 5, reserve_s=0.25 * record.seconds_left):
        for who in contenders.all:
            who.begin(prompt, 4 * STEPS)
            note("latent step", who, lambda who=who: who.latent_steps(STEPS), STEPS)
            who.begin(prompt)
            note("answer token", who, lambda who=who: who.answer_tokens(STEPS), STEPS)
            for k in LATENTS if who is contenders.ours else (LATENTS[0], LATENTS[-1]):
                note(f"request K={k}", who, lambda who=who, k=k: who.request(prompt, k, ANSWER))
        if round_ % 5 == 0:
            ours = contenders.ours
            note(f"request CoT {thought}", ours, lambda ours=ours: ours.request(prompt, 0, thought + ANSWER))
        record.tell("requests", ms=_by_row(times), claims=claims(_by_row(times)) if is_promised else [])
    for round_ in record.rounds(6):
        for who in (contenders.ours, contenders.eager):
            who.begin(prompt)
            took = time_ms(lambda who=who: who.go_on(prompt, QUESTION), device)
            if round_:  # the first captures, or chooses kernels
                times.setdefault((f"prefill, {QUESTION} more", who.name), []).append(took)
    agree = measure_patches(record, device, times)
    record.tell("requests", ms=_by_row(times), patches_agree=agree)
    for num_tokens in PREFILLS:
        if record.seconds_left < 5:
            break
        long = prompt_of(contenders.model.config, num_tokens)
        for round_ in record.rounds(6):
            for who in (contenders.ours, contenders.eager):
                took = time_ms(lambda who=who, long=long: who.begin(long), device)
                if round_ > 1:  # the first two capture, decoder and tower, or choose kernels
                    times.setdefault((f"prefill {num_tokens}", who.name), []).append(took)
        record.tell("requests", ms=_by_row(times))
    return {"prompt_tokens": prompt.num_tokens, "answer_tokens": ANSWER, "skipped": contenders.skipped}


def measure_patches(record: Record, device: torch.device, times: dict[tuple[str, str], list[float]]) -> bool:
    """A picture's patches on the device: cut there, or on the host. Whether they are the same."""
    side = PICTURE if device.type == "cuda" else PICTURE // MINIATURE
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    options = PatchOptions(16, 2, 2, min_pixels=1 << 16, max_pixels=1 << 20, mean=(0.5,) * 3, std=(0.5,) * 3)
    ways: dict[str, Callable[[], torch.Tensor]] = {
        Ours.name: lambda: patchify_on(device, pixels, options),
        "Pillow on the host": lambda: torch.from_numpy(patchify(pixels, options)[0]).to(device),
    }
    for round_ in record.rounds(6):
        for name, way in ways.items():
            took = time_ms(way, device)
            if round_:
                times.setdefault((f"patches of {side} x {side}", name), []).append(took)
    here, there = (way() for way in ways.values())
    return torch.equal(here, there)


def _by_row(times: dict[tuple[str, str], list[float]]) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for (what, who), values in times.items():
        rows.setdefault(what, {})[who] = spread_of(values)
    return rows


def claims(ms: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What is promised of an H200 at the 8B shape, and what this run gave; None where a part was not measured."""

    def of(what: str, who: str = Ours.name) -> float | None:
        return ms.get(what, {}).get(who, {}).get("p50")

    def ratio(slow: float | None, fast: float | None) -> float | None:
        return round(slow / fast, 3) if slow and fast else None

    thought = next((what for what in ms if what.startswith("request CoT")), "")
    four = of("request K=4")
    return [
        {"text": "latent step, ms", "at_most": 3.7, "measured": of("latent step")},
        {"text": "answer token, ms", "at_most": 4.0, "measured": of("answer token")},
        {"text": "request K=4, 500 tokens, 20 answer tokens, ms", "at_most": 115, "measured": four},
        {"text": "K=4 over transformers eager", "at_least": 6, "measured": ratio(of("request K=4", Eager.name), four)},
        {"text": "K=4 over compiled", "at_least": 1.2, "measured": ratio(of("request K=4", Compiled.name), four)},
        {"text": f"K=4 over {thought or 'CoT'}, ours", "at_least": 25, "measured": ratio(of(thought), four)},
    ]


def measure_batches(record: Record, model: Qwen3VL, card: Card) -> dict[str, Any]:
    """Latent step and answer token of 1, 8 and 64 rows, each with its own context of PROMPT tokens."""
    prompt = prompt_of(model.config, PROMPT)
    rows: dict[str, Any] = {}
    batches = BATCHES if torch.cuda.is_available() else BATCHES[:2]
    ours = Ours(model, num_rows=max(batches), row_tokens=prompt.num_tokens + 16 * PAGE)
    for row in range(max(batches)):
        ours.begin(prompt, row % 5, row)  # rows of any phase
    for batch in batches:
        graphs = StepGraphs(ours.step)
        for answers in (False, True):

            def steps(graphs: StepGraphs = graphs, batch: int = batch, answers: bool = answers) -> None:
                for _ in range(4):
                    graphs.step(batch, answers)

            steps()
            synchronize(ours.device)
            measured = spread_of([time_ms(steps, ours.device) / 4 for _ in record.rounds(5)])
            dtype = "fp32" if ours.step.rows.hidden.dtype == torch.float32 else "bf16"
            cost = step_cost(model.config.decoder, answers=answers, context=prompt.num_tokens, batch=batch, dtype=dtype)
            name = f"{'answer token' if answers else 'latent step'}, {batch} rows"
            floor = cost.floor_ms(card)
            rows[name] = {"ms": measured, "floor_ms": round(floor, 5), "share": round(floor / measured["p50"], 4)}
            rows[name]["rows_per_s"] = round(1000 * batch / measured["p50"], 1)
            record.tell("batches", rows=rows)
    return {"context": prompt.num_tokens, "rows": rows}
