"""Random models, tables of a few phantoms and a finished run, for every test of training."""

from __future__ import annotations

from dataclasses import replace
from itertools import zip_longest

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen3Config, Qwen3ForCausalLM

from vitalrt_training.adapter import AdapterConfig
from vitalrt_training.backbone import generation_config, new_backbone, phantom_config, save_preprocessor
from vitalrt_training.data.phantom import ask, draw_phantom
from vitalrt_training.data.tables import IMAGES_SCHEMA, SAMPLES_SCHEMA, write_rows
from vitalrt_training.recipes import vital_8b
from vitalrt_training.tokenizer import save_tokenizer, train_tokenizer
from vitalrt_training.vital_trainer import train_vital

FEATURE_WIDTH = 12


@pytest.fixture(scope="session")
def random_phantom(tmp_path_factory):
    """A phantom model that has learnt nothing, as a checkpoint directory."""
    directory = tmp_path_factory.mktemp("random_phantom")
    texts = [
        text for index in range(20) for s in ask(draw_phantom("train", 0, index)) for text in (s.question, s.answer)
    ]
    tokenizer = train_tokenizer(texts, 400)
    save_tokenizer(tokenizer, directory)
    save_preprocessor(directory)
    new_backbone(phantom_config(tokenizer), seed=0).save_pretrained(directory)
    generation_config(tokenizer).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def write_tables():
    """A function that writes phantoms and all their questions as training tables."""

    def write(folder, phantoms, *splits):
        """splits: of the phantoms, the last one for the rest of them."""
        rng = np.random.default_rng(0)
        images, rows = [], []
        for phantom, split in zip_longest(phantoms, splits, fillvalue=splits[-1]):
            name = f"{phantom.index}.png"
            Image.fromarray(phantom.image).save(folder / name)
            images.append(
                {
                    "id": name,
                    "path": name,
                    "sha256": "0",
                    "modality": phantom.modality,
                    "source": "phantom",
                    "split": split,
                    "volume_id": name,
                }
            )
            for sample in ask(phantom):
                feature = rng.normal(size=FEATURE_WIDTH)
                rows.append(
                    {
                        "id": f"s{len(rows)}",
                        "image_id": name,
                        "question": sample.question,
                        "answer": sample.answer,
                        "question_type": sample.question_type,
                        "target_name": sample.target_name,
                        "target_type": sample.target_type,
                        "chain": list(sample.chain),
                        "roi_feature": None if len(rows) % 4 == 0 else (feature / np.linalg.norm(feature)).tolist(),
                        "encoder_id": "random",
                        "provenance": "test",
                    }
                )
        write_rows(folder / "images.parquet", images, IMAGES_SCHEMA)
        write_rows(folder / "samples.parquet", rows, SAMPLES_SCHEMA)

    return write


@pytest.fixture(scope="session")
def recipe(tmp_path_factory, write_tables):
    """Backbone, text decoder and tables of six phantoms; every fourth sample lacks its ROI feature."""
    root = tmp_path_factory.mktemp("vital")
    backbone, decoder, data = (root / name for name in ("backbone", "decoder", "data"))
    for directory in (backbone, decoder, data):
        directory.mkdir()
    phantoms = [draw_phantom("train", 5, index) for index in range(6)]
    samples = [sample for phantom in phantoms for sample in ask(phantom)]
    tokenizer = train_tokenizer([t for s in samples for t in (s.question, s.answer, *s.chain)], 400)
    for directory in (backbone, decoder):
        save_tokenizer(tokenizer, directory)
    save_preprocessor(backbone)
    new_backbone(phantom_config(tokenizer), seed=0).save_pretrained(backbone)
    generation_config(tokenizer).save_pretrained(backbone)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=True,
    )
    torch.manual_seed(1)
    Qwen3ForCausalLM(config).save_pretrained(decoder)
    write_tables(data, phantoms, "train")
    return replace(
        vital_8b(),
        backbone=str(backbone),
        text_decoder=str(decoder),
        data=str(data),
        feature_width=FEATURE_WIDTH,
        adapter=AdapterConfig(rank=4, alpha=8, dropout=0.0),
        schedule="two_phase",
        epochs=(1.0, 1.0),
        batch_size=4,
        learning_rate=1e-3,
        precision="no",
        recompute=False,
        checkpoint_every=2,
    )


@pytest.fixture(scope="session")
def finished(recipe, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    train_vital(recipe, run_dir)
    return run_dir
