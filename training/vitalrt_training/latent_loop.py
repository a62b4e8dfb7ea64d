"""The latent loop with gradients, over transformers' Qwen3-VL: the recurrent path of inference, nothing detached.

G groups (questions about the same images), N samples, K most latent steps of the batch, A answer tokens, d width,
V visual tokens, D deepstack levels.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import Qwen3VLForConditionalGeneration

from vitalrt.errors import VitalError
from vitalrt_training.data.batches import Batch
from vitalrt_training.training_cache import TrainingCache, recomputing, storing_only


@dataclass(frozen=True)
class LoopOutput:
    """logits: [N, A, vocab], what each answer token is predicted from; the first comes from z_K (z_0 where K = 0).

    latents: K tensors [N, 1, d], the nodes of the graph themselves.  has_step: [N, K] bool; where False, the sample had
    done its own number of steps and that latent was neither used nor seen by anything.
    """

    logits: torch.Tensor
    latents: list[torch.Tensor]
    has_step: torch.Tensor


class VisionFeatures(NamedTuple):
    """What the vision tower says of pictures.  tokens: [V, d].  deepstack: [D, V, d]."""

    tokens: torch.Tensor
    deepstack: torch.Tensor

    @classmethod
    def of(cls, output: Any) -> VisionFeatures:
        """output: what transformers' tower returns."""
        return cls(output.pooler_output, torch.stack(output.deepstack_features))


def run_loop(
    model: Qwen3VLForConditionalGeneration,
    batch: Batch,
    num_steps: torch.Tensor,
    *,
    max_steps: int = 0,
    vision: VisionFeatures | None = None,
    checkpoint: bool = False,
) -> LoopOutput:
    """Prefix, question, latent steps, teacher-forced answer.  num_steps: [N] int64, each sample's own K.

    max_steps: the batch takes at least so many steps, whoever is idle in them.
    vision: of the batch's pictures, where that is at hand.
    Prefix and question may be padded on either side. A sample with fewer steps than the longest idles: its further
    latents are masked out of the cache, and its answer follows its own z_K at its own next position.
    checkpoint: backward recomputes the decoder's layers instead of keeping what they computed. The same gradients,
    dropout included, for a fraction of the memory and about half as much time again.
    Raises VitalError if transformers' own gradient checkpointing is on: it would leave the cache out.
    """
    layers = model.model.language_model.layers
    if model.training and any(layer.gradient_checkpointing for layer in layers):
        raise VitalError("model: expected transformers' gradient checkpointing off (use checkpoint=True), got it on")
    with recomputing(layers) if checkpoint else nullcontext():
        if vision is None:
            vision = VisionFeatures.of(model.model.visual(batch.pixel_values, grid_thw=batch.image_grid_thw))
        return _run(model, batch, num_steps, max(max_steps, int(num_steps.max())), vision)


def _run(
    model: Qwen3VLForConditionalGeneration,
    batch: Batch,
    num_steps: torch.Tensor,
    max_steps: int,
    vision: VisionFeatures,
) -> LoopOutput:
    decoder = model.model.language_model
    num_fed = batch.answer_ids.shape[1] - 1
    cache = TrainingCache(len(decoder.layers))
    _fill_prefix(model, batch, vision, cache)
    cache.spread(batch.group_of_sample, batch.question.ids.shape[1] + max_steps + num_fed)
    mask = torch.cat((batch.prefix.mask[batch.group_of_sample], batch.question.mask), dim=1)
    asked = decoder(
        inputs_embeds=decoder.embed_tokens(batch.question.ids),
        position_ids=batch.question.positions,
        attention_mask=mask,
        past_key_values=cache,
    ).last_hidden_state
    last = (batch.question.mask * torch.arange(1, asked.shape[1] + 1, device=asked.device)).argmax(-1)
    hidden = asked[torch.arange(len(asked), device=asked.device), last][:, None]
    has_step = torch.arange(max_steps, device=asked.device) < num_steps[:, None]
    latents: list[torch.Tensor] = []
    for step, is_thinking in enumerate(has_step.T):
        mask = torch.cat((mask, is_thinking[:, None].to(mask.dtype)), dim=1)
        stepped = decoder(
            inputs_embeds=hidden,
            position_ids=_axes(batch.next_position[:, None] + step),
            attention_mask=mask,
            past_key_values=cache,
        ).last_hidden_state
        latents.append(stepped)
        hidden = torch.where(is_thinking[:, None, None], stepped, hidden)
    answers = decoder(
        inputs_embeds=decoder.embed_tokens(batch.answer_ids[:, :num_fed].clamp(min=0)),
        position_ids=_axes((batch.next_position + num_steps)[:, None] + torch.arange(num_fed, device=asked.device)),
        attention_mask=torch.cat((mask, mask.new_ones(len(mask), num_fed)), dim=1),
        past_key_values=cache,
    ).last_hidden_state
    return LoopOutput(model.lm_head(torch.cat((hidden, answers), dim=1)), latents, has_step)


def _fill_prefix(
    model: Qwen3VLForConditionalGeneration, batch: Batch, vision: VisionFeatures, cache: TrainingCache
) -> None:
    # Straight to the decoder: transformers 5.17 takes no encoded images, and would go on without them.
    decoder = model.model.language_model
    is_visual = batch.prefix.ids == model.config.image_token_id
    embedded = decoder.embed_tokens(batch.prefix.ids)
    with storing_only(decoder.layers[-1], cache.layers[-1]):
        decoder(
            inputs_embeds=embedded.masked_scatter(is_visual[..., None], vision.tokens.to(embedded.dtype)),
            attention_mask=batch.prefix.mask,
            position_ids=batch.prefix.positions,
            past_key_values=cache,
            visual_pos_masks=is_visual,
            deepstack_visual_embeds=list(vision.deepstack),
        )


def _axes(positions: torch.Tensor) -> torch.Tensor:
    """[N, T] to M-RoPE's [3, N, T]: past the images, the three axes advance together."""
    return positions[None].expand(3, -1, -1)
