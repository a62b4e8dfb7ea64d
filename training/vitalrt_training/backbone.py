"""The phantom backbone and text decoder: Qwen3-VL's and Qwen3's architectures at a size that a CPU core can train."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

TINY = "tiny"  # as the name of a text decoder
PATCH_SIZE = 8
MERGE_SIZE = 2
IMAGE_PIXELS = 96 * 96
EMBEDDING_STD = 0.5
INITIALIZER_RANGE = 0.05  # near 1 / sqrt(width): Qwen's 0.02 suits widths in the thousands
PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen3VLProcessor",
    "patch_size": PATCH_SIZE,
    "merge_size": MERGE_SIZE,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 64 * 64, "longest_edge": IMAGE_PIXELS},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def phantom_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLConfig:
    vocabulary = tokenizer.get_vocab()
    return Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 4096,
            "initializer_range": INITIALIZER_RANGE,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 4,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_heads": 4,
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": MERGE_SIZE,
            "temporal_patch_size": 2,
            "out_hidden_size": 192,
            "num_position_embeddings": 144,
            "initializer_range": INITIALIZER_RANGE,
            "deepstack_visual_indexes": [1, 2],
        },
        image_token_id=vocabulary["<|image_pad|>"],
        video_token_id=vocabulary["<|video_pad|>"],
        vision_start_token_id=vocabulary["<|vision_start|>"],
        vision_end_token_id=vocabulary["<|vision_end|>"],
        tie_word_embeddings=False,
    )


def tiny_decoder_config(backbone: Qwen3VLConfig) -> Qwen3Config:
    """A text decoder that reads reasoning steps in the backbone's own vocabulary."""
    text = backbone.get_text_config()
    return Qwen3Config(
        vocab_size=text.vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        initializer_range=INITIALIZER_RANGE,
        tie_word_embeddings=True,
        eos_token_id=getattr(text, "eos_token_id", None),  # which a configuration from shapes alone lacks
        pad_token_id=text.pad_token_id,
    )


@torch.no_grad()
def new_backbone(config: Qwen3VLConfig, seed: int) -> Qwen3VLForConditionalGeneration:
    """Random weights, scaled so that a token can be told from what the layers add to it.

    With Qwen's initialisation and a narrow decoder, the first layer's output is ten times a word's embedding: which
    word was asked about is lost in it, and a short training never finds out. So embeddings are as large as visual
    tokens, and every layer adds 1 / sqrt(2 * layers) of what it would (GPT-2's rule).
    """
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(config)
    decoder = model.model.language_model
    decoder.embed_tokens.weight.normal_(0.0, EMBEDDING_STD)
    for layer in decoder.layers:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight.mul_((2 * len(decoder.layers)) ** -0.5)
    return model


def save_preprocessor(directory: Path) -> None:
    (directory / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")


def generation_config(tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    return GenerationConfig(
        do_sample=False,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
