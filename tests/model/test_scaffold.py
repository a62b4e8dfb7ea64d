"""The scaffolding: its parameter counts, its definition, and that it can be saved and put back."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from vitalrt.errors import CheckpointError, VitalError
from vitalrt.model.scaffold import PROJECTORS, Scaffold, VisualProjector

WIDTH, FEATURE_WIDTH = 24, 10


def tiny_decoder(tied=True):
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=tied,
    )
    return Qwen3ForCausalLM(config).eval()


@pytest.fixture
def scaffold():
    torch.manual_seed(0)
    return Scaffold.build("res_mlp_ln", WIDTH, FEATURE_WIDTH, tiny_decoder()).eval()


def test_equation_5_written_out():
    torch.manual_seed(0)
    projector = VisualProjector("res_mlp_ln", WIDTH, FEATURE_WIDTH).double().eval()
    z = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    inner = torch.nn.functional.gelu(projector.hidden(projector.norm_in(z)))
    expected = projector.norm_out(projector.output(inner + z))
    torch.testing.assert_close(projector(z), expected)


@pytest.mark.parametrize("variant", PROJECTORS)
def test_every_variant_projects_each_step_without_seeing_later_ones(variant):
    torch.manual_seed(0)
    projector = VisualProjector(variant, WIDTH, FEATURE_WIDTH).eval()
    z = torch.randn(2, 4, WIDTH, requires_grad=True)
    projected = projector(z)
    assert projected.shape == (2, 4, FEATURE_WIDTH)
    torch.testing.assert_close(projector(z[:, :2]), projected[:, :2])
    (gradient,) = torch.autograd.grad(projected[:, 1].square().sum(), z)
    assert gradient[:, 1].abs().max() > 0
    assert gradient[:, 2:].abs().max() == 0


def test_dropout_is_on_in_training_only_and_follows_torch_seed():
    projector = VisualProjector("res_mlp_ln", WIDTH, FEATURE_WIDTH)
    z = torch.randn(1, 2, WIDTH)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(projector(z))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(projector.eval()(z), projector(z))


def test_paper_counts():
    with torch.device("meta"):
        projector = VisualProjector("res_mlp_ln", 4096, 1152)
    assert round(sum(p.numel() for p in projector.parameters()) / 1e6, 2) == 21.51


def test_text_logits_are_the_decoder_on_latent_then_tokens(scaffold):
    z = torch.randn(2, 3, WIDTH)
    chain_ids = torch.randint(0, 50, (2, 3, 4))
    chain_ids[1, 2, 2:] = -100
    logits = scaffold.text_logits(z, chain_ids)
    embed = scaffold.text_decoder.get_input_embeddings()
    inputs = torch.cat((scaffold.pj_in(z[0, 1])[None], embed(chain_ids[0, 1, :3])))[None]
    torch.testing.assert_close(logits[0, 1], scaffold.text_decoder(inputs_embeds=inputs).logits[0])


@pytest.mark.parametrize("variant", PROJECTORS)
@pytest.mark.parametrize("tied", [True, False])
def test_saved_and_put_back(tmp_path, variant, tied):
    scaffold = Scaffold.build(variant, WIDTH, FEATURE_WIDTH, tiny_decoder(tied)).eval()
    scaffold.save(tmp_path)
    loaded = Scaffold.load(tmp_path)
    z, chain_ids = torch.randn(1, 2, WIDTH), torch.randint(0, 50, (1, 2, 3))
    assert torch.equal(loaded.projector(z), scaffold.projector(z))
    assert torch.equal(loaded.text_logits(z, chain_ids), scaffold.text_logits(z, chain_ids))


def test_errors(tmp_path, scaffold):
    with pytest.raises(VitalError, match="projector"):
        VisualProjector("resnet", WIDTH, FEATURE_WIDTH)
    with pytest.raises(CheckpointError, match="scaffold"):
        Scaffold.load(tmp_path)
