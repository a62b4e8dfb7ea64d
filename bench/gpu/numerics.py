"""How far z_1 .. z_K and the answer's logits are from float32: ours, and transformers in the same dtype.

The reference runs our own modules in float32, a layer's weights made wide when it is their turn, over the whole
sequence anew for every step: no cache, no kernel, no second copy of the model. All are fed the reference's tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.func import functional_call
from torch.nn import functional as F
from transformers import DynamicCache

from bench.gpu.ours import Ours
from bench.gpu.peers import processor_inputs
from bench.gpu.record import Record
from bench.gpu.shapes import BenchPrompt, prompt_of, transformers_model
from vitalrt.engine.device_step import StepWeights
from vitalrt.model.qwen3_vl import Qwen3VL

PROMPT, K, TOKENS = 300, 4, 6
ALLOWED = 1.1  # times transformers' own error


class Outcome:
    """latents: z_1 .. z_K [K, d].  logits: [TOKENS, vocab].  Both fp32, on the host."""

    def __init__(self, latents: list[torch.Tensor], logits: list[torch.Tensor]) -> None:
        self.latents = torch.stack([z.flatten().float().cpu() for z in latents])
        self.logits = torch.stack([row.flatten().float().cpu() for row in logits])

    def errors_from(self, exact: Outcome) -> dict[str, Any]:
        """Of each latent and of all logits: the norm of the difference over the norm of the exact."""
        latents = (self.latents - exact.latents).norm(dim=1) / exact.latents.norm(dim=1)
        logits = (self.logits - exact.logits).norm() / exact.logits.norm()
        same = (self.logits.argmax(-1) == exact.logits.argmax(-1)).float().mean()
        return {
            "z": [round(float(error), 6) for error in latents],
            "logits": round(float(logits), 6),
            "same_token": round(float(same), 3),
        }


def measure(record: Record, model: Qwen3VL) -> dict[str, Any]:
    prompt = prompt_of(model.config, PROMPT, seed=1)
    exact, tokens = reference(model, prompt)
    dtype = model.decoder.embed.weight.dtype
    errors = {"vitalrt": of_ours(Ours(model, 1, PROMPT + 64), model, prompt, tokens).errors_from(exact)}
    record.tell("numerics", dtype=str(dtype), errors=errors)
    errors["transformers"] = of_transformers(transformers_model(model), prompt, tokens).errors_from(exact)
    ours, theirs = errors["vitalrt"], errors["transformers"]
    pairs = [*zip(ours["z"], theirs["z"], strict=True), (ours["logits"], theirs["logits"])]
    ratios = [round(mine / other, 4) if other else None for mine, other in pairs]
    met = all(mine <= ALLOWED * other for mine, other in pairs)
    record.tell("numerics", errors=errors, ratio={"z": ratios[:-1], "logits": ratios[-1]}, allowed=ALLOWED, met=met)
    weights = StepWeights(model.decoder, int8=True)
    errors["vitalrt, int8"] = of_ours(Ours(model, 1, PROMPT + 64, weights), model, prompt, tokens).errors_from(exact)
    return {"prompt_tokens": PROMPT, "errors": errors}


def of_ours(ours: Ours, model: Qwen3VL, prompt: BenchPrompt, tokens: list[int]) -> Outcome:
    ours.begin(prompt, K)
    ours.graphs.think(K)
    latents = [ours.step.latents[i].clone() for i in range(K)]
    logits = [model.head(ours.step.rows.hidden[:1])]
    for token in tokens[:-1]:
        ours.step.rows.tokens.fill_(token)
        ours.graphs.step(1, answers=False)
        logits.append(model.head(ours.step.rows.hidden[:1]))
    return Outcome(latents, logits)


def of_transformers(theirs: Any, prompt: BenchPrompt, tokens: list[int]) -> Outcome:
    cache = DynamicCache(config=theirs.config)
    hidden = theirs.model(**processor_inputs(theirs, prompt), past_key_values=cache).last_hidden_state[:, -1:]
    latents = []
    for _ in range(K):
        hidden = theirs.model(inputs_embeds=hidden, past_key_values=cache).last_hidden_state
        latents.append(hidden)
    logits = [theirs.lm_head(hidden)]
    for token in tokens[:-1]:
        ids = torch.tensor([[token]], device=hidden.device)
        logits.append(theirs.lm_head(theirs.model(input_ids=ids, past_key_values=cache).last_hidden_state))
    return Outcome(latents, logits)


def reference(model: Qwen3VL, prompt: BenchPrompt) -> tuple[Outcome, list[int]]:
    """And the greedy tokens that follow."""
    device = model.decoder.embed.weight.device
    pixels = prompt.pixels.to(device)
    features = _in_fp32(model.vision, lambda tower: tower(pixels, [prompt.grid]))
    visual, deepstack = features
    image_rows = (prompt.ids == model.config.image_token_id).nonzero().flatten().to(device)
    x = F.embedding(prompt.ids.to(device), model.decoder.embed.weight).float().index_copy(0, image_rows, visual)
    position, positions = prompt.next_position, prompt.positions.to(device)

    def last_hidden() -> torch.Tensor:
        return _decode(model, x, positions, image_rows, deepstack)

    def append(row: torch.Tensor) -> None:
        nonlocal x, positions, position
        x = torch.cat((x, row))
        positions = torch.cat((positions, torch.full((3, 1), position, device=device)), dim=1)
        position += 1

    latents, logits, tokens = [], [], []
    hidden = last_hidden()
    for _ in range(K):
        append(hidden)
        hidden = last_hidden()
        latents.append(hidden)
    while True:
        logits.append(_in_pieces(model.decoder.head.weight, hidden))
        tokens.append(int(logits[-1].argmax()))
        if len(tokens) == TOKENS:
            return Outcome(latents, logits), tokens
        append(model.decoder.embed.weight[tokens[-1]].float()[None])
        hidden = last_hidden()


def _decode(
    model: Qwen3VL, x: torch.Tensor, positions: torch.Tensor, image_rows: torch.Tensor, deepstack: list[torch.Tensor]
) -> torch.Tensor:
    """The last row's hidden state after the final norm, [1, d]."""
    cos, sin = model.decoder.rope(positions, torch.float32)

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)

    for index, layer in enumerate(model.decoder.layers):
        x = _in_fp32(layer, lambda wide, x=x: wide(x, cos, sin, attend))
        if index < len(deepstack):
            x = x.index_add(0, image_rows, deepstack[index])
    return _in_fp32(model.decoder.norm, lambda norm, x=x: norm(x[-1:]))


def _in_fp32(module: torch.nn.Module, call: Callable[[Callable[..., Any]], Any]) -> Any:
    wide = {name: parameter.float() for name, parameter in module.named_parameters()}
    return call(lambda *args: functional_call(module, wide, args))


def _in_pieces(weight: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """hidden @ weight.T in fp32, some rows of the weight at a time."""
    return torch.cat([hidden @ rows.float().T for rows in weight.split(1 << 15)], dim=1)
