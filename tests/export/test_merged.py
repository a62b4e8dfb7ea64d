"""A checkpoint with its adapter merged: the same model, deployable on its own."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    Qwen3VLForConditionalGeneration,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import vitalrt
from vitalrt import export
from vitalrt.api import BUNDLED
from vitalrt.errors import CheckpointError, VitalError
from vitalrt.model.vision_encoder import VisionEncoder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Random LoRA matrices for the bundled model, with a vital.json and scaffolding of their own."""
    directory = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    backbone = Qwen3VLForConditionalGeneration.from_pretrained(BUNDLED, dtype=torch.float32)
    lora = LoraConfig(
        r=4, lora_alpha=8, target_modules=r".*language_model.*(q_proj|down_proj)", init_lora_weights=False
    )
    get_peft_model(backbone, lora).save_pretrained(str(directory))
    (directory / "vital.json").write_text(json.dumps({"k": 3, "provenance": "random"}))
    (directory / "scaffold.json").write_text("{}")
    return directory


def test_merged_is_the_model_with_its_adapter(adapter, tmp_path):
    out = export.merged(BUNDLED, adapter, tmp_path / "deployed")
    alone, together = vitalrt.load(out, device="cpu"), vitalrt.load(BUNDLED, adapter=adapter, device="cpu")
    assert alone.checkpoint.vital == together.checkpoint.vital
    assert alone.checkpoint.vital.k == 3
    # The model's own scaffolding belongs to other latents and stays behind.
    assert (BUNDLED / "scaffold.safetensors").is_file() and not (out / "scaffold.safetensors").is_file()
    assert (out / "scaffold.json").read_text() == "{}"
    changed = 0
    base = dict(vitalrt.load(device="cpu").weights.named_parameters())
    for (name, ours), (_, theirs) in zip(
        alone.weights.named_parameters(), together.weights.named_parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=2**-8, atol=1e-6)  # merged in float32, kept in bfloat16
        changed += not torch.equal(ours, base[name])
    assert changed == 2 * alone.checkpoint.config.decoder.num_hidden_layers


def test_the_encoder_goes_along_where_it_is_the_adapters(adapter, tmp_path):
    encoder, other = tmp_path / "encoder", tmp_path / "other"
    config = SiglipVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=16, patch_size=8
    )
    for directory in (encoder, other):
        SiglipVisionModel(config).save_pretrained(directory)
        SiglipImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(directory)
    vital = {"k": 3, "encoder": VisionEncoder(encoder).id}
    adapter = shutil.copytree(adapter, tmp_path / "adapter")
    (adapter / "vital.json").write_text(json.dumps(vital))
    with pytest.raises(CheckpointError, match=f"encoder: expected {vital['encoder']}"):
        export.merged(BUNDLED, adapter, tmp_path / "deployed", encoder=other)
    out = export.merged(BUNDLED, adapter, tmp_path / "deployed", encoder=encoder)
    assert VisionEncoder(out / "encoder").id == vitalrt.load(out, device="cpu").checkpoint.vital.encoder


def test_a_failed_merge_leaves_nothing(adapter, tmp_path):
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    for file in adapter.iterdir():
        (wrong / file.name).write_bytes(file.read_bytes())
    config = json.loads((wrong / "adapter_config.json").read_text()) | {"use_dora": True}
    (wrong / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="use_dora"):
        export.merged(BUNDLED, wrong, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["wrong"]


def test_a_directory_with_content_is_left_alone(adapter, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(VitalError, match="out: expected a new or empty directory"):
        export.merged(BUNDLED, adapter, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
