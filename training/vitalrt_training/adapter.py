"""LoRA on the language model of a Qwen3-VL; vision encoder and backbone stay frozen (VITAL section 4.1)."""

from __future__ import annotations

from dataclasses import dataclass

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Qwen3VLForConditionalGeneration

from vitalrt.errors import VitalError

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS = rf".*language_model\.layers\..*\.({'|'.join(PROJECTIONS)})"


@dataclass(frozen=True)
class AdapterConfig:
    """rank r, alpha (the update is scaled by alpha / r) and dropout of every projection of every decoder layer."""

    rank: int = 64
    alpha: int = 128
    dropout: float = 0.05

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 <= self.dropout < 1:
            raise VitalError(f"adapter: expected rank >= 1 and dropout in [0, 1), got {self.rank}, {self.dropout}")


def attach_adapter(backbone: Qwen3VLForConditionalGeneration, config: AdapterConfig) -> PeftModel:
    """Everything but the new matrices is frozen. The backbone is changed in place: its layers now carry the adapter."""
    lora = LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=TARGETS, bias="none"
    )
    model = get_peft_model(backbone, lora)
    assert isinstance(model, PeftModel)
    return model
