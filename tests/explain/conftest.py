"""A scaffold of random weights, small enough to recompute by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from vitalrt.model.scaffold import Scaffold

WIDTH, FEATURE_WIDTH = 24, 10


@pytest.fixture
def scaffold():
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.5,  # so that what comes next depends on what was read
        eos_token_id=7,
    )
    return Scaffold.build("res_mlp_ln", WIDTH, FEATURE_WIDTH, Qwen3ForCausalLM(config)).eval()
