"""The latent loop against transformers without a cache (VITAL section 3.1: z is taken after the final norm)."""

import pytest
import torch

import vitalrt


def assert_same_thought(answer: vitalrt.Answer, latents: torch.Tensor, ids: list[int], stop_ids: list[int]) -> None:
    """Latents within 1e-4 of the oracle's, relative to their size; the same answer."""
    error = (answer.latents - latents).norm(dim=1) / latents.norm(dim=1)
    assert answer.latents.shape == latents.shape
    assert float(error.max()) < 1e-4
    assert answer.token_ids == (ids[:-1] if ids[-1] in stop_ids else ids)
    assert answer.usage.latent_steps == len(latents)


@pytest.mark.parametrize("k", range(1, 9))
@pytest.mark.parametrize("grids", [[], [(1, 2, 3)], [(1, 4, 1), (1, 1, 3), (1, 2, 2)]])
def test_every_k_equals_recomputing_everything(tiny, model, k: int, grids) -> None:
    prompt = tiny.prompt(k, grids)
    latents, ids = tiny.think(prompt, k, max_new_tokens=8)
    [answer] = model.run([prompt], k=k, max_new_tokens=8)
    assert_same_thought(answer, latents, ids, tiny.stop_ids)


@pytest.mark.parametrize("seed", range(100, 112))
def test_random_shapes_in_one_batch(make_tiny, seed: int) -> None:
    tiny = make_tiny(seed, stop_ids=range(0, 80, 9), random_shape=True)
    prompts = [tiny.prompt(seed, [(1, 3, 2)], 3), tiny.prompt(seed + 1, [], 9), tiny.prompt(seed + 2, [(1, 1, 4)] * 2)]
    steps = [seed % 8 + 1, 2, 5]
    answers = tiny.model.run(prompts, k=steps, max_new_tokens=6)
    for prompt, k, answer in zip(prompts, steps, answers, strict=True):
        latents, ids = tiny.think(prompt, k, max_new_tokens=6)
        assert_same_thought(answer, latents, ids, tiny.stop_ids)


def test_the_longest_loop(tiny, model) -> None:
    prompt = tiny.prompt(1, [(1, 2, 2)])
    latents, ids = tiny.think(prompt, 64, max_new_tokens=2)
    [answer] = model.run([prompt], k=64, max_new_tokens=2)
    assert_same_thought(answer, latents, ids, tiny.stop_ids)


def test_more_steps_begin_with_the_same_steps(tiny, model) -> None:
    prompt = tiny.prompt(1, [(1, 2, 2)])
    short, long = (model.run([prompt], k=k, max_new_tokens=1)[0].latents for k in (3, 7))
    torch.testing.assert_close(short, long[:3], atol=1e-5, rtol=0)
    assert float((long[1:] - long[:-1]).norm(dim=1).min()) > 0.1  # the steps differ: the loop does something


def test_the_first_token_comes_from_the_last_latent(tiny, model) -> None:
    [answer] = model.run([tiny.prompt(1, [(1, 2, 2)])], k=4, max_new_tokens=1, return_logits=True)
    with torch.inference_mode():
        expected = tiny.reference.lm_head(answer.latents[-1:])
    torch.testing.assert_close(answer.logits, expected, atol=1e-5, rtol=1e-5)


def test_latents_are_ordinary_tensors(tiny, model) -> None:
    """They may be used in training code."""
    [answer] = model.run([tiny.prompt(1)], k=2, max_new_tokens=1)
    assert not answer.latents.is_inference()
    assert answer.latents.dtype == torch.float32
    answer.latents.requires_grad_().sum().backward()
