"""The engine with its step on the device, through the kernels' references, against the engine without it."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

import vitalrt
from vitalrt.describe import describe_model
from vitalrt.engine import device_step, scheduler
from vitalrt.engine.device_prefill import DevicePrefill
from vitalrt.engine.device_step import DeviceStep, why_not_device_step
from vitalrt.engine.graphs import TokenReader
from vitalrt.engine.request import Decoding
from vitalrt.model.decoder import Decoder

GRIDS = [[], [(1, 2, 3)], [(1, 1, 1), (1, 3, 2)]]


@pytest.fixture
def load_on_device(tiny, monkeypatch: pytest.MonkeyPatch, assert_nothing_held):
    """load(**options): a model whose engine takes the path of a GPU; all its pages must be free afterwards."""
    loaded: list[vitalrt.Model] = []

    def load(**options) -> vitalrt.Model:
        with monkeypatch.context() as patch:
            patch.setattr(scheduler, "why_not_device_step", lambda decoder: None)
            patch.setattr(scheduler, "why_not_cpu_decoder", lambda decoder: "the device step is to be tested")
            loaded.append(tiny.load(**options))
        assert loaded[-1].engine.device_graphs is not None
        return loaded[-1]

    yield load
    for model in loaded:
        assert_nothing_held(model)


def prompts_of(tiny, count: int) -> list[vitalrt.Prompt]:
    return [tiny.prompt(seed, GRIDS[seed % 3], num_text=1 + seed * 5 % 17) for seed in range(count)]


def assert_alike(got: vitalrt.Answer, expected: vitalrt.Answer) -> None:
    assert got.token_ids == expected.token_ids and got.finish_reason == expected.finish_reason
    assert got.usage.completion_tokens == expected.usage.completion_tokens
    torch.testing.assert_close(got.latents, expected.latents, atol=1e-4, rtol=1e-4)
    if expected.logits is not None:
        torch.testing.assert_close(got.logits, expected.logits, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("return_logits", [True, False], ids=["logits", "ahead"])
@pytest.mark.parametrize("options", [{}, {"max_batch": 3}, {"cache_tokens": 96, "max_batch": 4}])
def test_mixed_requests(tiny, load_on_device, options, return_logits) -> None:
    """Joining, leaving, growing and, in a small cache, preemption."""
    prompts, steps = prompts_of(tiny, 10), [seed * 4 % 7 for seed in range(10)]
    asked = {"k": steps, "max_new_tokens": 20, "return_logits": return_logits}
    model = load_on_device(**options)
    for got, one in zip(model.run(prompts, **asked), tiny.model.run(prompts, **asked), strict=True):
        assert_alike(got, one)
    if "cache_tokens" in options:
        assert model.engine.statistics().num_preemptions > 0


def test_alone_and_sampling(tiny, load_on_device) -> None:
    """A lone prompt takes the prefill of the device; sampled tokens come from the host."""
    model = load_on_device()
    for seed, prompt in enumerate(prompts_of(tiny, 4)):
        options = {"k": seed, "max_new_tokens": 9, "temperature": 0.8 * (seed % 2), "seed": seed}
        assert_alike(model.run([prompt], **options)[0], tiny.model.run([prompt], **options)[0])


def test_a_prefix_that_is_cached(tiny, load_on_device) -> None:
    model = load_on_device()
    prompt = tiny.prompt(7, [(1, 4, 4)], num_text=20)
    for k in (4, 2, 4):
        answer = model.run([prompt], k=k, max_new_tokens=6)[0]
        assert_alike(answer, tiny.model.run([prompt], k=k, max_new_tokens=6)[0])
    assert answer.usage.cached_tokens > 0


def test_what_is_left_of_later_questions_is_one_pass(tiny, load_on_device, monkeypatch) -> None:
    """Three questions about one image: only their own tokens are computed, all in one call of what is captured."""
    model, sizes = load_on_device(), []
    go_on = DevicePrefill.go_on
    monkeypatch.setattr(
        DevicePrefill, "go_on", lambda self, x, *rest: (sizes.append(len(x.embeddings)), go_on(self, x, *rest))[1]
    )
    base = tiny.prompt(7, [(1, 4, 4)], num_text=14)
    questions = [
        vitalrt.Prompt(torch.cat((base.input_ids, torch.tensor(ids))), base.pixel_values, base.image_grid_thw)
        for ids in ([1, 2], [3, 4, 5, 6, 7, 8, 9], [2])
    ]
    asked = {"k": [2, 0, 3], "max_new_tokens": 6, "return_logits": True}
    model.run([base], k=1, max_new_tokens=1)
    held = base.num_tokens // model.engine.cache.page_size * model.engine.cache.page_size
    assert sizes == [], "a lone prompt is begun"
    answers = model.run(questions, **asked)
    assert sizes == [sum(question.num_tokens - held for question in questions)]
    assert [answer.usage.cached_tokens for answer in answers] == [held] * 3
    for got, alone in zip(answers, tiny.model.run(questions, **asked), strict=True):
        assert_alike(got, alone)


@pytest.mark.parametrize(
    "options",
    [
        {"prefill_tokens": 5},
        {"prefill_tokens": 23, "cache_tokens": 160, "max_batch": 5},
        {"prefill_tokens": 60, "max_batch": 40},
    ],
)
@pytest.mark.parametrize("seed", range(2))
def test_pieces_of_any_prompts(tiny, load_on_device, monkeypatch, options, seed: int) -> None:
    """Of new prompts and of those that are cached in part, with images inside them, alone and together."""
    draw, kinds = random.Random(seed), set[tuple[bool, bool]]()
    go_on = DevicePrefill.go_on

    def watched(self, inputs, slots, pages, reach):
        kinds.add((inputs.image_rows is not None, len({*map(tuple, pages.tolist())}) > 1))
        return go_on(self, inputs, slots, pages, reach)

    monkeypatch.setattr(DevicePrefill, "go_on", watched)
    questions = []
    for _ in range(12):
        base = tiny.prompt(draw.randrange(3), GRIDS[draw.randrange(3)], num_text=draw.randint(1, 17))
        ids = torch.cat((base.input_ids, torch.tensor([draw.randrange(1, 9) for _ in range(draw.randint(1, 11))])))
        questions.append(vitalrt.Prompt(ids, base.pixel_values, base.image_grid_thw))
    asked = {"k": [draw.randrange(5) for _ in questions], "max_new_tokens": 8, "return_logits": bool(seed)}
    model = load_on_device(**{name: size for name, size in options.items() if name != "prefill_tokens"})
    model.engine.config = replace(model.engine.config, **options)
    for got, alone in zip(model.run(questions, **asked), tiny.model.run(questions, **asked), strict=True):
        assert_alike(got, alone)
    assert {has_images for has_images, _ in kinds} == {True, False} and any(has_many for _, has_many in kinds)


def test_a_token_is_looked_at_when_the_next_step_is_under_way(tiny, load_on_device, monkeypatch) -> None:
    model, events = load_on_device(), []
    step, take = DeviceStep.step, TokenReader.take
    monkeypatch.setattr(DeviceStep, "step", lambda self, *args: (events.append("step"), step(self, *args)))
    monkeypatch.setattr(TokenReader, "take", lambda self: (events.append("take"), take(self))[1])
    answer = model.run([tiny.prompt(2)], k=3, max_new_tokens=4)[0]
    assert answer.finish_reason == "length"
    # A thought is nothing to look at, but a step has its turn; the last token is fed to nobody.
    assert events == ["step", "take"] * (3 + 3) + ["take"]
    events.clear()
    model.engine.stop_ids = frozenset(answer.token_ids[2:3]) - frozenset(answer.token_ids[:2])
    assert model.engine.stop_ids
    assert model.run([tiny.prompt(2)], k=3, max_new_tokens=4)[0].finish_reason == "stop"
    assert events == ["step", "take"] * (3 + 3)  # the stop token was fed, for nothing


def test_whoever_asks_for_more_than_tokens_is_answered_step_by_step(tiny, load_on_device, monkeypatch) -> None:
    """One that samples makes the whole batch wait for the host; when it has left, the others run ahead again."""
    model, takes = load_on_device(), []
    take = TokenReader.take
    monkeypatch.setattr(TokenReader, "take", lambda self: (takes.append(len(engine._batch.sequences)), take(self))[1])
    engine, prompts = model.engine, prompts_of(tiny, 3)
    decodings = [Decoding(2, 12), Decoding(1, 4, temperature=1.0, seed=3), Decoding(0, 9)]
    running = [engine.submit(prompt, decoding) for prompt, decoding in zip(prompts, decodings, strict=True)]
    while not all(sequence.is_finished for sequence in running):
        engine.advance()
    assert takes and set(takes) <= {1, 2}
    for sequence, prompt, decoding in zip(running, prompts, decodings, strict=True):
        options = {"k": decoding.k, "max_new_tokens": decoding.max_new_tokens}
        [alone] = tiny.model.run([prompt], temperature=decoding.temperature, seed=decoding.seed, **options)
        assert tuple(sequence.token_ids) == tuple(alone.token_ids)


@pytest.mark.parametrize("when", range(1, 8))
def test_leaving_and_coming_at_any_moment(tiny, load_on_device, when: int) -> None:
    model = load_on_device()
    engine, prompts = model.engine, prompts_of(tiny, 4)
    running = [engine.submit(prompt, Decoding(2, 8)) for prompt in prompts[:3]]
    for _ in range(when):
        engine.advance()
    engine.cancel(running[1])
    running.append(engine.submit(prompts[3], Decoding(1, 8)))
    while not all(sequence.is_finished for sequence in running):
        engine.advance()
    for sequence, prompt in zip(running, prompts, strict=True):
        [alone] = tiny.model.run([prompt], k=sequence.decoding.k, max_new_tokens=8)
        said = list(alone.token_ids)
        assert sequence.token_ids == (said if sequence is not running[1] else said[: len(sequence.token_ids)])


def test_why_not(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = tiny.model.weights.decoder
    assert "cpu tensors take the torch form" in why_not_device_step(decoder)
    monkeypatch.setattr(device_step, "why_not_triton", lambda device: None)
    assert why_not_device_step(decoder) is None
    assert "float64" in why_not_device_step(Decoder(decoder.config).double())
    with torch.device("meta"):
        wide = Decoder(replace(decoder.config, head_dim=512))
    assert "wider than 256" in why_not_device_step(wide)


def test_what_info_tells(load_on_device, tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from vitalrt_kernels.gpu import overlap

    assert "in torch: cpu tensors" in describe_model(tiny.model)["gpu step"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card that nobody has tuned")
    told = describe_model(load_on_device())
    assert "launches one after the other" in told["gpu step"] and "0 shapes for this card" in told["gpu step"]
    assert told["pictures"] == "cut on the CPU, by Pillow"
    monkeypatch.setattr(overlap, "can_overlap", lambda device: True)
    assert "set up beside the one before" in describe_model(load_on_device())["gpu step"]
