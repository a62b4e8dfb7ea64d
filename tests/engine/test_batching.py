"""Many sequences at once are each what they are alone."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vitalrt

GRIDS = [[], [(1, 2, 3)], [(1, 1, 1), (1, 3, 2)], [(1, 4, 4)]]


def mixed_prompts(tiny, count: int) -> tuple[list[vitalrt.Prompt], list[int]]:
    prompts = [tiny.prompt(seed, GRIDS[seed % 4], num_text=1 + seed * 5 % 17) for seed in range(count)]
    return prompts, [seed * 4 % 9 for seed in range(count)]


def assert_equal_answers(got: vitalrt.Answer, alone: vitalrt.Answer) -> None:
    assert got.token_ids == alone.token_ids
    assert got.finish_reason == alone.finish_reason
    assert replace(got.usage, cached_tokens=0) == replace(alone.usage, cached_tokens=0)
    # A step of a random model makes the rounding of the one before larger: in eight of them from 2e-6 to 1.5e-5.
    torch.testing.assert_close(got.latents, alone.latents, atol=5e-5, rtol=5e-5)


@pytest.fixture(scope="module")
def alone(tiny) -> list[vitalrt.Answer]:
    prompts, steps = mixed_prompts(tiny, 18)
    return [tiny.model.run([prompt], k=k, max_new_tokens=7)[0] for prompt, k in zip(prompts, steps, strict=True)]


@pytest.mark.parametrize(
    "engine",
    [
        {},
        {"max_batch": 1},
        {"max_batch": 4},
        {"cache_tokens": 64},  # room for one or two at a time
        {"cache_tokens": 160, "max_batch": 5},
    ],
)
def test_batch_equals_singles_in_order(tiny, alone, assert_nothing_held, engine) -> None:
    model = tiny.load(**engine)
    prompts, steps = mixed_prompts(tiny, 18)
    answers = model.run(prompts, k=steps, max_new_tokens=7)
    assert len(answers) == len(alone)
    for got, expected in zip(answers, alone, strict=True):
        assert_equal_answers(got, expected)
    assert_nothing_held(model)


@settings(max_examples=25, deadline=None)
@given(
    chosen=st.lists(st.tuples(st.integers(0, 17), st.integers(0, 8), st.integers(1, 9)), min_size=1, max_size=8),
    max_batch=st.integers(1, 4),
    extra_pages=st.integers(0, 4),
)
def test_any_mix_equals_singles(tiny, chosen, max_batch, extra_pages) -> None:
    """One engine run of arbitrary prompts, k and lengths, in a cache as small as the longest of them needs."""
    prompts, _ = mixed_prompts(tiny, 18)
    needed = max(prompts[index].num_tokens + k + length - 1 for index, k, length in chosen)
    model = tiny.load(cache_tokens=needed + extra_pages * 16, max_batch=max_batch)
    decodings = [vitalrt.engine.request.Decoding(k, length) for _, k, length in chosen]
    terms = [vitalrt.Terms()] * len(chosen)
    answers = model._answers([prompts[index] for index, _, _ in chosen], decodings, terms, decode=False)
    for (index, k, length), answer in zip(chosen, answers, strict=True):
        [expected] = tiny.model.run([prompts[index]], k=k, max_new_tokens=length)
        assert_equal_answers(answer, expected)


def test_long_prompts_go_through_prefill_in_pieces(tiny) -> None:
    """Cut anywhere: within an image too."""
    prompts = [tiny.prompt(seed, [(1, 3, 3)], num_text=30) for seed in range(5)]
    expected = [tiny.model.run([prompt], k=2, max_new_tokens=3)[0] for prompt in prompts]
    for prefill_tokens in (1, 7, 50):
        model = tiny.load()
        model.engine.config = replace(model.engine.config, prefill_tokens=prefill_tokens)
        for got, alone in zip(model.run(prompts, k=2, max_new_tokens=3), expected, strict=True):
            assert_equal_answers(got, alone)


def test_threads_share_a_batch_and_get_their_own_answers(tiny, alone, assert_nothing_held) -> None:
    model = tiny.load(max_batch=6, cache_tokens=512)
    prompts, steps = mixed_prompts(tiny, 18)
    start = threading.Barrier(6)

    def work(thread: int) -> list[vitalrt.Answer]:
        start.wait()
        own = range(thread, 18, 6)
        return [
            model.run([prompts[index]], k=steps[index], max_new_tokens=7)[0] for index in own for _ in range(2)
        ]  # twice each, so that threads meet in all phases

    with ThreadPoolExecutor(6) as threads:
        results = list(threads.map(work, range(6)))
    for thread, answers in enumerate(results):
        for position, answer in enumerate(answers):
            assert_equal_answers(answer, alone[thread + 6 * (position // 2)])
    assert_nothing_held(model)
