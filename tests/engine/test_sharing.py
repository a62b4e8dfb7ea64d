"""What requests share, what they do not, and who goes first."""

from __future__ import annotations

import pytest
import torch

import vitalrt
from vitalrt.config import EngineConfig
from vitalrt.engine.request import Decoding, Terms
from vitalrt.engine.scheduler import Engine
from vitalrt.engine.sequence import Sequence

IMAGE = [(1, 4, 4)]


@pytest.fixture
def engine_of(tiny):
    """engine_of(cache_tokens=512, ...): a new engine over the tiny model."""
    return lambda **sizes: Engine(tiny.model.weights, EngineConfig(**{"cache_tokens": 512, **sizes}), tiny.stop_ids)


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """How many inputs each pass of prefill has computed so far."""
    from vitalrt.engine import scheduler

    original, counts = scheduler.prefill, []

    def counting(model, cache, chunks, *rest):
        counts.append(sum(chunk.count for chunk in chunks))
        return original(model, cache, chunks, *rest)

    monkeypatch.setattr(scheduler, "prefill", counting)
    return counts


def run(engine: Engine, *sequences: Sequence) -> None:
    while not all(sequence.is_finished for sequence in sequences):
        engine.advance()


def ask(engine: Engine, prompt: vitalrt.Prompt, k: int = 0, count: int = 3, **terms) -> Sequence:
    sequence = engine.submit(prompt, Decoding(k, count), Terms(**terms))
    run(engine, sequence)
    return sequence


def with_question(prompt: vitalrt.Prompt, ids: list[int]) -> vitalrt.Prompt:
    return vitalrt.Prompt(torch.cat((prompt.input_ids, torch.tensor(ids))), prompt.pixel_values, prompt.image_grid_thw)


def test_a_second_question_does_not_look_again(tiny, engine_of, computed) -> None:
    engine, base = engine_of(), tiny.prompt(3, IMAGE)
    first, second = (with_question(base, ids) for ids in ([1, 2, 3], [4, 5, 6, 8, 9]))
    ask(engine, first, k=2)
    again = ask(engine, second, k=2)
    statistics = engine.statistics()
    assert again.cached_tokens == base.num_tokens // 16 * 16 > 0
    assert computed == [first.num_tokens, second.num_tokens - again.cached_tokens]
    assert (statistics.images_encoded, statistics.prompt_tokens) == (1, first.num_tokens + second.num_tokens)
    assert statistics.cached_tokens == again.cached_tokens
    [alone] = tiny.load(prefix_cache=False).run([second], k=2, max_new_tokens=3)
    assert again.token_ids == alone.token_ids
    torch.testing.assert_close(torch.stack(again.latents), alone.latents, atol=1e-5, rtol=1e-5)


