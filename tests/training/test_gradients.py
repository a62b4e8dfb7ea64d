"""Gradients of every loss, through latents, cache and checkpointing, against a recomputation without any cache.

N samples, K latent steps, d width.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy, gelu, layer_norm
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3VLForConditionalGeneration
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.qwen3_vl import modeling_qwen3_vl

from vitalrt.model.scaffold import Scaffold
from vitalrt_training.adapter import AdapterConfig, attach_adapter
from vitalrt_training.data.batches import PhantomBatches, pad_targets
from vitalrt_training.data.phantom import ask, draw_phantom
from vitalrt_training.latent_loop import run_loop
from vitalrt_training.losses import LossConfig, task_loss
from vitalrt_training.paradigms.vital import VitalBatch, VitalModel

FEATURE_WIDTH = 12
NUM_STEPS = torch.tensor([3, 0, 2, 1])
GROUPINGS = [(3, 1), (1, 1, 1, 1)]
HAS_ROI = torch.tensor([True, True, True, False])


def vital_model(directory, dropout=0.0):
    """A VITAL model of which everything is trained, adapter included, and nothing starts at zero."""
    torch.manual_seed(0)
    backbone = Qwen3VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    backbone = attach_adapter(backbone, AdapterConfig(rank=4, alpha=8, dropout=dropout)).requires_grad_(True)
    for name, parameter in backbone.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    decoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
        )
    )
    width = backbone.config.get_text_config().hidden_size
    return VitalModel(backbone, Scaffold.build("res_mlp_ln", width, FEATURE_WIDTH, decoder), LossConfig())


def vital_batch(directory, questions_per_picture):
    """Four samples of mixed K, about one picture per entry of questions_per_picture; the last has no ROI feature."""
    phantoms = [draw_phantom("test", 1, index) for index in range(len(questions_per_picture))]
    prompt = PhantomBatches(directory, seed=1, images_per_batch=1).collate(
        [(phantom, ask(phantom)[:number]) for phantom, number in zip(phantoms, questions_per_picture, strict=True)]
    )
    chains = [
        [[5 + row + step, *range(step + 1)] if step < num_steps else [] for step in range(int(NUM_STEPS.max()))]
        for row, num_steps in enumerate(NUM_STEPS.tolist())
    ]
    chain_ids = pad_targets([ids for chain in chains for ids in chain]).view(len(NUM_STEPS), int(NUM_STEPS.max()), -1)
    roi = torch.randn(len(NUM_STEPS), FEATURE_WIDTH, generator=torch.Generator().manual_seed(2))
    return VitalBatch(prompt, NUM_STEPS, chain_ids, roi, HAS_ROI, None, [str(row) for row in range(len(NUM_STEPS))])


@pytest.fixture(scope="module")
def in_float64():
    """Norms and losses compute in float32 whatever they are given, which alone costs 1e-7."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_qwen3_vl.Qwen3VLTextRMSNorm, "forward", rms_norm)
        patch.setattr(modeling_qwen3.Qwen3RMSNorm, "forward", rms_norm)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


def rms_norm(self, hidden_states):
    mean_square = hidden_states.square().mean(-1, keepdim=True)
    return self.weight * hidden_states * torch.rsqrt(mean_square + self.variance_epsilon)


