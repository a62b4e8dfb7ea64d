"""The index of regions: nearest by cosine, saved and read back, refused where it is broken."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import normalize

from vitalrt.errors import CheckpointError
from vitalrt.explain.roi_index import RoiIndex


@pytest.fixture
def index():
    features = normalize(torch.randn(30, 6, generator=torch.Generator().manual_seed(0)), dim=-1)
    return RoiIndex(features.half(), [f"region {n}" for n in range(30)], "siglip-1")


@pytest.mark.parametrize("count", [1, 5, 99])
def test_the_nearest_are_those_of_the_greatest_cosines(index, count):
    aims = normalize(torch.randn(3, 6, generator=torch.Generator().manual_seed(1)), dim=-1)
    for aim, found in zip(aims.numpy(), index.nearest(aims, count), strict=True):
        cosines = index.features.float().numpy() @ aim
        order = np.argsort(-cosines)[: min(count, 30)]
        assert [neighbour.label for neighbour in found] == [f"region {n}" for n in order]
        assert [neighbour.cosine for neighbour in found] == pytest.approx(cosines[order].tolist(), abs=1e-6)


def test_it_is_read_back_as_it_was_saved(index, tmp_path):
    index.save(tmp_path / "index.safetensors")
    loaded = RoiIndex.load(tmp_path / "index.safetensors")
    assert torch.equal(loaded.features, index.features)
    assert (list(loaded.labels), loaded.encoder_id) == (index.labels, index.encoder_id)


@pytest.mark.parametrize(
    ("features", "metadata"),
    [
        (torch.zeros(2, 3), None),
        (torch.zeros(2, 3), {"encoder_id": "a", "labels": "[not json"}),
        (torch.zeros(2, 3), {"encoder_id": "a", "labels": json.dumps(["one"])}),
        (torch.zeros(2), {"encoder_id": "a", "labels": json.dumps(["one", "two"])}),
        (torch.zeros(2, 3), {"encoder_id": "a", "labels": "17"}),
        (torch.zeros(2, 3), {"encoder_id": "a", "labels": json.dumps(["one", 2])}),
        (torch.zeros(2, 3), {"encoder_id": "a", "labels": json.dumps("ab")}),
        (torch.full((2, 3), torch.nan), {"encoder_id": "a", "labels": json.dumps(["one", "two"])}),
    ],
)
def test_a_broken_index_is_named(tmp_path, features, metadata):
    save_file({"features": features}, tmp_path / "index.safetensors", metadata)
    with pytest.raises(CheckpointError, match=r"roi_index: .*index\.safetensors"):
        RoiIndex.load(tmp_path / "index.safetensors")


def test_a_truncated_file_is_named(tmp_path):
    (tmp_path / "index.safetensors").write_bytes(b"\x10")
    with pytest.raises(CheckpointError, match=r"roi_index: .* cannot be read"):
        RoiIndex.load(tmp_path / "index.safetensors")
