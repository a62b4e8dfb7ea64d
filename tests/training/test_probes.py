"""Probes of a trained model: cosine similarity between latents, gradient of each loss.  N samples, K latent steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3VLForConditionalGeneration

from vitalrt.errors import VitalError
from vitalrt.model.scaffold import Scaffold
from vitalrt_training.adapter import AdapterConfig, attach_adapter
from vitalrt_training.data.batches import PhantomBatches, pad_targets
from vitalrt_training.data.phantom import ask, draw_phantom
from vitalrt_training.losses import LossConfig, Mean
from vitalrt_training.paradigms.vital import VitalBatch, VitalModel
from vitalrt_training.probes import cosine_matrix, gradient_norms, probe

WIDTH, FEATURE_WIDTH = 192, 12


def test_cosine_matrix_by_hand():
    """One sample turns by 90 degrees and then back to front, the other only grows."""
    turning = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    growing = torch.tensor([[3.0, 4.0], [6.0, 8.0], [0.3, 0.4]])
    expected = torch.tensor([[1.0, 0.5, 0.0], [0.5, 1.0, 0.5], [0.0, 0.5, 1.0]])
    torch.testing.assert_close(cosine_matrix(torch.stack((turning, growing))), expected)


@pytest.mark.parametrize("shape", [(0, 4, 8), (4, 8)])
def test_cosine_matrix_needs_samples_steps_and_width(shape):
    with pytest.raises(VitalError, match=r"latents: expected \[N, K, d\]"):
        cosine_matrix(torch.zeros(shape))


class LinearLosses(nn.Module):
    """Losses of known gradient: task (3 a + 4 b) / 2, visual 6 a, and a text loss for which nothing counts."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.ParameterDict({"a": torch.ones(()), "b": torch.ones(()), "frozen": torch.ones(())})
        self.backbone["frozen"].requires_grad_(False)
        self.scaffold = nn.Parameter(torch.ones(()))

    def forward(self, batch):
        a, b = self.backbone["a"], self.backbone["b"]
        one, none = torch.tensor(1), torch.tensor(0)
        return {
            "task": Mean((3 * a + 4 * b) * self.backbone["frozen"] * self.scaffold, torch.tensor(2)),
            "text": Mean(a * 0, none),
            "visual": Mean(6 * a, one),
        }

    def weight_of(self, name):
        return {"task": 1.0, "text": 1.0, "visual": 0.1}[name]


def test_gradient_norms_by_hand():
    assert gradient_norms(LinearLosses(), None) == pytest.approx({"task": 2.5, "visual": 0.6})


@pytest.fixture
def model(random_phantom):
    """In training, with dropout everywhere and the vision tower switched to eval by its owner."""
    torch.manual_seed(0)
    backbone = Qwen3VLForConditionalGeneration.from_pretrained(random_phantom, dtype=torch.float32)
    backbone = attach_adapter(backbone, AdapterConfig(rank=4, alpha=8, dropout=0.5))
    for name, parameter in backbone.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 16}
    decoder = Qwen3ForCausalLM(Qwen3Config(vocab_size=50, num_attention_heads=2, num_key_value_heads=1, **sizes))
    model = VitalModel(backbone, Scaffold.build("res_mlp_ln", WIDTH, FEATURE_WIDTH, decoder), LossConfig()).train()
    backbone.get_base_model().model.visual.eval()
    return model


@pytest.fixture
def batch(random_phantom):
    """Two pictures, one question each, with one and two steps."""
    phantoms = [draw_phantom("test", 1, index) for index in range(2)]
    prompt = PhantomBatches(random_phantom, seed=1, images_per_batch=2).collate([(p, ask(p)[:1]) for p in phantoms])
    num_steps = torch.tensor([1, 2])
    chain_ids = pad_targets([[5, 6], [], [7], [8, 9]]).view(2, 2, -1)
    roi = torch.randn(2, FEATURE_WIDTH, generator=torch.Generator().manual_seed(2))
    return VitalBatch(prompt, num_steps, chain_ids, roi, torch.tensor([True, True]), None, ["a", "b"])


def test_gradient_norms_are_those_of_backward(model, batch):
    norms = gradient_norms(model, batch)
    model.eval()
    adapter = [p for name, p in model.named_parameters() if "lora_" in name]
    for name in ("task", "text", "visual"):
        model.zero_grad()
        (model.weight_of(name) * model(batch)[name].value()).backward()
        expected = torch.cat([p.grad.flatten() for p in adapter if p.grad is not None]).norm()
        assert norms[name] == pytest.approx(float(expected), rel=1e-5)
        assert norms[name] > 0


def test_probing_leaves_no_trace(model, batch):
    modes = {name: module.training for name, module in model.named_modules()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    state = torch.get_rng_state()
    probe(model, [batch], num_steps=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all((p.grad == 1).all() for p in model.parameters() if p.requires_grad)


def test_a_probe_makes_every_sample_take_all_steps(model, batch):
    found = probe(model, [batch, batch], num_steps=3)
    model.eval()
    with torch.no_grad():
        loop = model.think(replace(batch, num_steps=torch.tensor([3, 3])))
    assert (found["samples"], found["batches"]) == (4, 2)
    expected = cosine_matrix(torch.cat(loop.latents, dim=1))
    torch.testing.assert_close(torch.tensor(found["cosine"]), expected, rtol=0, atol=1e-5)
    assert found["gradient_norms"] == pytest.approx(gradient_norms(model, batch), rel=1e-5)


def test_a_model_that_does_not_think_has_no_matrix(model, batch):
    silent = replace(batch, num_steps=torch.tensor([0, 0]), chain_ids=torch.zeros(2, 0, 0, dtype=torch.int64))
    found = probe(model, [silent], num_steps=0)
    assert found["cosine"] == []
    assert set(found["gradient_norms"]) == {"task"}


def test_a_probe_needs_a_batch(model):
    with pytest.raises(VitalError, match="batches: expected at least one"):
        probe(model, [], num_steps=2)
