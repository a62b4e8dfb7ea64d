"""The text window: what training's text decoder reads from each latent.

Source: VITAL section 3.3 ("Dual Interpretability"), figure 3.  K latent steps, d backbone width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vitalrt.errors import CheckpointError
from vitalrt.model.scaffold import Scaffold

MAX_TOKENS = 64
LATENTS_AT_A_TIME = 4  # of which all logits are held: 156 MB with a vocabulary of 151,936
CUT = "…"


@dataclass(frozen=True)
class Words:
    """text: of one latent, with an ellipsis where the decoder did not come to an end.  probability: of all its tokens,
    by the decoder."""

    text: str
    probability: float


def end_ids(scaffold: Scaffold) -> list[int]:
    """The tokens that end a step.  Raises CheckpointError where the text decoder's config names none that there is."""
    config = scaffold.text_decoder.config
    found = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if not found or not all(isinstance(one, int) and 0 <= one < config.vocab_size for one in found):
        expected = f"one or several token ids below {config.vocab_size}"
        raise CheckpointError(f"scaffold: text_decoder.eos_token_id: expected {expected}, got {config.eos_token_id!r}")
    return found


@torch.inference_mode()
def read_words(scaffold: Scaffold, latents: torch.Tensor, decode: Callable[[Sequence[int]], str]) -> list[Words]:
    """Greedy decoding from pj_in(z_k) alone, each latent by itself.

    latents: [K, d].  decode: the text decoder's ids, without special tokens, to text.
    """
    return [words for few in latents.split(LATENTS_AT_A_TIME) for words in _read_few(scaffold, few, decode)]


def _read_few(scaffold: Scaffold, latents: torch.Tensor, decode: Callable[[Sequence[int]], str]) -> list[Words]:
    ends = end_ids(scaffold)
    begin = scaffold.pj_in(latents.to(scaffold.pj_in.weight))[:, None]
    made = scaffold.text_decoder.generate(
        inputs_embeds=begin,
        attention_mask=torch.ones(begin.shape[:2], dtype=torch.int64, device=begin.device),
        max_new_tokens=MAX_TOKENS,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=ends[0],
        return_dict_in_generate=True,
        output_logits=True,
    )
    steps = zip(made.logits, made.sequences.T, strict=True)
    chosen = torch.stack([logits.float().log_softmax(-1).gather(-1, ids[:, None])[:, 0] for logits, ids in steps])
    found = []
    for ids, logs in zip(made.sequences.tolist(), chosen.T.tolist(), strict=True):
        length = next((place for place, token in enumerate(ids) if token in ends), None)
        text = decode(ids[:length]).strip() + ("" if length is not None else CUT)
        found.append(Words(text, math.exp(sum(logs if length is None else logs[: length + 1]))))
    return found
