"""K = 0 is transformers' greedy generate, on random shapes of Qwen3-VL."""

import random

import pytest
import torch

import vitalrt
from vitalrt.engine import cpu_decoder

STOP_IDS = list(range(0, 80, 9))


def draw_prompts(tiny, seed: int, count: int = 3) -> list[vitalrt.Prompt]:
    draw = random.Random(seed)
    prompts = []
    for index in range(count):
        grids = [(1, draw.randint(1, 5), draw.randint(1, 5)) for _ in range(draw.randint(0, 3))]
        prompts.append(tiny.prompt(seed * 10 + index, grids, num_text=draw.randint(1, 20)))
    return prompts


@pytest.mark.parametrize("seed", range(36))
def test_k0_is_transformers_generate(make_tiny, monkeypatch, seed: int) -> None:
    """In turn with the decoder in the C++ core and in torch."""
    if seed % 2:
        monkeypatch.setattr(cpu_decoder, "MAX_LAYER_WEIGHTS", 0)
    tiny = make_tiny(seed, stop_ids=STOP_IDS, random_shape=True)
    assert (tiny.model.engine.cpu_decoder is None) == bool(seed % 2)
    prompts = draw_prompts(tiny, seed)
    answers = tiny.model.run(prompts, k=0, max_new_tokens=10, return_logits=True)
    for prompt, answer in zip(prompts, answers, strict=True):
        expected, logits = tiny.generate(prompt, max_new_tokens=10)
        stopped = expected[-1] in STOP_IDS
        assert answer.token_ids == (expected[:-1] if stopped else expected)
        assert answer.finish_reason == ("stop" if stopped else "length")
        assert answer.usage.completion_tokens == len(expected)
        torch.testing.assert_close(answer.logits, logits, atol=1e-4, rtol=0)
        assert answer.latents.shape == (0, tiny.reference.config.text_config.hidden_size)


def test_the_drawn_cases_are_worth_comparing(make_tiny) -> None:
    """Answers end in both ways, differ from each other, and depend on the pictures."""
    finish_reasons, answers = set(), set()
    for seed in range(8):
        tiny = make_tiny(seed, stop_ids=STOP_IDS, random_shape=True)
        for answer in tiny.model.run(draw_prompts(tiny, seed), k=0, max_new_tokens=10):
            finish_reasons.add(answer.finish_reason)
            answers.add(tuple(answer.token_ids))
        picture = tiny.prompt(1, [(1, 3, 2)])
        other = vitalrt.Prompt(picture.input_ids, -picture.pixel_values, picture.image_grid_thw)
        seen, other_seen = tiny.model.run([picture, other], k=0, max_new_tokens=1, return_logits=True)
        assert (seen.logits - other_seen.logits).abs().max() > 1e-3
    assert finish_reasons == {"stop", "length"}
    assert len(answers) > 16


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0), (1, 2, 0), ()])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_deepstack_in_any_order_and_deeper_than_the_decoder(make_tiny, order, num_layers: int) -> None:
    tiny = make_tiny(5, vision_deepstack_visual_indexes=list(order), text_num_hidden_layers=num_layers)
    prompt = tiny.prompt(3, [(1, 2, 3)])
    [answer] = tiny.model.run([prompt], k=0, max_new_tokens=4, return_logits=True)
    _, logits = tiny.generate(prompt, max_new_tokens=4)
    torch.testing.assert_close(answer.logits, logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("grids", [[(1, 4, 6)], [(1, 2, 2), (1, 8, 4), (1, 2, 2)], [(3, 4, 2), (2, 2, 6)]])
def test_vision_tower(tiny, grids) -> None:
    """Frames of one picture do not see each other, nor do pictures."""
    pixels = torch.randn(sum(t * h * w for t, h, w in grids), tiny.model.weights.config.vision.patch_dim)
    with torch.inference_mode():
        tokens, deepstack = tiny.model.weights.vision(pixels, grids)
        expected = tiny.reference.model.visual(pixels, grid_thw=torch.tensor(grids), return_dict=True)
    torch.testing.assert_close(tokens, expected.pooler_output, atol=1e-5, rtol=1e-5)
    assert len(deepstack) == len(expected.deepstack_features) == 2
    for ours, theirs in zip(deepstack, expected.deepstack_features, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(tiny, dtype) -> None:
    prompt = tiny.prompt(3, [(1, 2, 3)])
    [exact] = tiny.model.run([prompt], k=2, max_new_tokens=1, return_logits=True)
    [half] = tiny.load(dtype=dtype).run([prompt], k=2, max_new_tokens=1, return_logits=True)
    error = (half.logits - exact.logits).norm() / exact.logits.norm()
    assert 1e-6 < error < 0.05
    assert half.latents.dtype == half.logits.dtype == torch.float32
