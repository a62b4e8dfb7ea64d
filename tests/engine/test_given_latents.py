"""Thoughts that are given instead of thought: replayed, they change nothing; another's go into cache and answer.

test_schedules.py has them in company. K latent steps.
"""

from __future__ import annotations

import pytest
import torch

import vitalrt

K = 5
NUM_TOKENS = 6


@pytest.fixture(scope="module")
def prompts(tiny):
    return [tiny.prompt(1, [(1, 2, 3)]), tiny.prompt(2, num_text=11), tiny.prompt(3, [(1, 1, 2), (1, 3, 1)])]


@pytest.mark.parametrize("count", range(K + 1))
def test_its_own_thoughts_give_its_own_answer(tiny, prompts, count):
    own = tiny.model.run(prompts, k=K, max_new_tokens=NUM_TOKENS, return_logits=True)
    given = [answer.latents[:count] for answer in own]
    for latents in (given, [given[0], None, given[2]]):
        again = tiny.model.run(prompts, k=K, max_new_tokens=NUM_TOKENS, return_logits=True, latents=latents)
        for before, after in zip(own, again, strict=True):
            assert after.token_ids == before.token_ids and after.usage.latent_steps == K
            torch.testing.assert_close(after.latents, before.latents, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(after.logits, before.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [1, 3, K])
def test_anothers_are_fed_as_they_are(tiny, count):
    """Against transformers without a cache: prompt, z_0, then what was given, and the rest thought from there."""
    width = tiny.reference.config.text_config.hidden_size
    given = torch.randn(count, width, generator=torch.Generator().manual_seed(0), requires_grad=True)
    prompt = tiny.prompt(2, num_text=11)  # of text alone: positions simply count
    [answer] = tiny.model.run([prompt], k=K, max_new_tokens=2, return_logits=True, latents=[given])
    language = tiny.reference.model.language_model
    with torch.inference_mode():
        embed = tiny.reference.model.get_input_embeddings()
        inputs = embed(prompt.input_ids[None])
        thoughts = [language(inputs_embeds=inputs).last_hidden_state[0, -1], *given]
        while len(thoughts) < K + 1:
            fed = torch.cat((inputs, torch.stack(thoughts)[None]), dim=1)
            thoughts.append(language(inputs_embeds=fed).last_hidden_state[0, -1])
        first = tiny.reference.lm_head(thoughts[-1])
        fed = torch.cat((inputs, torch.stack(thoughts[:-1])[None], embed(first.argmax()[None, None])), dim=1)
        second = tiny.reference.lm_head(language(inputs_embeds=fed).last_hidden_state[0, -1])
    assert not answer.latents.requires_grad
    torch.testing.assert_close(answer.latents[:count], given.detach())
    torch.testing.assert_close(answer.latents[count:], torch.stack(thoughts[1:])[count:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(answer.logits, torch.stack((first, second)), rtol=1e-4, atol=1e-4)


def test_other_dtypes_are_taken_as_the_weights(tiny, prompts):
    """What a model in bf16 thought comes back as fp32, exactly."""
    model = tiny.load(dtype="bfloat16")
    own = model.run(prompts, k=K, max_new_tokens=NUM_TOKENS)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        given = [answer.latents.to(dtype) for answer in own]
        again = model.run(prompts, k=K, max_new_tokens=NUM_TOKENS, latents=given)
        assert [answer.token_ids for answer in again] == [answer.token_ids for answer in own]
        assert all(torch.equal(one.latents, two.latents) for one, two in zip(again, own, strict=True))


def test_nobody_else_gets_them(tiny, prompts):
    """The prefix cache keeps thoughts for whoever begins alike, and must not keep these."""
    model = tiny.load()
    before = model.run(prompts, k=K, max_new_tokens=NUM_TOKENS)
    wrong = [torch.ones_like(answer.latents) for answer in before]
    changed = model.run(prompts, k=K, max_new_tokens=NUM_TOKENS, latents=wrong)
    after = model.run(prompts, k=K, max_new_tokens=NUM_TOKENS)
    for one, two, other in zip(before, after, changed, strict=True):
        assert one.token_ids == two.token_ids
        torch.testing.assert_close(one.latents, two.latents, rtol=1e-4, atol=1e-4)
        assert other.latents.unique().tolist() == [1.0] and other.usage.cached_tokens == 0


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        ([None, None], "an entry or None for each of 3 prompts, got 2 of them"),
        (torch.zeros(3, 2, 8), "an entry or None for each of 3 prompts, got Tensor"),
        ([None, torch.zeros(K + 1, 48), None], rf"latents\[1\]: expected floats \[at most {K}, 48\]"),
        ([torch.zeros(2, 47), None, None], r"latents\[0\]: .* got torch\.float32 \[2, 47\]"),
        ([torch.zeros(2, 48, dtype=torch.int64), None, None], r"latents\[0\]: .* got torch\.int64"),
        ([[[0.0] * 48], None, None], r"latents\[0\]: .* got list"),
        ([torch.full((1, 48), torch.nan), None, None], r"latents\[0\]: expected finite"),
        ([torch.full((1, 48), 1e300, dtype=torch.float64), None, None], r"latents\[0\]: expected finite .*float32"),
        ([torch.zeros(1, 48).to_sparse(), None, None], r"latents\[0\]: expected floats"),
    ],
)
def test_bad_latents_are_refused(tiny, prompts, latents, message):
    width = tiny.reference.config.text_config.hidden_size
    assert width == 48
    with pytest.raises(vitalrt.VitalError, match=message):
        tiny.model.run(prompts, k=K, latents=latents)