def naive_loop(model, batch, row, num_steps):
    """One sample, no padding, no cache: the whole sequence is computed anew for every latent and for the answer.

    Returns z_0, [z_1..z_K], the answer's logits [A, vocab] and its ids [A].
    """
    image = int(batch.group_of_sample[row])
    parts = [(batch.prefix, image), (batch.question, row)]
    ids = torch.cat([tokens.ids[r, tokens.mask[r] == 1] for tokens, r in parts])[None]
    positions = torch.cat([tokens.positions[:, r, tokens.mask[r] == 1] for tokens, r in parts], dim=1)[:, None]
    length = ids.shape[1]
    sizes = batch.image_grid_thw.prod(-1).tolist()
    pixels = batch.pixel_values.split(sizes)[image]
    tower = model.model.visual(pixels, grid_thw=batch.image_grid_thw[image : image + 1])
    is_image = ids == model.config.image_token_id
    embed = model.model.language_model.embed_tokens
    embeddings = embed(ids).masked_scatter(is_image[..., None], tower.pooler_output)

    def hidden_states(embeddings):
        num_new = embeddings.shape[1] - length
        following = batch.next_position[row] + torch.arange(num_new)
        longer = torch.zeros(1, embeddings.shape[1], dtype=torch.bool)
        longer[:, :length] = is_image
        return model.model.language_model(
            inputs_embeds=embeddings,
            position_ids=torch.cat((positions, following.expand(3, 1, -1)), dim=2),
            visual_pos_masks=longer,
            deepstack_visual_embeds=list(tower.deepstack_features),
            use_cache=False,
        ).last_hidden_state

    z = [hidden_states(embeddings)[:, -1:]]
    for _ in range(num_steps):
        embeddings = torch.cat((embeddings, z[-1]), dim=1)
        z.append(hidden_states(embeddings)[:, -1:])
    answer = batch.answer_ids[row][batch.answer_ids[row] >= 0]
    written = hidden_states(torch.cat((embeddings, embed(answer[None, :-1])), dim=1))[:, embeddings.shape[1] :]
    return z[0], z[1:], model.lm_head(torch.cat((z[-1], written), dim=1))[0], answer


def naive_losses(scaffold, batch, loops):
    """Each loss as the paper defines it, sample by sample and step by step.  loops: of naive_loop, every sample's."""
    text, visual = [], []
    decoder, projector = scaffold.text_decoder, scaffold.projector
    for row, (_, latents, _, _) in enumerate(loops):
        words, distances = [], []
        for step, z in enumerate(latents):
            ids = batch.chain_ids[row, step][batch.chain_ids[row, step] >= 0]
            inputs = torch.cat((scaffold.pj_in(z), decoder.get_input_embeddings()(ids[None, :-1])), dim=1)
            words.append(cross_entropy(decoder(inputs_embeds=inputs, use_cache=False).logits[0], ids))
            norm_in, norm_out = projector.norm_in, projector.norm_out
            hidden = gelu(projector.hidden(layer_norm(z, z.shape[-1:], norm_in.weight, norm_in.bias))) + z
            projected = layer_norm(projector.output(hidden), (FEATURE_WIDTH,), norm_out.weight, norm_out.bias)
            distances.append((projected - batch.roi[row]).abs().mean())
        if latents:
            text.append(torch.stack(words).mean())
        if latents and batch.has_roi[row]:
            visual.append(torch.stack(distances).mean())
    return {
        "task": cross_entropy(torch.cat([loop[2] for loop in loops]), torch.cat([loop[3] for loop in loops])),
        "text": torch.stack(text).mean(),
        "visual": torch.stack(visual).mean(),
    }


@pytest.fixture(scope="module", params=GROUPINGS, ids=str)
def both(request, random_phantom, in_float64):
    """Losses and latents of the loop and of the recomputation, in float64, from the same parameters."""
    model = vital_model(random_phantom).double().eval()
    batch = vital_batch(random_phantom, request.param)
    batch = replace(
        batch, prompt=replace(batch.prompt, pixel_values=batch.prompt.pixel_values.double()), roi=batch.roi.double()
    )
    backbone = model.backbone.get_base_model()
    normed = []
    hook = backbone.model.language_model.norm.register_forward_hook(lambda *call: normed.append(call[2]))
    loop = model.think(batch)
    hook.remove()
    model.think = lambda batch: loop
    ours = {name: mean.value() for name, mean in model(batch).items()}
    # Steps and answer come last; the call before them ends with z_0 (padding is on the left).
    z0 = normed[-2 - len(loop.latents)]
    naive = [naive_loop(backbone, batch.prompt, row, int(steps)) for row, steps in enumerate(NUM_STEPS)]
    return SimpleNamespace(
        model=model,
        ours=ours,
        z=[z0, *loop.latents],
        theirs=naive_losses(model.scaffold, batch, naive),
        naive_z=[[z0, *latents] for z0, latents, _, _ in naive],
    )


