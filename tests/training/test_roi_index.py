"""The index of regions from training tables: each target once, of training pictures only, by what it shows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vitalrt_training.data.roi_index import index_regions
from vitalrt_training.data.tables import IMAGES_SCHEMA, SAMPLES_SCHEMA, load_tables, write_rows

# Of each sample: its picture, its target, and its feature's only nonzero place (None: no feature).
SAMPLES = [
    ("a", "cyst", 0),
    ("a", "cyst", 1),
    ("a", "liver", 2),
    ("b", "cyst", None),
    ("b", "cyst", 3),
    ("held out", "liver", 4),
]
MODALITIES = {"a": "ct", "b": "mri", "held out": "ct"}


@pytest.fixture
def tables(tmp_path):
    images = [
        {"id": name, "bytes": b"x", "sha256": "0", "modality": modality, "source": "s", "volume_id": name}
        | {"split": "validation" if name == "held out" else "train"}
        for name, modality in MODALITIES.items()
    ]
    texts = ("question", "answer", "question_type", "target_type", "provenance")
    samples = [
        dict.fromkeys(texts, "t")
        | {"id": str(number), "image_id": image, "target_name": target, "chain": []}
        | {"roi_feature": None if place is None else np.eye(5)[place], "encoder_id": None if place is None else "e"}
        for number, (image, target, place) in enumerate(SAMPLES)
    ]
    write_rows(tmp_path / "images.parquet", images, IMAGES_SCHEMA)
    write_rows(tmp_path / "samples.parquet", samples, SAMPLES_SCHEMA)
    return load_tables(tmp_path, cache_dir=tmp_path / "cache")


def test_each_target_of_a_training_picture_comes_once(tables):
    index = index_regions(tables, most=99)
    assert index.labels == ["cyst, ct", "liver, ct", "cyst, mri"]
    assert torch.equal(index.features.float(), torch.eye(5)[[0, 2, 3]])
    assert index.encoder_id == "e"


def test_of_many_an_even_share_is_kept(tables):
    assert index_regions(tables, most=2).labels == ["cyst, ct", "cyst, mri"]
    assert index_regions(tables, most=0) is None


def test_without_features_there_is_no_index(tables, tmp_path):
    rows = [row | {"roi_feature": None, "encoder_id": None} for row in tables.samples]
    write_rows(tmp_path / "samples.parquet", rows, SAMPLES_SCHEMA)
    assert index_regions(load_tables(tmp_path, cache_dir=tmp_path / "other"), most=99) is None
