"""The same work in what else there is: transformers eager, transformers compiled, and a plain torch loop in a graph.

All run the very tensors that vitalrt runs. Each has the methods of bench.gpu.ours.Ours that are timed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from transformers import DynamicCache, StaticCache

from bench.gpu.record import SkippedError
from bench.gpu.shapes import BenchPrompt
from bench.published_loop import think_and_answer
from vitalrt.engine.graphs import Graphs
from vitalrt.model.qwen3_vl import Qwen3VL


def processor_inputs(model: Any, prompt: BenchPrompt) -> dict[str, torch.Tensor]:
    ids = prompt.ids[None].to(model.device)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": prompt.pixels.to(model.device),
        "image_grid_thw": torch.tensor([prompt.grid], device=model.device),
        "mm_token_type_ids": (ids == model.config.image_token_id).int(),
    }


class Eager:
    """transformers as it is: DynamicCache, a call per step, a token read back per step."""

    name = "transformers"

    def __init__(self, model: Any) -> None:
        self.model = model

    def begin(self, prompt: BenchPrompt, k: int = 0) -> None:
        self.cache = DynamicCache(config=self.model.config)
        out = self.model.model(**processor_inputs(self.model, prompt), past_key_values=self.cache)
        self.hidden = out.last_hidden_state[:, -1:]
        self.token = self.model.lm_head(self.hidden).argmax(-1)

    def go_on(self, prompt: BenchPrompt, count: int) -> torch.Tensor:
        """As Ours.go_on; after begin(), whose cache grows."""
        ids = prompt.ids[-1:].to(self.model.device).expand(1, count)
        hidden: torch.Tensor = self.model.model(input_ids=ids, past_key_values=self.cache).last_hidden_state[0, -1]
        return hidden

    def latent_steps(self, count: int) -> None:
        for _ in range(count):
            out = self.model.model(inputs_embeds=self.hidden, past_key_values=self.cache)
            self.hidden = out.last_hidden_state

    def answer_tokens(self, count: int) -> None:
        for _ in range(count):
            out = self.model.model(input_ids=self.token, past_key_values=self.cache)
            self.token = self.model.lm_head(out.last_hidden_state).argmax(-1)

    def request(self, prompt: BenchPrompt, k: int, num_tokens: int) -> list[int]:
        inputs = processor_inputs(self.model, prompt)
        if k:
            return think_and_answer(self.model, inputs, k, num_tokens, ())
        limits = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens}
        output = self.model.generate(**inputs, **limits, do_sample=False)
        tokens: list[int] = output[0, prompt.num_tokens :].tolist()
        return tokens


class Compiled:
    """transformers with a static cache and torch.compile(mode="reduce-overhead") of decoder and head.

    Prefill is eager, as in its own generate(). Tokens are read back after the last one.
    """

    name = "transformers, compiled"

    def __init__(self, model: Any, max_tokens: int) -> None:
        if model.device.type != "cuda":
            raise SkippedError('torch.compile(mode="reduce-overhead") captures CUDA graphs: it needs a CUDA device')
        self.model = model
        self.cache = StaticCache(config=model.config.text_config, max_cache_len=max_tokens)
        # The decoder once for both kinds of step: compiling it takes most of a minute.
        self._decode = torch.compile(self._decoder, mode="reduce-overhead")
        self._choose = torch.compile(self._head, mode="reduce-overhead")

    def _decoder(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        text = self.model.model.language_model
        return text(inputs_embeds=x, position_ids=position, past_key_values=self.cache).last_hidden_state

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model.lm_head(hidden).argmax(-1)

    def begin(self, prompt: BenchPrompt, k: int = 0) -> None:
        self.cache.reset()
        out = self.model.model(**processor_inputs(self.model, prompt), past_key_values=self.cache)
        # Of the strides that a step's own has, or the next step is compiled anew.
        self.hidden = out.last_hidden_state[:, -1:].clone(memory_format=torch.contiguous_format)
        self.token = self.model.lm_head(self.hidden).argmax(-1)
        self.position = torch.full((3, 1, 1), prompt.next_position, device=self.model.device)

    def latent_steps(self, count: int) -> None:
        for _ in range(count):
            torch.compiler.cudagraph_mark_step_begin()
            self.hidden = self._decode(self.hidden, self.position).clone()
            self.position += 1

    def answer_tokens(self, count: int) -> None:
        for _ in range(count):
            torch.compiler.cudagraph_mark_step_begin()
            x = self.model.get_input_embeddings()(self.token)
            self.token = self._choose(self._decode(x, self.position)).clone()
            self.position += 1

    def request(self, prompt: BenchPrompt, k: int, num_tokens: int) -> list[int]:
        self.begin(prompt)
        self.latent_steps(k)
        if k:
            self.token = self.model.lm_head(self.hidden).argmax(-1)
        tokens = [self.token]
        for _ in range(num_tokens - 1):
            self.answer_tokens(1)
            tokens.append(self.token)
        ids: list[int] = torch.cat(tokens).flatten().tolist()
        return ids


class TorchGraph:
    """vitalrt's own model through torch's operations alone: a contiguous static cache, one graph per kind of step."""

    name = "plain torch, graphed"

    def __init__(self, model: Qwen3VL, max_tokens: int) -> None:
        self.model, config, embed = model, model.config.decoder, model.decoder.embed.weight
        self.device = embed.device
        shape = (2, config.num_hidden_layers, max_tokens, config.num_key_value_heads, config.head_dim)
        self.k_cache, self.v_cache = torch.zeros(shape, device=self.device, dtype=embed.dtype)
        self.hidden = embed.new_zeros(1, config.hidden_size)
        self.token = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.slot, self.position = torch.zeros(2, 1, dtype=torch.int64, device=self.device)
        self._columns = torch.arange(max_tokens, device=self.device)
        self._graphs = Graphs(self.device)

    def begin(self, prompt: BenchPrompt, k: int = 0) -> None:
        model, ids = self.model, prompt.ids.to(self.device)
        tokens, deepstack = model.vision(prompt.pixels.to(self.device), [prompt.grid])
        image_rows = (prompt.ids == model.config.image_token_id).nonzero().flatten().to(self.device)
        x = model.decoder.embed(ids).index_copy(0, image_rows, tokens)

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            self.k_cache[layer, : len(k)], self.v_cache[layer, : len(v)] = k, v
            q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)

        last = torch.tensor([len(ids) - 1], device=self.device)
        x = model.decoder(x, prompt.positions.to(self.device), attend, image_rows, deepstack, rows=last)
        self.hidden.copy_(model.decoder.norm(x))
        self.token.copy_(model.head(self.hidden).argmax(-1))
        self.slot.fill_(len(ids))
        self.position.fill_(prompt.next_position)

    def _step(self, x: torch.Tensor) -> None:
        mask = (self._columns <= self.slot)[None, None, None]

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            keys, values = self.k_cache[layer], self.v_cache[layer]
            keys.index_copy_(0, self.slot, k)
            values.index_copy_(0, self.slot, v)
            q, k, v = q[:, :, None], keys[None].transpose(1, 2), values[None].transpose(1, 2)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[:, :, 0]

        self.hidden.copy_(self.model.decoder.norm(self.model.decoder(x, self.position[None], attend)))
        self.slot += 1
        self.position += 1

    def _latent_step(self) -> None:
        self._step(self.hidden)

    def _answer_step(self) -> None:
        self._step(self.model.decoder.embed(self.token))
        self.token.copy_(self.model.head(self.hidden).argmax(-1))

    def latent_steps(self, count: int) -> None:
        for _ in range(count):
            self._graphs("latent", self._latent_step, dry_run=self._latent_step)

    def answer_tokens(self, count: int) -> None:
        for _ in range(count):
            self._graphs("answer", self._answer_step, dry_run=self._answer_step)

    def request(self, prompt: BenchPrompt, k: int, num_tokens: int) -> list[int]:
        self.begin(prompt)
        self.latent_steps(k)
        if k:
            self.token.copy_(self.model.head(self.hidden).argmax(-1))
        tokens = [self.token.clone()]
        for _ in range(num_tokens - 1):
            self.answer_tokens(1)
            tokens.append(self.token.clone())
        ids: list[int] = torch.cat(tokens).tolist()
        return ids
