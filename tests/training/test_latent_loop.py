"""The loop with gradients: against the runtime, and against a cache-free recomputation in float64.

N samples, K latent steps.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl import modeling_qwen3_vl

import vitalrt
from vitalrt_training.backbone import generation_config, new_backbone, phantom_config, save_preprocessor
from vitalrt_training.data.batches import PhantomBatches, Tokens
from vitalrt_training.data.phantom import ask, draw_phantom
from vitalrt_training.latent_loop import run_loop
from vitalrt_training.losses import task_loss
from vitalrt_training.tokenizer import save_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A random phantom model, as a checkpoint directory."""
    directory = tmp_path_factory.mktemp("model")
    texts = [
        text for index in range(20) for s in ask(draw_phantom("train", 0, index)) for text in (s.question, s.answer)
    ]
    tokenizer = train_tokenizer(texts, 400)
    save_tokenizer(tokenizer, directory)
    save_preprocessor(directory)
    model = new_backbone(phantom_config(tokenizer), seed=0)
    model.save_pretrained(directory)
    generation_config(tokenizer).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def asked():
    phantoms = [draw_phantom("test", 1, index) for index in range(2)]
    return [(phantom, ask(phantom)[:4]) for phantom in phantoms]


def pad_right(tokens):
    """The same rows with their padding moved to the other side."""
    moved = Tokens(*(torch.zeros_like(tensor) for tensor in (tokens.ids, tokens.mask, tokens.positions)))
    for row, length in enumerate(tokens.mask.sum(-1).tolist()):
        moved.ids[row, :length] = tokens.ids[row, -length:]
        moved.mask[row, :length] = 1
        moved.positions[:, row, :length] = tokens.positions[:, row, -length:]
    return moved


@pytest.mark.parametrize("padding", ["left", "right"])
def test_mixed_k_in_a_padded_batch_equals_the_runtime(directory, asked, padding):
    theirs = Qwen3VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    batch = PhantomBatches(directory, seed=1, images_per_batch=2).collate(asked)
    if padding == "right":
        batch = replace(batch, prefix=pad_right(batch.prefix), question=pad_right(batch.question))
    num_steps = torch.arange(batch.num_samples) % 5
    with torch.no_grad():
        loop = run_loop(theirs, batch, num_steps)
    runtime = vitalrt.load(directory, device="cpu")
    prompts = [runtime.prepare(phantom.image, sample.question) for phantom, samples in asked for sample in samples]
    answers = runtime.run(prompts, k=num_steps.tolist(), max_new_tokens=1, return_logits=True)
    for row, answer in enumerate(answers):
        torch.testing.assert_close(answer.logits[0], loop.logits[row, 0], rtol=1e-4, atol=1e-4)
        own = [latent[row, 0] for latent, has_step in zip(loop.latents, loop.has_step[row], strict=True) if has_step]
        assert len(own) == num_steps[row]
        if own:
            torch.testing.assert_close(answer.latents, torch.stack(own), rtol=1e-4, atol=1e-4)


def naive_logits(model, batch, row, num_steps):
    """One sample, no padding, no cache: the whole sequence is computed anew for every latent and for the answer."""
    image = int(batch.group_of_sample[row])
    parts = [(batch.prefix, image), (batch.question, row)]
    ids = torch.cat([tokens.ids[r, tokens.mask[r] == 1] for tokens, r in parts])[None]
    positions = torch.cat([tokens.positions[:, r, tokens.mask[r] == 1] for tokens, r in parts], dim=1)[:, None]
    length = ids.shape[1]
    sizes = batch.image_grid_thw.prod(-1).tolist()
    pixels = batch.pixel_values.split(sizes)[image]
    tower = model.model.visual(pixels, grid_thw=batch.image_grid_thw[image : image + 1])
    is_image = ids == model.config.image_token_id
    embeddings = model.model.language_model.embed_tokens(ids)
    embeddings = embeddings.masked_scatter(is_image[..., None], tower.pooler_output)

    def hidden_states(embeddings, positions):
        longer = torch.zeros(1, embeddings.shape[1], dtype=torch.bool)
        longer[:, :length] = is_image
        return model.model.language_model(
            inputs_embeds=embeddings,
            position_ids=positions,
            visual_pos_masks=longer,
            deepstack_visual_embeds=list(tower.deepstack_features),
            use_cache=False,
        ).last_hidden_state

    def extended(more):
        new = torch.arange(positions.shape[2] - length, positions.shape[2] - length + more) + batch.next_position[row]
        return torch.cat((positions, new.expand(3, 1, -1)), dim=2)

    for _ in range(num_steps):
        z = hidden_states(embeddings, positions)[:, -1:]
        embeddings = torch.cat((embeddings, z), dim=1)
        positions = extended(1)
    answer = batch.answer_ids[row][batch.answer_ids[row] >= 0]
    embeddings = torch.cat((embeddings, model.model.language_model.embed_tokens(answer[None, :-1])), dim=1)
    hidden = hidden_states(embeddings, extended(len(answer) - 1))
    return model.lm_head(hidden)[0, -len(answer) :], answer


def test_gradients_equal_a_cache_free_recomputation(directory, asked, monkeypatch):
    monkeypatch.setattr(modeling_qwen3_vl.Qwen3VLTextRMSNorm, "forward", rms_norm_float64)
    model = Qwen3VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float64).eval()
    batch = PhantomBatches(directory, seed=1, images_per_batch=2).collate([(asked[0][0], asked[0][1][:3])])
    batch = replace(batch, pixel_values=batch.pixel_values.double())
    num_steps = torch.tensor([3, 0, 2])
    loop = run_loop(model, batch, num_steps)
    loss = task_loss_float64(loop.logits, batch.answer_ids)
    ours = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    pieces = [naive_logits(model, batch, row, int(steps)) for row, steps in enumerate(num_steps)]
    naive = torch.nn.functional.cross_entropy(torch.cat([p[0] for p in pieces]), torch.cat([p[1] for p in pieces]))
    theirs = torch.autograd.grad(naive, list(model.parameters()), allow_unused=True)
    torch.testing.assert_close(loss, naive, rtol=1e-10, atol=1e-10)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-8)


def rms_norm_float64(self, hidden_states):
    """transformers' norm computes in float32 whatever it is given, which alone costs 1e-7."""
    mean_square = hidden_states.square().mean(-1, keepdim=True)
    return self.weight * hidden_states * torch.rsqrt(mean_square + self.variance_epsilon)


def task_loss_float64(logits, answer_ids):
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), answer_ids.flatten(), ignore_index=-100)


def test_gradients_flow_through_every_latent(directory, asked):
    model = Qwen3VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    batch = PhantomBatches(directory, seed=1, images_per_batch=1).collate(asked)
    loop = run_loop(model, batch, torch.full((batch.num_samples,), 3))
    gradients = torch.autograd.grad(task_loss(loop.logits, batch.answer_ids).value(), loop.latents)
    assert all(gradient.abs().amax((1, 2)).min() > 0 for gradient in gradients)
