"""Words read from latents: greedy, each latent by itself, against a loop without a cache."""

from __future__ import annotations

import pytest
import torch

from vitalrt.explain import text_window
from vitalrt.explain.text_window import CUT, read_words

WIDTH = 24  # the scaffold's

NUM_TOKENS = 12


@torch.no_grad()
def read_plainly(scaffold, latent, ends):
    """Ids up to and with the end, at most NUM_TOKENS of them, and their probability; the whole sequence every time."""
    decoder = scaffold.text_decoder
    inputs, ids, probability = scaffold.pj_in(latent)[None, None], [], 1.0
    while len(ids) < NUM_TOKENS and not (ids and ids[-1] in ends):
        shares = decoder(inputs_embeds=inputs, use_cache=False).logits[0, -1].softmax(-1)
        ids.append(int(shares.argmax()))
        probability *= float(shares[ids[-1]])
        inputs = torch.cat((inputs, decoder.get_input_embeddings()(torch.tensor([[ids[-1]]]))), dim=1)
    return ids, probability


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    monkeypatch.setattr(text_window, "MAX_TOKENS", NUM_TOKENS)


def spell(ids):
    return " ".join(map(str, ids))


@pytest.mark.parametrize("end", [7, [7, 3, 21]])
def test_words_are_those_of_a_plain_loop(scaffold, end):
    ends = {end} if isinstance(end, int) else set(end)
    scaffold.text_decoder.config.eos_token_id = end
    latents = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(1))
    lengths = set()
    for latent, words in zip(latents, read_words(scaffold, latents, spell), strict=True):
        ids, probability = read_plainly(scaffold, latent, ends)
        has_ended = ids[-1] in ends
        assert words.text == (spell(ids[:-1]) if has_ended else spell(ids) + CUT)
        assert words.probability == pytest.approx(probability, rel=1e-4)
        lengths.add((has_ended, len(ids)))
    assert {has_ended for has_ended, _ in lengths} == {True, False} and len(lengths) > 3


def test_a_latent_is_read_alone_as_in_company(scaffold):
    latents = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(2))
    together = [words.text for words in read_words(scaffold, latents, spell)]
    assert together == [read_words(scaffold, latent[None], spell)[0].text for latent in latents]
    assert len(set(together)) > 1
