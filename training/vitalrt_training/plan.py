"""What a VITAL run would take, from configurations alone: nothing is downloaded and no weight is made."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, Qwen3Config, Qwen3VLConfig
from transformers import Qwen3VLForConditionalGeneration as Qwen3VL

from vitalrt.checkpoint import resolve
from vitalrt.errors import VitalError
from vitalrt.model.scaffold import Scaffold
from vitalrt_training.adapter import attach_adapter
from vitalrt_training.backbone import TINY, tiny_decoder_config
from vitalrt_training.data.batches import Asked, Collator
from vitalrt_training.data.tables import Tables, load_tables
from vitalrt_training.losses import IGNORED
from vitalrt_training.recipes import Phase, VitalRecipe
from vitalrt_training.written import write_out

# Shapes of the models that recipes name, so that a plan needs no network. Source: their config.json on the hub.
VISION: dict[str, Any] = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "patch_size": 16,
}
KNOWN_BACKBONES: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-VL-8B-Instruct": {
        "text": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
        "vision": {**VISION, "out_hidden_size": 4096, "deepstack_visual_indexes": [8, 16, 24]},
        "tied": False,
    },
    "Qwen/Qwen3-VL-2B-Instruct": {
        "text": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
        "vision": {
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_heads": 16,
            "patch_size": 16,
            "out_hidden_size": 2048,
            "deepstack_visual_indexes": [5, 11, 17],
        },
        "tied": True,
    },
}
KNOWN_DECODERS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-1.7B": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28},
    "Qwen/Qwen3-0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28},
}
QWEN3: dict[str, Any] = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128}
PAPER_SAMPLES = {1: 19_556, 2: 19_872, 3: 1_796, 4: 10_975}
"""Training samples by K where no table is at hand: 85 % of the paper's 23,007, 23,379, 2,113 and 12,912."""

PAPER_TOKENS = 300
"""Of a sample where no table is at hand: a picture of 512 x 512 pixels, a question, four latents, a short answer."""
PAPER_THOUGHT_TOKENS = 920
"""Of a chain that is written out where no table is at hand: as many as the paper's explicit chain of thought has."""
SAMPLES_TOKENIZED = 64

ACTIVATION_BYTES = 34  # per token, width and layer, in 16 bits: Korthikanti et al. 2022, equation 1, without attention
BYTES_FROZEN = 2  # bf16
BYTES_TRAINABLE = 16  # fp32 weight, gradient and two AdamW moments


@dataclass(frozen=True)
class Plan:
    """parameters: of the backbone and of what is trained, by module.  steps, samples: per phase.

    tokens_per_sample: per phase, prompt, latents and what is written.  tokens: in all phases.  weight_bytes: weights,
    gradients and optimiser state.  activation_bytes: what one step of all processes together keeps for its backward
    pass in the phase with the longest samples, nothing recomputed.
    """

    parameters: dict[str, int]
    trainable: int
    steps: list[int]
    samples: list[int]
    tokens_per_sample: list[float]
    tokens: int
    weight_bytes: int
    activation_bytes: int

    def as_dict(self) -> dict[str, Any]:
        return {
            "parameters": self.parameters,
            "trainable": self.trainable,
            "samples_by_phase": self.samples,
            "steps_by_phase": self.steps,
            "tokens_per_sample_by_phase": self.tokens_per_sample,
            "tokens": self.tokens,
            "weight_bytes": self.weight_bytes,
            "activation_bytes": self.activation_bytes,
        }


