"""The KV cache: taken once, written in place, given back whatever happens, refused before work begins."""

import pytest
import torch

import vitalrt
from vitalrt.engine.request import Decoding


def test_sizes(tiny) -> None:
    cache = tiny.load(cache_tokens=50).engine.cache
    assert cache.num_tokens == 64  # whole pages of 16
    assert cache.k.shape == cache.v.shape == (3, 64, 2, 16)
    assert cache.num_bytes == cache.k.nbytes + cache.v.nbytes
    assert tiny.load(cache_tokens=None).engine.cache.num_tokens == 32768
    assert tiny.load(cache_tokens=64, dtype="float16").engine.cache.num_bytes == cache.num_bytes // 2


def test_a_run_appends_in_place_and_touches_nothing_else(tiny) -> None:
    model = tiny.load(cache_tokens=256)
    cache = model.engine.cache
    pointers = cache.k.data_ptr(), cache.v.data_ptr()
    cache.k.fill_(12.5)
    cache.v.fill_(-3.25)
    prompt = tiny.prompt(1, [(1, 2, 2)])
    sequence = model.engine.submit(prompt, Decoding(k=3, max_new_tokens=24))
    written_before = set()
    while sequence.num_tokens < sequence.capacity:
        model.engine.advance()
        written = set((cache.k != 12.5).all(dim=(0, 2, 3)).nonzero().flatten().tolist())
        assert written >= written_before
        assert written == set(sequence.slots[: sequence.num_tokens].tolist())  # one slot per token, latent or not
        assert len(written - written_before) == (1 if written_before else prompt.num_tokens + 1)
        assert len(sequence.pages) == -(-sequence.num_tokens // 16)  # pages as they are needed
        written_before = written
    model.engine.cancel(sequence)
    untouched = [slot for slot in range(cache.num_tokens) if slot not in written_before]
    assert bool((cache.k[:, untouched] == 12.5).all()) and bool((cache.v[:, untouched] == -3.25).all())
    assert (cache.k.data_ptr(), cache.v.data_ptr()) == pointers


def test_a_running_sequence_keeps_its_past(tiny, model) -> None:
    """What a prompt left in the cache is bit-identical after later steps and after another sequence came and went."""
    engine = model.engine
    sequence = engine.submit(tiny.prompt(1, [(1, 2, 2)]), Decoding(k=6, max_new_tokens=4))
    engine.advance()
    past = sequence.slots[: sequence.num_tokens]
    before = engine.cache.k[:, past].clone(), engine.cache.v[:, past].clone()
    model.run([tiny.prompt(2, [(1, 3, 3)])], k=1, max_new_tokens=2)
    assert sequence.num_tokens > len(past)
    assert torch.equal(engine.cache.k[:, past], before[0])
    assert torch.equal(engine.cache.v[:, past], before[1])
    engine.cancel(sequence)


def test_what_lies_in_unused_slots_does_not_matter(tiny) -> None:
    """Fresh memory may hold NaN, and so may what a broken sequence left behind."""
    prompts = [tiny.prompt(seed, num_text=3 + 20 * seed) for seed in range(3)]
    expected = tiny.model.run(prompts, k=2, max_new_tokens=5)
    model = tiny.load(cache_tokens=512)
    model.engine.cache.k.fill_(float("nan"))
    model.engine.cache.v.fill_(float("nan"))
    for answer, clean in zip(model.run(prompts, k=2, max_new_tokens=5), expected, strict=True):
        assert answer.token_ids == clean.token_ids
        torch.testing.assert_close(answer.latents, clean.latents, atol=1e-5, rtol=1e-5)


def test_too_long_is_refused_before_any_work(tiny, assert_nothing_held, monkeypatch) -> None:
    model = tiny.load(cache_tokens=32)
    fits = tiny.prompt(0, num_text=20)
    [answer] = model.run([fits], k=4, max_new_tokens=9)  # 20 + 4 + 9 - 1 = 32: the last token is never fed back
    assert answer.usage.prompt_tokens == 20
    monkeypatch.setattr("vitalrt.engine.scheduler.prefill", None)  # calling it would be a TypeError
    for options in ({"k": 5, "max_new_tokens": 9}, {"k": 4, "max_new_tokens": 10}, {"k": 0, "max_new_tokens": 2**31}):
        with pytest.raises(vitalrt.CapacityError, match=r"^cache_tokens: the request needs .* the engine has 32"):
            model.run([tiny.prompt(1), fits], **options)
        assert_nothing_held(model)


class Interrupted(BaseException):
    """Like KeyboardInterrupt, which no `except Exception` sees."""


@pytest.mark.parametrize("error", [RuntimeError, Interrupted])
@pytest.mark.parametrize("calls", range(8))
@pytest.mark.parametrize("place", ["vitalrt.engine.scheduler.prefill", "vitalrt.engine.step.decode_attention"])
def test_an_error_anywhere_frees_everything(tiny, assert_nothing_held, monkeypatch, place, calls, error) -> None:
    model = tiny.load(cache_tokens=128, max_batch=2)
    module, _, name = place.rpartition(".")
    original = getattr(__import__(module, fromlist=[name]), name)
    remaining = calls

    def failing(*args):
        nonlocal remaining
        if not remaining:
            raise error("out of luck")
        remaining -= 1
        return original(*args)

    prompts = [tiny.prompt(seed, [(1, 2, 2)]) for seed in range(20)]
    with monkeypatch.context() as patch:
        patch.setattr(model.engine, "cpu_decoder", None)  # steps in torch have the most places to fail
        patch.setattr(place, failing)
        with pytest.raises(error, match="out of luck"):
            model.run(prompts, k=[0, 3] * 10, max_new_tokens=3)
    assert_nothing_held(model)
    [after], [clean] = (m.run(prompts[:1], k=3, max_new_tokens=3) for m in (model, tiny.model))
    assert after.token_ids == clean.token_ids


def test_half_a_step_cancels_everybody_in_it(tiny, assert_nothing_held, monkeypatch) -> None:
    """Others in the batch would go on from a cache and tokens that no longer agree."""
    model = tiny.load(cache_tokens=256)
    sequences = [model.engine.submit(tiny.prompt(seed), Decoding(k=seed, max_new_tokens=5)) for seed in range(3)]
    model.engine.advance()
    waiting = model.engine.submit(tiny.prompt(4), Decoding(k=0))
    model.engine.cancel(waiting)
    with monkeypatch.context() as patch:
        patch.setattr(model.engine, "cpu_decoder", None)
        patch.setattr("vitalrt.engine.step.decode_attention", None)
        with pytest.raises(TypeError):
            model.engine.advance()
    assert {sequence.finish_reason for sequence in sequences} == {"cancelled"}
    assert_nothing_held(model)


@pytest.mark.parametrize("num_steps", range(7))
def test_cancelling_at_any_time(tiny, assert_nothing_held, num_steps: int) -> None:
    model = tiny.load(cache_tokens=96, max_batch=2)
    prompts = [tiny.prompt(seed, [(1, 2, 2)]) for seed in range(4)]
    expected = tiny.model.run(prompts, k=2, max_new_tokens=3)
    sequences = [model.engine.submit(prompt, Decoding(k=2, max_new_tokens=3)) for prompt in prompts]
    for _ in range(num_steps):
        model.engine.advance()
    for sequence in sequences[::2]:
        model.engine.cancel(sequence)
        model.engine.cancel(sequence)  # again: nothing happens
    while not all(sequence.is_finished for sequence in sequences):
        model.engine.advance()
    for sequence, answer in list(zip(sequences, expected, strict=True))[1::2]:
        assert sequence.token_ids == answer.token_ids
    assert_nothing_held(model)