@pytest.mark.parametrize("loss", ["task", "text", "visual"])
def test_parameter_gradients_equal_a_cache_free_recomputation(both, loss):
    """Of LoRA, backbone, vision tower, pj_in, projector and text decoder."""
    names, parameters = zip(*both.model.named_parameters(), strict=True)
    torch.testing.assert_close(both.ours[loss], both.theirs[loss], rtol=1e-10, atol=1e-10)
    ours = torch.autograd.grad(both.ours[loss], parameters, allow_unused=True, retain_graph=True)
    theirs = torch.autograd.grad(both.theirs[loss], parameters, allow_unused=True, retain_graph=True)
    for name, mine, other in zip(names, ours, theirs, strict=True):
        assert (mine is None) == (other is None), name
        if mine is not None:
            torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")
    moved = {name for name, mine in zip(names, ours, strict=True) if mine is not None and mine.abs().max() > 0}
    assert sum("lora_" in name for name in moved) == 2 * 7 * 4
    assert ("scaffold.pj_in.weight" in moved) == (loss == "text")
    assert ("scaffold.projector.hidden.weight" in moved) == (loss == "visual")


@pytest.mark.parametrize("loss", ["task", "text", "visual"])
def test_latent_gradients_equal_a_cache_free_recomputation(both, loss):
    """Every z_k that a loss depends on, from z_0 on, gets the right gradient and not zero; no other gets any."""
    ours = torch.autograd.grad(both.ours[loss], both.z, retain_graph=True)
    for row, z in enumerate(both.naive_z):
        theirs = torch.autograd.grad(both.theirs[loss], z, retain_graph=True, allow_unused=True)
        counts = {"task": True, "text": NUM_STEPS[row] > 0, "visual": NUM_STEPS[row] > 0 and HAS_ROI[row]}[loss]
        for mine, other in zip(ours, theirs, strict=False):
            assert (other is not None) == counts
            mine = mine[row, -1]
            torch.testing.assert_close(
                mine, torch.zeros_like(mine) if other is None else other[0, 0], rtol=1e-8, atol=1e-8
            )
            assert bool(mine.abs().max() > 0) == counts
        assert not any(idle[row].any() for idle in ours[len(z) :])


@pytest.mark.parametrize("questions_per_picture", GROUPINGS, ids=str)
def test_checkpointing_changes_no_bit(random_phantom, questions_per_picture):
    """Loss and gradients, with dropout in the adapter."""
    model = vital_model(random_phantom, dropout=0.05).train().backbone.get_base_model()
    batch = vital_batch(random_phantom, questions_per_picture).prompt
    parameters = list(model.parameters())

    def loss_and_gradients(checkpoint, seed=3):
        torch.manual_seed(seed)
        loss = task_loss(run_loop(model, batch, NUM_STEPS, checkpoint=checkpoint).logits, batch.answer_ids).value()
        return [loss, *torch.autograd.grad(loss, parameters)]

    kept = loss_and_gradients(False)
    assert kept[0] != loss_and_gradients(False, seed=4)[0], "dropout should matter"
    for expected, actual in zip(kept, loss_and_gradients(True), strict=True):
        assert torch.equal(expected, actual)


def test_checkpointing_takes_less_memory(random_phantom):
    """Prompts of 100 tokens and eight latent steps, forward and backward of an adapter."""
    model = vital_model(random_phantom, dropout=0.05).train().backbone
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    batch = vital_batch(random_phantom, (3, 1)).prompt
    num_steps = torch.full((batch.num_samples,), 8)

    def step(checkpoint):
        loop = run_loop(model.get_base_model(), batch, num_steps, checkpoint=checkpoint)
        task_loss(loop.logits, batch.answer_ids).value().backward()

    step(False)  # gradients exist from here on
    kept, recomputed = (peak_bytes(lambda checkpoint=checkpoint: step(checkpoint)) for checkpoint in (False, True))
    assert recomputed < 0.5 * kept


def peak_bytes(work):
    """The most that work() had allocated at a time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    changes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return int(torch.tensor(changes).cumsum(0).max())