def test_questions_that_come_together_share_an_image(tiny, engine_of) -> None:
    """They wait for the first one's pages instead of computing the same beside it."""
    engine, base = engine_of(), tiny.prompt(3, IMAGE)
    sequences = [engine.submit(with_question(base, [n, n + 1]), Decoding(k=n, max_new_tokens=4)) for n in range(4)]
    engine.advance()
    assert engine.statistics().num_running == 4  # in one step all the same
    run(engine, *sequences)
    assert engine.statistics().images_encoded == 1
    assert [sequence.cached_tokens for sequence in sequences] == [0] + [base.num_tokens // 16 * 16] * 3


def test_other_pixels_are_another_image(tiny, engine_of) -> None:
    engine, prompt = engine_of(), tiny.prompt(3, IMAGE)
    other = vitalrt.Prompt(prompt.input_ids, prompt.pixel_values + 1e-3, prompt.image_grid_thw)
    ask(engine, prompt)
    assert ask(engine, other).cached_tokens == 0
    assert engine.statistics().images_encoded == 2


@pytest.mark.parametrize(("first", "then"), [(2, 4), (4, 2), (3, 3)])
def test_thoughts_are_shared_between_requests_of_any_k(tiny, engine_of, computed, first: int, then: int) -> None:
    engine, prompt = engine_of(page_size=1), tiny.prompt(3, IMAGE)
    one = ask(engine, prompt, k=first)
    other = ask(engine, prompt, k=then)
    num_shared = min(first, then - 1)  # the last thought is computed, for its hidden state
    assert other.cached_tokens == prompt.num_tokens
    assert computed == [prompt.num_tokens, 1]
    for k in range(num_shared + 1):
        assert torch.equal(one.thoughts[k], other.thoughts[k])
    [alone] = tiny.load(prefix_cache=False).run([prompt], k=then, max_new_tokens=3)
    assert other.token_ids == alone.token_ids
    torch.testing.assert_close(torch.stack(other.latents), alone.latents, atol=1e-5, rtol=1e-5)


def test_answers_are_not_shared(tiny, engine_of, computed) -> None:
    """Sampled ones differ, and whoever thinks longer has another past."""
    engine, prompt = engine_of(page_size=1), tiny.prompt(3)
    ask(engine, prompt, k=1, count=8)
    ask(engine, prompt, k=0, count=8)
    ask(engine, prompt, k=1, count=8)
    assert computed == [prompt.num_tokens, 1, 1]


def test_without_pages_of_their_thoughts_prompts_are_computed_again(tiny, engine_of) -> None:
    """A page of a longer prompt ends where this one does; what that one went on from is not a thought."""
    engine, long = engine_of(page_size=4), tiny.prompt(5, num_text=16)
    ask(engine, long)
    short = vitalrt.Prompt(long.input_ids[:8])
    again = ask(engine, short, k=3)
    assert again.cached_tokens == 4
    [alone] = tiny.load(prefix_cache=False).run([short], k=3, max_new_tokens=3)
    assert again.token_ids == alone.token_ids


@pytest.mark.parametrize(("one", "other", "is_shared"), [("a", "a", True), ("a", "b", False), (None, "a", False)])
def test_tenants_see_nothing_of_each_other(tiny, engine_of, one, other, is_shared) -> None:
    engine, prompt = engine_of(), tiny.prompt(3, IMAGE)
    ask(engine, prompt, cache_salt=one)
    found = ask(engine, prompt, cache_salt=other)
    assert (found.cached_tokens > 0) == is_shared
    assert engine.statistics().images_encoded == (1 if is_shared else 2)


def test_nothing_is_shared_without_the_cache(tiny, engine_of) -> None:
    engine, prompt = engine_of(prefix_cache=False), tiny.prompt(3, IMAGE)
    assert [ask(engine, prompt).cached_tokens for _ in range(2)] == [0, 0]
    statistics = engine.statistics()
    assert (statistics.images_encoded, statistics.images_found, statistics.pages_kept) == (2, 0, 0)


def test_a_long_prompt_does_not_keep_others_waiting(tiny, engine_of) -> None:
    engine = engine_of(prefill_tokens=16)
    engine.stop_ids = frozenset()
    talking = engine.submit(tiny.prompt(1), Decoding(k=0, max_new_tokens=60))
    engine.advance()
    long = engine.submit(tiny.prompt(2, num_text=160), Decoding(k=1, max_new_tokens=2))
    for piece in range(1, 11):
        engine.advance()
        assert len(talking.token_ids) == 1 + piece
        assert long.num_tokens == 16 * piece + (piece == 10)  # after the last piece comes its first step
    run(engine, talking, long)


def test_a_preempted_sequence_keeps_its_thoughts_and_tokens(tiny, engine_of) -> None:
    engine = engine_of(cache_tokens=64, page_size=4)
    low = engine.submit(tiny.prompt(1), Decoding(k=6, max_new_tokens=20), Terms(priority=1))
    for _ in range(4):
        engine.advance()
    thoughts = list(low.thoughts)
    assert len(thoughts) == 5
    first = engine.submit(tiny.prompt(2, num_text=50), Decoding(k=0, max_new_tokens=14))
    run(engine, first)
    assert low.num_preemptions == 1 and low.num_tokens == 0
    run(engine, low)
    assert all(kept is thought for kept, thought in zip(low.thoughts, thoughts, strict=False))
    assert engine.statistics().num_preemptions == 1
    [alone] = tiny.load(prefix_cache=False).run([tiny.prompt(1)], k=6, max_new_tokens=20)
    assert low.token_ids == alone.token_ids


def test_priority_then_deadline_then_arrival(tiny, engine_of) -> None:
    engine = engine_of(max_batch=1)
    terms = [Terms(), Terms(priority=-1), Terms(timeout_s=500), Terms(timeout_s=100), Terms(priority=3, timeout_s=1e6)]
    waiting = [engine.submit(tiny.prompt(n), Decoding(k=0, max_new_tokens=1), one) for n, one in enumerate(terms)]
    order = []
    while len(order) < len(waiting):
        engine.advance()
        order += [n for n, sequence in enumerate(waiting) if sequence.is_finished and n not in order]
    assert order == [1, 3, 2, 0, 4]


def test_who_has_priority_takes_a_place_in_a_full_batch(tiny, engine_of) -> None:
    engine = engine_of(max_batch=1)
    low = engine.submit(tiny.prompt(1), Decoding(k=2, max_new_tokens=30, temperature=5.0, seed=0))
    engine.advance()
    equal = engine.submit(tiny.prompt(2), Decoding(k=0, max_new_tokens=1))
    engine.advance()
    assert low.num_preemptions == 0 and not equal.is_finished
    urgent = engine.submit(tiny.prompt(3), Decoding(k=0, max_new_tokens=1), Terms(priority=-1))
    engine.advance()
    assert urgent.is_finished and low.num_preemptions == 1
    run(engine, low, equal)


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_an_answer_that_takes_too_long_ends(tiny, engine_of, steps: int) -> None:
    engine = engine_of(max_batch=1)
    late = engine.submit(tiny.prompt(1), Decoding(k=2, max_new_tokens=50, temperature=5.0, seed=0), Terms(timeout_s=60))
    for _ in range(steps):
        engine.advance()
    late.rank = late.rank._replace(deadline=0.0)
    engine.advance()
    assert (late.finish_reason, late.pages) == ("timeout", [])
    assert len(late.token_ids) == max(0, steps - 2)
    assert engine.statistics().pages_used == engine.statistics().num_waiting == 0


def test_the_line_may_be_full(tiny, engine_of) -> None:
    engine = engine_of(max_waiting=2)
    waiting = [engine.submit(tiny.prompt(n), Decoding(k=0, max_new_tokens=1)) for n in range(2)]
    with pytest.raises(vitalrt.CapacityError, match="max_waiting: expected at most 2 requests"):
        engine.submit(tiny.prompt(3), Decoding(k=0))
    run(engine, *waiting)
    ask(engine, tiny.prompt(3))


@pytest.mark.parametrize(
    ("name", "value"),
    [("priority", 1.5), ("priority", 2**31), ("timeout_s", -1), ("timeout_s", "1"), ("cache_salt", 3)],
)
def test_bad_terms_are_named(name, value) -> None:
    with pytest.raises(vitalrt.VitalError, match=f"^{name}: expected"):
        Terms(**{name: value})
