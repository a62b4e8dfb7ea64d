"""Frozen configurations, read once from a checkpoint directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vitalrt.errors import CheckpointError, VitalError

SUPPORTED = (
    "Qwen3-VL dense checkpoints (architecture Qwen3VLForConditionalGeneration, model_type qwen3_vl): "
    "Instruct and Thinking, 2B, 4B, 8B, 32B and any other size"
)
MAX_LATENT_STEPS = 64
SCAFFOLD_CONFIG, SCAFFOLD_WEIGHTS = "scaffold.json", "scaffold.safetensors"
SCAFFOLD_TOKENIZER = "scaffold_tokenizer.json"
"""The text decoder's, where it is not the model's own."""
ROI_INDEX = "roi_index.safetensors"
"""Features of regions that were trained on, to compare with."""
SCAFFOLD_FILES = (SCAFFOLD_CONFIG, SCAFFOLD_WEIGHTS, SCAFFOLD_TOKENIZER, ROI_INDEX)
ENCODER = "encoder"
"""Training's scaffolding, beside the weights it was trained with, and the folder of the vision encoder that its
projector aims at. Inference reads none of it; explanations do."""


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower. Widths in features; num_position_embeddings is a square grid, flattened."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    out_hidden_size: int
    num_position_embeddings: int
    deepstack_visual_indexes: tuple[int, ...]
    rope_theta: float = 10000.0

    @property
    def patch_dim(self) -> int:
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class DecoderConfig:
    """The language model. mrope_section: rotary frequencies given to time, height and width."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    tie_word_embeddings: bool

    @property
    def kv_values_per_token(self) -> int:
        """Numbers (not bytes) that one token occupies in the KV cache, over all layers."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim


@dataclass(frozen=True)
class ModelConfig:
    """A Qwen3-VL checkpoint's config.json, as far as the mathematics needs it."""

    vision: VisionConfig
    decoder: DecoderConfig
    image_token_id: int
    video_token_id: int
    dtype: str

    @classmethod
    def from_directory(cls, directory: Path) -> ModelConfig:
        return cls.from_dict(read_json(directory / "config.json"))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ModelConfig:
        """config: the parsed config.json, as any transformers release writes it.  Raises CheckpointError."""
        if config.get("model_type") != "qwen3_vl":
            came = f"model_type {config.get('model_type')!r}, architectures {config.get('architectures')}"
            raise CheckpointError(f"model: expected {SUPPORTED}; got {came}")
        try:
            text, vision = config["text_config"], config["vision_config"]
            _require("text_config", text, {"hidden_act": "silu", "attention_bias": False})
            _require("vision_config", vision, {"hidden_act": "gelu_pytorch_tanh"})
            # transformers 4 wrote rope_scaling and rope_theta; 5 writes rope_parameters.
            rope = {"rope_theta": text.get("rope_theta"), **(text.get("rope_scaling") or {})}
            rope |= text.get("rope_parameters") or {}
            _require("text_config.rope_parameters", rope, {"rope_type": "default"})
            return cls(
                vision=VisionConfig(**_given(VisionConfig, vision, without=("rope_theta",)), **_vision_rope(vision)),
                decoder=DecoderConfig(
                    **_given(DecoderConfig, text, without=("rope_theta", "mrope_section", "tie_word_embeddings")),
                    rope_theta=float(rope["rope_theta"] or 500000.0),
                    mrope_section=tuple(rope.get("mrope_section") or (24, 20, 20)),
                    tie_word_embeddings=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
                ),
                image_token_id=config["image_token_id"],
                video_token_id=config["video_token_id"],
                dtype=str(config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or "float32"),
            )
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"model: config.json lacks a field that Qwen3-VL needs: {error}") from error


def _given(kind: type, values: Mapping[str, Any], without: tuple[str, ...]) -> dict[str, Any]:
    """The fields of a config dataclass that `values` holds, lists made hashable."""
    names = [f.name for f in fields(kind) if f.name in values and f.name not in without]
    return {name: tuple(values[name]) if isinstance(values[name], list) else values[name] for name in names}


def _vision_rope(vision: Mapping[str, Any]) -> dict[str, Any]:
    rope = vision.get("rope_parameters") or {}
    _require("vision_config.rope_parameters", rope, {"rope_type": "axial"})
    return {"rope_theta": float(rope["rope_theta"])} if rope.get("rope_theta") else {}


def _require(where: str, values: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for key, value in expected.items():
        if values.get(key, value) != value:
            came = f"expected {value!r}, got {values[key]!r}"
            raise CheckpointError(f"model: {where}.{key}: {came}; supported: {SUPPORTED}")


@dataclass(frozen=True)
class VitalConfig:
    """vital.json: what is ours in a checkpoint directory.

    k: default number of latent steps.  feedback: which vector a latent step feeds back; "final_norm" is the hidden
    state after the last RMSNorm (VITAL section 3.1).  provenance, report: free text and figures of how it was trained.
    encoder: the id of the vision encoder whose features its projector aims at; "" where it has none.
    """

    k: int = 4
    feedback: str = "final_norm"
    provenance: str = ""
    report: Mapping[str, Any] | None = None
    encoder: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or not 0 <= self.k <= MAX_LATENT_STEPS:
            raise CheckpointError(f"vital.json: k: expected 0..{MAX_LATENT_STEPS}, got {self.k!r}")
        if self.feedback != "final_norm":
            raise CheckpointError(f"vital.json: feedback: expected 'final_norm', got {self.feedback!r}")

    @classmethod
    def from_directory(cls, directory: Path) -> VitalConfig:
        path = directory / "vital.json"
        if not path.is_file():
            return cls()
        values = read_json(path)
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise CheckpointError(f"vital.json: unknown keys {unknown}")
        return cls(**values)


@dataclass(frozen=True)
class EngineConfig:
    """Sizes fixed when an engine is built.

    cache_tokens: KV cache capacity in tokens, rounded up to whole pages; None takes what 2 GiB hold, at most 32,768.
    page_size: tokens per page.  max_batch: sequences that run at the same time; more wait, up to max_waiting (None:
    any number).  prefill_tokens: of prompts, between two steps of the running batch; longer ones go in pieces.
    prefix_cache: whether requests share the keys, values and image features of what they begin with.
    vision_cache_bytes: what the features of past images may take.
    """

    cache_tokens: int | None = None
    page_size: int = 16
    max_batch: int = 64
    max_waiting: int | None = None
    prefill_tokens: int = 2048
    prefix_cache: bool = True
    vision_cache_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        for name in ("cache_tokens", "page_size", "max_batch", "max_waiting", "prefill_tokens"):
            value = getattr(self, name)
            if not (name in ("cache_tokens", "max_waiting") and value is None) and (
                not isinstance(value, int) or value < 1
            ):
                raise VitalError(f"{name}: expected a positive int, got {value!r}")
        if not isinstance(self.vision_cache_bytes, int) or self.vision_cache_bytes < 0:
            raise VitalError(f"vision_cache_bytes: expected an int of at least 0, got {self.vision_cache_bytes!r}")


def read_json(path: Path, argument: str = "model") -> dict[str, Any]:
    """argument: whose directory it is, for the message of a CheckpointError."""
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{argument}: {path.parent} has no {path.name}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{argument}: {path} is not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{argument}: {path} is not a JSON object")
    return values
