from __future__ import annotations

import json

import torch

from vitalrt_kernels import tuned


def test_the_table_is_read_by_card_and_shape(tmp_path, monkeypatch) -> None:
    (tmp_path / "tuned.json").write_text(json.dumps({"card": [[1, 64, 32], [16, 8, 32]]}))
    monkeypatch.setattr(tuned, "TABLE", tmp_path / "tuned.json")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "card")
    tuned.cublas_shapes.cache_clear()
    tuned.prefers_cublas.cache_clear()
    try:
        device = torch.device("cuda")
        assert tuned.prefers_cublas(device, 1, 64, 32) and tuned.prefers_cublas(device, 2, 8, 32)
        assert not tuned.prefers_cublas(device, 2, 64, 32) and not tuned.prefers_cublas(device, 1, 64, 33)
        assert not tuned.cublas_shapes("another")
    finally:
        tuned.cublas_shapes.cache_clear()
        tuned.prefers_cublas.cache_clear()


def test_the_table_in_the_repository_is_well_formed() -> None:
    for shapes in json.loads(tuned.TABLE.read_text()).values():
        assert all(len(shape) == 3 and shape[0] in (1, 16) for shape in shapes)
