"""The loop with gradients against the runtime.  N samples, K latent steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

import vitalrt
from vitalrt.errors import VitalError
from vitalrt_training.data.batches import PhantomBatches, Tokens
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


def ask_some(num_pictures, num_questions):
    phantoms = [draw_phantom("test", 1, index) for index in range(num_pictures)]
    return [(phantom, ask(phantom)[:num_questions]) for phantom in phantoms]


@pytest.mark.parametrize("num_pictures, num_questions", [(2, 4), (5, 1)])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_mixed_k_in_a_padded_batch_equals_the_runtime(random_phantom, num_pictures, num_questions, padding):
    asked = ask_some(num_pictures, num_questions)
    theirs = Qwen3VLForConditionalGeneration.from_pretrained(random_phantom, dtype=torch.float32).eval()
    batch = PhantomBatches(random_phantom, seed=1, images_per_batch=2).collate(asked)
    if padding == "right":
        batch = replace(batch, prefix=pad_right(batch.prefix), question=pad_right(batch.question))
    num_steps = torch.arange(batch.num_samples) % 5
    with torch.no_grad():
        loop = run_loop(theirs, batch, num_steps)
    runtime = vitalrt.load(random_phantom, device="cpu")
    prompts = [runtime.prepare(phantom.image, sample.question) for phantom, samples in asked for sample in samples]
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
    batch = PhantomBatches(random_phantom, seed=1, images_per_batch=1).collate(ask_some(1, 1))
    with pytest.raises(VitalError, match="checkpoint=True"):
        run_loop(model, batch, torch.ones(batch.num_samples, dtype=torch.int64))
