"""Whatever else is in the engine, whenever it comes and goes: every request's answer is the one it gets alone.

Random schedules: arrivals at any step, priorities, tenants, given thoughts, cancellations, caches so small that
sequences are preempted, pages and prefill pieces of any size, in C++, in torch and in the steps of a device. Answers
are compared with single runs without any sharing, token for token and latent for latent, in fp32.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch

import vitalrt
from vitalrt.config import EngineConfig
from vitalrt.engine import scheduler
from vitalrt.engine.request import Decoding, Terms
from vitalrt.engine.scheduler import Engine
from vitalrt.engine.sequence import Sequence

NUM_SCHEDULES = 1000
PATHS = ("device", "torch") + 8 * ("C++",)  # in turn
PARTS = 8  # tests, so that several processes share the work


@dataclass(frozen=True)
class Alone:
    """A request, perhaps with its first thoughts given, and what it gets without company."""

    prompt: vitalrt.Prompt
    decoding: Decoding
    given: torch.Tensor | None
    token_ids: list[int]
    latents: torch.Tensor
    finish_reason: str


@dataclass
class Arrival:
    """step: when it is submitted.  cancel_at: None, or the step before which it is cancelled."""

    expected: Alone
    terms: Terms
    step: int
    cancel_at: int | None
    sequence: Sequence | None = None


def finish(engine: Engine, sequence: Sequence) -> Sequence:
    while not sequence.is_finished:
        engine.advance()
    return sequence


@pytest.fixture(scope="module")
def requests(tiny) -> list[Alone]:
    """About a few images, with common beginnings and without, greedy and sampled."""
    engine = Engine(tiny.model.weights, EngineConfig(cache_tokens=512, prefix_cache=False), tiny.stop_ids)
    pictured = [tiny.prompt(seed, [(1, 3, 3)] * (1 + seed % 2), num_text=4 + seed) for seed in range(3)]
    prompts = [tiny.prompt(7, num_text=30), tiny.prompt(8, num_text=1), *pictured]
    for base in pictured:  # other questions about the same images
        for seed in (1, 2):
            question = torch.tensor([random.Random(seed).randrange(80) for _ in range(3 * seed)])
            ids = torch.cat((base.input_ids, question))
            prompts.append(vitalrt.Prompt(ids, base.pixel_values, base.image_grid_thw))
    found: list[Alone] = []
    draw, width = random.Random(0), tiny.reference.config.text_config.hidden_size
    for prompt in prompts:
        for k in (0, draw.randint(1, 3), draw.randint(4, 9)):
            decoding = Decoding(k, max_new_tokens=draw.randint(1, 12))
            if draw.random() < 0.3:
                decoding = replace(decoding, temperature=1.2, top_p=0.95, seed=draw.randrange(1000))
            given = None
            if k and draw.random() < 0.3:
                given = torch.randn(draw.randint(1, k), width, generator=torch.Generator().manual_seed(len(found)))
            one = finish(engine, engine.submit(prompt, decoding, None, given))
            latents = torch.stack(one.latents) if one.latents else torch.empty(0)
            assert one.finish_reason in ("stop", "length")
            found.append(Alone(prompt, decoding, given, one.token_ids, latents, one.finish_reason))
    return found


def random_schedule(draw: random.Random, requests: list[Alone]) -> tuple[EngineConfig, list[Arrival]]:
    """An engine just large enough for the longest of a few requests, or somewhat larger."""
    chosen = draw.choices(requests, k=draw.randint(2, 7))
    page_size = draw.choice([1, 2, 4, 16])
    longest = max(one.prompt.num_tokens + one.decoding.k + one.decoding.max_new_tokens - 1 for one in chosen)
    config = EngineConfig(
        cache_tokens=longest + draw.choice([0, 8, 40, 400]),
        page_size=page_size,
        max_batch=draw.randint(1, 6),
        prefill_tokens=draw.choice([3, 16, 2048]),
        prefix_cache=draw.random() < 0.85,
        vision_cache_bytes=draw.choice([0, 1 << 20]),
    )
    arrivals = []
    for one in chosen:
        terms = Terms(priority=draw.choice([0, 0, 0, 1, -1]), cache_salt=draw.choice([None, None, "tenant"]))
        step = draw.choice([0, 0, draw.randint(0, 15)])
        cancel_at = step + draw.randint(0, 12) if draw.random() < 0.15 else None
        arrivals.append(Arrival(one, terms, step, cancel_at))
    return config, arrivals


def run_schedule(tiny, config: EngineConfig, arrivals: list[Arrival], path: str) -> Engine:
    with pytest.MonkeyPatch.context() as patch:
        if path == "device":
            patch.setattr(scheduler, "why_not_device_step", lambda decoder: None)
        if path != "C++":
            patch.setattr(scheduler, "why_not_cpu_decoder", lambda decoder: f"{path} is to be tested")
        engine = Engine(tiny.model.weights, config, tiny.stop_ids)
    step = 0
    while any(arrival.sequence is None or not arrival.sequence.is_finished for arrival in arrivals):
        for arrival in arrivals:
            if arrival.step == step:
                one = arrival.expected
                arrival.sequence = engine.submit(one.prompt, one.decoding, arrival.terms, one.given)
            if arrival.cancel_at == step and arrival.sequence is not None:
                engine.cancel(arrival.sequence)
        engine.advance()
        engine.cache.prefixes.check_integrity()
        step += 1
        assert step < 1000, "somebody starves"
    return engine


@pytest.mark.parametrize("part", range(PARTS))
def test_everybody_gets_what_they_get_alone(tiny, requests, part: int) -> None:
    seen: Counter[str] = Counter()
    for seed in range(part, NUM_SCHEDULES, PARTS):
        config, arrivals = random_schedule(random.Random(seed), requests)
        engine = run_schedule(tiny, config, arrivals, PATHS[seed // PARTS % len(PATHS)])
        for arrival in arrivals:
            sequence, expected = arrival.sequence, arrival.expected
            assert sequence is not None
            seen[sequence.finish_reason or ""] += 1
            if sequence.finish_reason == "cancelled":
                assert arrival.cancel_at is not None
                assert sequence.token_ids == expected.token_ids[: len(sequence.token_ids)]
                continue
            assert sequence.token_ids == expected.token_ids, f"schedule {seed}"
            assert sequence.finish_reason == expected.finish_reason
            if expected.decoding.k:
                latents = torch.stack(sequence.latents)
                error = (latents - expected.latents).norm(dim=1) / expected.latents.norm(dim=1)
                assert latents.shape == expected.latents.shape
                assert float(error.max()) < 1e-4, f"schedule {seed}"
        statistics = engine.statistics()
        assert statistics.pages_used == statistics.num_running == statistics.num_waiting == 0
        seen["preempted"] += statistics.num_preemptions
        seen["given, preempted"] += sum(
            a.sequence.num_preemptions for a in arrivals if a.sequence is not None and a.expected.given is not None
        )
        seen["found"] += statistics.cached_tokens
        seen["images found"] += statistics.images_found
    # The schedules do what they are for.
    events = ("stop", "length", "cancelled", "preempted", "given, preempted", "found", "images found")
    assert min(seen[event] for event in events) >= 5, seen
