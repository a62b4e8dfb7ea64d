"""The latent loop with gradients, over transformers' Qwen3-VL: the recurrent path of inference, nothing detached.

N samples, T prefix tokens (left-padded), K latent steps, A answer tokens, d width, V visual tokens.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, Qwen3VLForConditionalGeneration

from vitalrt_training.data.batches import Batch


def task_loss(model: Qwen3VLForConditionalGeneration, batch: Batch, k: int) -> torch.Tensor:
    """Cross entropy over answer tokens (the end token included) given z_1..z_K: L_task of VITAL section 3.3."""
    logits, _ = answer_logits(model, batch, k)
    return cross_entropy(logits.flatten(0, 1).float(), batch.answer_ids.flatten(), ignore_index=-100)


def answer_logits(
    model: Qwen3VLForConditionalGeneration, batch: Batch, k: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Teacher-forced logits [N, A, vocab] of every answer token, and the latents z_1..z_K, each [N, 1, d].

    The first answer token is predicted by z_K itself (z_0 where k = 0), as at inference.
    """
    decoder = model.model.language_model
    embed = decoder.embed_tokens
    cache = DynamicCache(config=model.config.get_text_config())
    hidden = _prefix(model, batch, cache)[:, -1:]
    mask = batch.attention_mask
    positions = batch.next_position[None, :, None].expand(3, -1, 1)
    latents = []
    for _ in range(k):
        mask = _extend(mask, 1)
        hidden = decoder(
            inputs_embeds=hidden, position_ids=positions, attention_mask=mask, past_key_values=cache
        ).last_hidden_state
        latents.append(hidden)
        positions = positions + 1
    num_fed = batch.answer_ids.shape[1] - 1
    fed = embed(batch.answer_ids[:, :num_fed].clamp(min=0))
    answers = decoder(
        inputs_embeds=fed,
        position_ids=positions + torch.arange(num_fed),
        attention_mask=_extend(mask, num_fed),
        past_key_values=cache,
    ).last_hidden_state
    return model.lm_head(torch.cat((hidden, answers), dim=1)), latents


def _prefix(model: Qwen3VLForConditionalGeneration, batch: Batch, cache: DynamicCache) -> torch.Tensor:
    """Fill the cache. Each image is encoded once, however many questions are asked about it. Returns [N, T, d]."""
    tower = model.model.visual(batch.pixel_values, grid_thw=batch.image_grid_thw)
    num_tokens = (batch.image_grid_thw.prod(-1) // model.model.visual.spatial_merge_size**2).tolist()

    def per_sample(features: torch.Tensor) -> torch.Tensor:
        by_image = features.split(num_tokens)
        return torch.cat([by_image[image] for image in batch.image_of_sample])

    encoded = SimpleNamespace(
        pooler_output=(per_sample(tower.pooler_output),),
        deepstack_features=[(per_sample(features),) for features in tower.deepstack_features],
    )
    return model.model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        mm_encoder_outputs={"image": encoded},
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state


def _extend(mask: torch.Tensor, num_tokens: int) -> torch.Tensor:
    return torch.cat((mask, mask.new_ones(len(mask), num_tokens)), dim=1)
