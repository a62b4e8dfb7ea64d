"""The loop with gradients against the runtime.  N samples, K latent steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

import vitalrt
from vitalrt.errors import VitalError
from vitalrt_training.data.batches import Asked, Collator, Tokens
from vitalrt_training.data.phantom import ask, draw_phantom
from vitalrt_training.latent_loop import run_loop


def pad_right(tokens):
    """The same rows with their padding moved to the other side."""
    moved = Tokens(*(torch.zeros_like(tensor) for tensor in (tokens.ids, tokens.mask, tokens.positions)))
    for row, length in enumerate(tokens.mask.sum(-1).tolist()):
        moved.ids[row, :length] = tokens.ids[row, -length:]
        moved.mask[row, :length] = 1
        moved.positions[:, row, :length] = tokens.positions[:, row, -length:]
    return moved


def ask_some(*num_questions, pictures_each=1):
    """For each number so many questions, about the next picture or pictures together."""
    phantoms = iter(draw_phantom("test", 1, index) for index in range(len(num_questions) * pictures_each))
    groups = [(number, [next(phantoms) for _ in range(pictures_each)]) for number in num_questions]
    return [
        Asked([phantom.image for phantom in shown], [(s.question, s.answer) for s in ask(shown[0])[:number]])
        for number, shown in groups
    ]


@pytest.mark.parametrize(
    "asked",
    [ask_some(4, 4), ask_some(1, 1, 1, 1, 1), ask_some(3, 1, pictures_each=2)],
    ids=["questions share a picture", "a picture each", "two pictures each"],
)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_mixed_k_in_a_padded_batch_equals_the_runtime(random_phantom, asked, padding):
    theirs = Qwen3VLForConditionalGeneration.from_pretrained(random_phantom, dtype=torch.float32).eval()
    batch = Collator(random_phantom).collate(asked)
    if padding == "right":
        batch = replace(batch, prefix=pad_right(batch.prefix), question=pad_right(batch.question))
    num_steps = torch.arange(batch.num_samples) % 5
    with torch.no_grad():
        loop = run_loop(theirs, batch, num_steps)
    runtime = vitalrt.load(random_phantom, device="cpu")
    prompts = [runtime.prepare(list(one.pictures), question) for one in asked for question, _ in one.questions]
    answers = runtime.run(prompts, k=num_steps.tolist(), max_new_tokens=1, return_logits=True)
    for row, answer in enumerate(answers):
        torch.testing.assert_close(answer.logits[0], loop.logits[row, 0], rtol=1e-4, atol=1e-4)
        own = [latent[row, 0] for latent, has_step in zip(loop.latents, loop.has_step[row], strict=True) if has_step]
        assert len(own) == num_steps[row]
        if own:
            torch.testing.assert_close(answer.latents, torch.stack(own), rtol=1e-4, atol=1e-4)


def test_transformers_own_checkpointing_is_refused(random_phantom):
    model = Qwen3VLForConditionalGeneration.from_pretrained(random_phantom).train()
    model.gradient_checkpointing_enable()
    batch = Collator(random_phantom).collate(ask_some(1))
    with pytest.raises(VitalError, match="checkpoint=True"):
        run_loop(model, batch, torch.ones(batch.num_samples, dtype=torch.int64))
