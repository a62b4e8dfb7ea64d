"""The text window: what training's text decoder reads from each latent.  Source: VITAL section 3.3 ("Dual
Interpretability"), figure 3.

K latent steps, d backbone width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vitalrt.model.scaffold import Scaffold

MAX_TOKENS = 64
CUT = "…"


@dataclass(frozen=True)
class Words:
    """text: of one latent, with an ellipsis where the decoder did not come to an end.  probability: of all its tokens,
    by the decoder."""

    text: str
    probability: float


@torch.inference_mode()
def read_words(scaffold: Scaffold, latents: torch.Tensor, decode: Callable[[Sequence[int]], str]) -> list[Words]:
    """Greedy decoding from pj_in(z_k) alone, each latent by itself.

    latents: [K, d].  decode: the text decoder's ids, without special tokens, to text.
    """
    decoder = scaffold.text_decoder
    end = decoder.config.eos_token_id
    ends = set(end) if isinstance(end, list) else {end}
    begin = scaffold.pj_in(latents.to(scaffold.pj_in.weight))[:, None]
    made = decoder.generate(
        inputs_embeds=begin,
        attention_mask=torch.ones(begin.shape[:2], dtype=torch.int64, device=begin.device),
        max_new_tokens=MAX_TOKENS,
        do_sample=False,
        eos_token_id=sorted(ends),
        pad_token_id=min(ends),
        return_dict_in_generate=True,
        output_logits=True,
    )
    log_probabilities = torch.stack(made.logits, dim=1).float().log_softmax(-1)
    chosen = log_probabilities.gather(-1, made.sequences[..., None])[..., 0]
    found = []
    for ids, logs in zip(made.sequences.tolist(), chosen.tolist(), strict=True):
        length = next((place for place, token in enumerate(ids) if token in ends), None)
        text = decode(ids[:length]).strip() + ("" if length is not None else CUT)
        counted = logs if length is None else logs[: length + 1]
        found.append(Words(text, float(torch.tensor(counted, dtype=torch.float64).sum().exp())))
    return found
