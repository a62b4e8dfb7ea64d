"""The whole model, and how Hugging Face names its weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from vitalrt.config import ModelConfig
from vitalrt.model.decoder import Decoder
from vitalrt.model.vision import VisionTower


class Qwen3VL(nn.Module):
    """Vision tower and decoder. Parameters are created on the current default device ("meta" costs nothing)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionTower(config.vision)
        self.decoder = Decoder(config.decoder)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [B, d] after the final norm.  Returns logits [B, vocab]."""
        return self.decoder.head(hidden)


def weight_sources(config: ModelConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every parameter of Qwen3VL and the Hugging Face tensors that make it up, stacked along the first axis."""
    yield from _vision_sources(config)
    root = "model.language_model"
    yield "decoder.embed.weight", (f"{root}.embed_tokens.weight",)
    for i in range(config.decoder.num_hidden_layers):
        ours, theirs = f"decoder.layers.{i}", f"{root}.layers.{i}"
        yield f"{ours}.input_norm.weight", (f"{theirs}.input_layernorm.weight",)
        yield f"{ours}.qkv.weight", tuple(f"{theirs}.self_attn.{p}_proj.weight" for p in "qkv")
        yield f"{ours}.qk_norm.weight", tuple(f"{theirs}.self_attn.{p}_norm.weight" for p in "qk")
        yield f"{ours}.o.weight", (f"{theirs}.self_attn.o_proj.weight",)
        yield f"{ours}.post_norm.weight", (f"{theirs}.post_attention_layernorm.weight",)
        yield f"{ours}.gate_up.weight", tuple(f"{theirs}.mlp.{p}_proj.weight" for p in ("gate", "up"))
        yield f"{ours}.down.weight", (f"{theirs}.mlp.down_proj.weight",)
    yield "decoder.norm.weight", (f"{root}.norm.weight",)
    if not config.decoder.tie_word_embeddings:
        yield "decoder.head.weight", ("lm_head.weight",)


def _vision_sources(config: ModelConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    root = "model.visual"
    yield "vision.pos_embed.weight", (f"{root}.pos_embed.weight",)
    modules = [("patch_embed", "patch_embed.proj")]
    for i in range(config.vision.depth):
        modules += [(f"blocks.{i}.{n}", f"blocks.{i}.{n}") for n in ("norm1", "norm2")]
        modules += [(f"blocks.{i}.{n}", f"blocks.{i}.attn.{n}") for n in ("qkv", "proj")]
        modules += [(f"blocks.{i}.fc{n}", f"blocks.{i}.mlp.linear_fc{n}") for n in (1, 2)]
    mergers = [("merger", "merger")]
    mergers += [
        (f"deepstack_mergers.{i}", f"deepstack_merger_list.{i}")
        for i in range(len(config.vision.deepstack_visual_indexes))
    ]
    for ours, theirs in mergers:
        modules += [(f"{ours}.norm", f"{theirs}.norm")]
        modules += [(f"{ours}.fc{n}", f"{theirs}.linear_fc{n}") for n in (1, 2)]
    for ours, theirs in modules:
        for kind in ("weight", "bias"):
            yield f"vision.{ours}.{kind}", (f"{root}.{theirs}.{kind}",)
