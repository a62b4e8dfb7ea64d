"""Sampling: repeatable, inside its set, distributed as it should be; and where an answer ends."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vitalrt
from vitalrt.engine.request import Decoding
from vitalrt.engine.sampling import choose_tokens, new_generator

logits_lists = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=20)


def sample(logits: torch.Tensor, count: int = 1, **options) -> list[int]:
    """`count` tokens in turn from one request's generator."""
    decoding = Decoding(k=0, **options)
    generator = new_generator(decoding)
    return [choose_tokens(logits[None], [decoding], [generator])[0] for _ in range(count)]


@settings(max_examples=150, deadline=None)
@given(
    values=logits_lists,
    temperature=st.floats(0.05, 5.0),
    top_k=st.integers(0, 25),
    top_p=st.floats(0.01, 1.0),
    seed=st.integers(0, 2**63 - 1),
)
def test_never_outside_the_set(values, temperature, top_k, top_p, seed) -> None:
    logits = torch.tensor(values)
    [token] = sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    num_better = int((logits > logits[token]).sum())
    assert not top_k or num_better < top_k
    probabilities = (logits.double() / temperature).softmax(-1).sort(descending=True).values
    if top_k:
        probabilities = probabilities[:top_k] / probabilities[:top_k].sum()
    assert num_better == 0 or float(probabilities[:num_better].sum()) < top_p + 1e-5


@settings(max_examples=50, deadline=None)
@given(values=logits_lists, seed=st.integers(0, 2**31), temperature=st.floats(0.01, 100.0))
def test_one_candidate_is_greedy(values, seed, temperature) -> None:
    logits = torch.tensor(values)
    best = float(logits.max())
    for options in ({"top_k": 1}, {"top_p": 1e-9}):
        assert float(logits[sample(logits, temperature=temperature, seed=seed, **options)]) == best


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-9, 100.0])
def test_extreme_temperatures(temperature) -> None:
    tokens = set(sample(torch.tensor([0.0, 5.0, -30.0, 4.5]), 50, temperature=temperature, seed=0))
    assert tokens == {1} if temperature < 1 else len(tokens) == 4


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_frequencies(temperature) -> None:
    logits = torch.tensor([1.0, 0.0, 2.0, -1.0, 0.5])
    count = 4000
    tokens = torch.tensor(sample(logits, count, temperature=temperature, seed=3))
    expected = (logits / temperature).softmax(-1)
    deviation = (expected * (1 - expected) / count).sqrt()
    assert bool(((tokens.bincount(minlength=5) / count - expected).abs() < 4.5 * deviation).all())


def test_a_seed_repeats_and_another_differs(tiny, model) -> None:
    prompt = tiny.prompt(1, [(1, 2, 2)])

    def ask(seed: int | None) -> list[int]:
        return model.run([prompt], k=2, max_new_tokens=20, temperature=2.0, seed=seed)[0].token_ids

    assert ask(5) == ask(5)
    assert len({tuple(ask(seed)) for seed in (5, 6, None, None)}) == 4


def test_a_seed_does_not_mind_company(tiny, model) -> None:
    prompts = [tiny.prompt(seed, [(1, 2, 2)] * (seed % 2)) for seed in range(6)]
    options = {"max_new_tokens": 12, "temperature": 1.5, "top_k": 30, "top_p": 0.9, "seed": 11}
    together = model.run(prompts, k=[0, 1, 2, 3, 4, 5], **options)
    for k, (prompt, answer) in enumerate(zip(prompts, together, strict=True)):
        assert model.run([prompt], k=k, **options)[0].token_ids == answer.token_ids


def test_greedy_and_top_k_one_agree(tiny, model) -> None:
    prompt = tiny.prompt(1, [(1, 2, 2)])
    [greedy] = model.run([prompt], k=3, max_new_tokens=12)
    [sampled] = model.run([prompt], k=3, max_new_tokens=12, temperature=1.7, top_k=1)
    assert greedy.token_ids == sampled.token_ids


def test_any_stop_token_ends_the_answer(tiny, make_tiny) -> None:
    prompt = tiny.prompt(2, [(1, 2, 2)])
    [free] = make_tiny(0, stop_ids=[]).model.run([prompt], k=1, max_new_tokens=12)
    assert free.finish_reason == "length"
    assert free.usage.completion_tokens == len(free.token_ids) == 12
    end = free.token_ids.index(free.token_ids[5])
    stopping = make_tiny(0, stop_ids=[free.token_ids[5], 79])
    [answer] = stopping.model.run([prompt], k=1, max_new_tokens=12, return_logits=True)
    assert answer.token_ids == free.token_ids[:end]
    assert answer.finish_reason == "stop"
    assert answer.usage == vitalrt.Usage(prompt.num_tokens, 0, 1, end + 1)
    assert answer.logits.shape == (end + 1, 84)
    assert answer.logits.argmax(-1).tolist() == free.token_ids[: end + 1]


@pytest.mark.parametrize("length", [1, 2, 9])
def test_max_new_tokens(tiny, make_tiny, length: int) -> None:
    [answer] = make_tiny(0, stop_ids=[]).model.run([tiny.prompt(0)], k=0, max_new_tokens=length, return_logits=True)
    assert len(answer.token_ids) == len(answer.logits) == answer.usage.completion_tokens == length
    assert answer.finish_reason == "length"