def plan(recipe: VitalRecipe) -> Plan:
    """Of the tables in recipe.data; where there are none, of as many samples as the paper has."""
    tables = load_tables(recipe.data) if Path(recipe.data).is_dir() else None
    counts = PAPER_SAMPLES if tables is None else Counter(tables.num_steps[tables.select("train")].tolist())
    if tables is None:
        tokens_per_sample = [paper_tokens(recipe, phase) for phase in recipe.phases]
    else:
        tokens_per_sample = mean_tokens(recipe, tables)
    with torch.device("meta"):
        backbone = Qwen3VL(backbone_config(recipe.backbone))
        width = backbone.config.get_text_config().hidden_size
        decoder = AutoModelForCausalLM.from_config(decoder_config(recipe.text_decoder, backbone.config))
        scaffold = Scaffold.build(recipe.projector, width, recipe.feature_width, decoder)
        num_backbone = num_parameters(backbone)
        adapted = attach_adapter(backbone, recipe.adapter)
    parameters = {
        "backbone (frozen)": num_backbone,
        "LoRA": sum(p.numel() for p in adapted.parameters() if p.requires_grad),
    }
    if recipe.losses.visual_weight:
        parameters["visual projector"] = num_parameters(scaffold.projector)
    if recipe.losses.text_weight:
        parameters["pj_in"] = num_parameters(scaffold.pj_in)
        parameters["text decoder"] = num_parameters(scaffold.text_decoder)
    trainable = sum(parameters.values()) - num_backbone
    per_epoch = [
        sum(n for steps, n in counts.items() if phase.min_steps <= steps <= phase.max_steps) for phase in recipe.phases
    ]
    steps = [int(n // recipe.batch_size * phase.epochs) for n, phase in zip(per_epoch, recipe.phases, strict=True)]
    text = backbone.config.get_text_config()
    tokens = recipe.batch_size * sum(num * each for num, each in zip(steps, tokens_per_sample, strict=True))
    return Plan(
        parameters,
        trainable,
        steps,
        per_epoch,
        tokens_per_sample,
        round(tokens),
        num_backbone * BYTES_FROZEN + trainable * BYTES_TRAINABLE,
        round(
            recipe.batch_size * max(tokens_per_sample) * text.hidden_size * text.num_hidden_layers * ACTIVATION_BYTES
        ),
    )


def paper_tokens(recipe: VitalRecipe, phase: Phase) -> float:
    """Of a sample, where no table is at hand."""
    if not recipe.written or phase.k is None:
        return PAPER_TOKENS
    written = sum(samples * max(0, steps - phase.k) / steps for steps, samples in PAPER_SAMPLES.items())
    return PAPER_TOKENS + PAPER_THOUGHT_TOKENS * written / sum(PAPER_SAMPLES.values())


def mean_tokens(recipe: VitalRecipe, tables: Tables) -> list[float]:
    """Per phase, over some of the training samples, of whatever length their chains are; with k_weights as if each
    thought as long as its chain.  Needs the backbone's tokenizer, so a directory or a hub id that is at hand.
    """
    collator = Collator(resolve(recipe.backbone, "backbone"))
    rows = tables.select("train")[:: max(1, len(tables.select("train")) // SAMPLES_TOKENIZED)]
    lengths = np.zeros((len(rows), len(recipe.phases)))
    for sampled, row in enumerate(rows.tolist()):
        sample = tables.samples[row]
        chain, picture = sample["chain"], tables.read_picture(row)
        steps = [len(chain) if phase.k is None else phase.k for phase in recipe.phases]
        written = [write_out(chain[k:] if recipe.written else (), sample["answer"]) for k in steps]
        batch = collator.collate([Asked([picture], [(sample["question"], text) for text in written])])
        prompt = batch.prefix.ids.numel() + batch.question.ids.shape[1]
        lengths[sampled] = prompt + (batch.answer_ids != IGNORED).sum(1).numpy() + steps
    return [float(mean) for mean in lengths.mean(0)]


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def backbone_config(name: str) -> Qwen3VLConfig:
    """Of a directory, or of a hub id whose shape is known here.  Raises VitalError otherwise."""
    if Path(name).is_dir():
        return Qwen3VLConfig.from_pretrained(name)
    if name not in KNOWN_BACKBONES:
        raise VitalError(
            f"backbone: expected a directory or one of {sorted(KNOWN_BACKBONES)} to plan with, got {name!r}"
        )
    known = KNOWN_BACKBONES[name]
    return Qwen3VLConfig(
        text_config={**QWEN3, **known["text"]}, vision_config=known["vision"], tie_word_embeddings=known["tied"]
    )


def decoder_config(name: str, backbone: Qwen3VLConfig) -> PreTrainedConfig:
    if name == TINY:
        return tiny_decoder_config(backbone)
    if Path(name).is_dir():
        return AutoConfig.from_pretrained(name)
    if name not in KNOWN_DECODERS:
        raise VitalError(
            f"text_decoder: expected a directory or one of {sorted(KNOWN_DECODERS)} to plan with, got {name!r}"
        )
    return Qwen3Config(**QWEN3, **KNOWN_DECODERS[name], num_attention_heads=16, tie_word_embeddings=True)


def print_plan(recipe: VitalRecipe, found: Plan) -> None:
    console = Console()
    table = Table("module", "parameters", "millions")
    for name, count in found.parameters.items():
        table.add_row(name, f"{count:,}", f"{count / 1e6:,.1f}")
    table.add_row("trainable", f"{found.trainable:,}", f"{found.trainable / 1e6:,.1f}", style="bold")
    console.print(table)
    table = Table("phase", "chain", "K", "epochs", "samples an epoch", "steps", "tokens a sample")
    rows = zip(recipe.phases, found.samples, found.steps, found.tokens_per_sample, strict=True)
    for number, (phase, samples, steps, tokens) in enumerate(rows, 1):
        thinks = "as the chain" if phase.k is None else str(phase.k)
        if phase.k is None and recipe.k_weights:
            thinks = f"drawn from 0..{min(phase.max_steps, len(recipe.k_weights) - 1)}"
        table.add_row(
            str(number),
            f"{phase.min_steps}..{phase.max_steps}",
            thinks,
            f"{phase.epochs:g}",
            f"{samples:,}",
            f"{steps:,}",
            f"{tokens:,.0f}",
        )
    console.print(table)
    console.print(
        f"tokens: {found.tokens:,}\n"
        f"memory, over all processes that share it: weights, gradients and optimiser state "
        f"{found.weight_bytes / 2**30:.2f} GiB, activations of a step {found.activation_bytes / 2**30:.2f} GiB"
    )
