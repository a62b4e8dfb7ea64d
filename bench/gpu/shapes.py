"""A randomly initialised model, ours and transformers' over the very same tensors, and prompts for it.

T tokens, V visual tokens, P patches, d width.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from vitalrt.checkpoint import rows_of_parts
from vitalrt.config import ModelConfig
from vitalrt.model.qwen3_vl import Qwen3VL, weight_sources
from vitalrt.model.rope import Grid, MRope, mrope_positions
from vitalrt.model_cost import KNOWN_MODELS

TEXT_TOKENS = 20  # of a prompt, around its image
MINIATURE = 10  # how many times shorter prompts are on a CPU
STD = 0.02


def small_config() -> ModelConfig:
    """Qwen3-VL in miniature: what a machine without a GPU runs, to show that everything runs."""
    whole = KNOWN_MODELS["Qwen3-VL-8B"]
    vision = replace(
        whole.vision, depth=2, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=2, out_hidden_size=64,
        num_position_embeddings=64, deepstack_visual_indexes=(0,),
    )  # fmt: skip
    decoder = replace(
        whole.decoder, vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=3, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, mrope_section=(4, 2, 2),
    )  # fmt: skip
    return replace(whole, vision=vision, decoder=decoder, image_token_id=500, video_token_id=501)


def random_model(config: ModelConfig, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Qwen3VL:
    """Weights of standard deviation 0.02, norms around 1, biases 0. Never downloaded, never the same as anybody's."""
    with torch.device("meta"):
        model = Qwen3VL(config)
    model = model.to(dtype).to_empty(device=device)
    model.decoder.rope = MRope(config.decoder).to(device)  # its buffers do not survive the meta device
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.normal_(1, 0.1, generator=generator)
            else:
                parameter.normal_(0, STD, generator=generator)
            if name.endswith("qk_norm.weight"):  # transformers has one row for all q heads and one for all k heads
                heads = config.decoder.num_attention_heads
                parameter[:heads], parameter[heads:] = parameter[0].clone(), parameter[-1].clone()
    if config.decoder.tie_word_embeddings:
        model.decoder.head.weight = model.decoder.embed.weight
    return model.eval().requires_grad_(False)


def transformers_config(config: ModelConfig) -> Qwen3VLConfig:
    decoder, vision = asdict(config.decoder), asdict(config.vision)
    rope = {"rope_type": "default", "rope_theta": decoder.pop("rope_theta"), "mrope_interleaved": True}
    rope["mrope_section"] = list(decoder.pop("mrope_section"))
    tied = decoder.pop("tie_word_embeddings")
    vision.pop("rope_theta")
    vision["deepstack_visual_indexes"] = list(vision["deepstack_visual_indexes"])
    return Qwen3VLConfig(
        text_config={**decoder, "rope_parameters": rope, "tie_word_embeddings": tied},
        vision_config=vision,
        tie_word_embeddings=tied,
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
        vision_start_token_id=config.video_token_id + 1,
        vision_end_token_id=config.video_token_id + 2,
    )


def transformers_model(model: Qwen3VL) -> Any:
    """transformers' model whose parameters are views of ours: no second copy, and no doubt that they are the same."""
    weight = model.decoder.embed.weight
    with torch.device(weight.device):
        theirs: Any = Qwen3VLForConditionalGeneration._from_config(
            transformers_config(model.config), dtype=weight.dtype
        )
    ours = dict(model.named_parameters(remove_duplicate=False))
    for name, sources in weight_sources(model.config):
        parts = ours[name].detach().split(rows_of_parts(sources, len(ours[name]), model.config.decoder))
        for source, part in zip(sources, parts, strict=True):
            path, _, leaf = source.rpartition(".")
            module = theirs.get_submodule(path)
            shape = getattr(module, leaf).shape
            value = part[0] if source.endswith(("q_norm.weight", "k_norm.weight")) else part.view(shape)
            setattr(module, leaf, torch.nn.Parameter(value, requires_grad=False))
    theirs.tie_weights()
    return theirs.eval().requires_grad_(False)


class BenchPrompt(NamedTuple):
    """As a processor gives it, on the host.  ids: [T].  pixels: [P, patch_dim] fp32.  next_position: after it."""

    ids: torch.Tensor
    pixels: torch.Tensor
    grid: Grid
    positions: torch.Tensor
    next_position: int

    @property
    def num_tokens(self) -> int:
        return len(self.ids)


def prompt_of(config: ModelConfig, num_tokens: int, seed: int = 0) -> BenchPrompt:
    """One image of nearly square shape and about TEXT_TOKENS of text around it; num_tokens in all, or a miniature."""
    if not torch.cuda.is_available():
        num_tokens = max(2 * TEXT_TOKENS, num_tokens // MINIATURE)
    generator = torch.Generator().manual_seed(seed)
    columns = max(1, round((num_tokens - TEXT_TOKENS) ** 0.5))
    rows = (num_tokens - TEXT_TOKENS) // columns
    num_visual, merge = rows * columns, config.vision.spatial_merge_size
    ids = torch.randint(0, config.image_token_id, (num_tokens,), generator=generator)
    ids[4 : 4 + num_visual] = config.image_token_id
    grid = (1, rows * merge, columns * merge)
    pixels = torch.randn(num_visual * merge**2, config.vision.patch_dim, generator=generator)
    if torch.cuda.is_available():
        pixels = pixels.pin_memory()  # for everybody
    positions, next_position = mrope_positions(ids, [grid], config)
    return BenchPrompt(ids, pixels, grid, positions, next_position)
