"""The latent loop as one would plainly write it over transformers' model: what vitalrt is compared with."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from transformers import DynamicCache


@torch.inference_mode()
def think_and_answer(
    model: Any, inputs: dict[str, torch.Tensor], k: int, max_new_tokens: int, stop_ids: Collection[int]
) -> list[int]:
    """Every step a call of the model, every token read back before the next.

    inputs: as the processor gives them, B = 1.  Returns ids, the end token included.
    """
    cache = DynamicCache(config=model.config)
    hidden = model.model(**inputs, past_key_values=cache).last_hidden_state[:, -1:]
    for _ in range(k):
        hidden = model.model(inputs_embeds=hidden, past_key_values=cache).last_hidden_state
    token = model.lm_head(hidden).argmax(-1)  # [1, 1]
    token_ids = [token.item()]
    while token_ids[-1] not in stop_ids and len(token_ids) < max_new_tokens:
        hidden = model.model(input_ids=token, past_key_values=cache).last_hidden_state
        token = model.lm_head(hidden).argmax(-1)
        token_ids.append(token.item())
    return token_ids
