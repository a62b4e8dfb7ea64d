"""What cannot be exported says why, and leaves nothing behind."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vitalrt.export
from vitalrt import VitalError
from vitalrt.export import exporter
from vitalrt.export.sessions import Sessions
from vitalrt.export.weights import WeightLayout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 19}, "opset: expected 20.."),
        ({"opset": 999}, "opset: expected 20.."),
        ({"opset": True}, "opset: expected 20.."),
        ({"dtype": "int4"}, "dtype: expected one of"),
        ({"k": 65}, "k: expected 0..64"),
        ({"device": "tpu"}, "device: expected 'auto', 'cpu' or 'cuda"),
        ({"device": "cuda:x"}, "device: expected 'auto', 'cpu' or 'cuda"),
        ({"dtype": "bf16", "device": "cpu"}, "bf16 graphs on CUDA only"),
        ({"adapter": "/nowhere"}, "adapter: expected a directory"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str, tiny, tmp_path: Path) -> None:
    with pytest.raises(VitalError, match=message):
        vitalrt.export.onnx(tiny.directory, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_an_existing_directory_is_left_alone(tiny, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(VitalError, match="out: expected a new or empty directory"):
        vitalrt.export.onnx(tiny.directory, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package(package: str, tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(VitalError, match=rf"{package} is not installed; run: pip install 'vitalrt\[onnx\]'"):
        vitalrt.export.onnx(tiny.directory, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_provider_that_is_not_there(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    directory = vitalrt.export.onnx(tiny.directory, tmp_path / "out", verify=False).directory
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(VitalError, match=r"device: this onnxruntime has only CPUExecutionProvider, got 'cuda'"):
        Sessions(directory, "cuda")
    assert Sessions(directory, "auto").device == "cpu"


def test_a_provider_that_does_not_start(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime falls back to the CPU without an error when CUDA's libraries are missing; we do not."""
    import onnxruntime

    directory = vitalrt.export.onnx(tiny.directory, tmp_path / "out", verify=False).directory
    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: both)
    with pytest.raises(VitalError, match="CUDAExecutionProvider"), pytest.warns(UserWarning):
        Sessions(directory, "cuda").session("head")


def test_no_space_before_writing(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000, 900, 100))
    with pytest.raises(VitalError, match=r"out: the export needs [\d,]+ bytes, .* has 100 free"):
        vitalrt.export.onnx(tiny.directory, tmp_path / "out", verify=False)
    assert not list(tmp_path.iterdir())


def test_no_space_while_writing(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(WeightLayout, "write", write)
    with pytest.raises(VitalError, match="is full; the export needs"):
        vitalrt.export.onnx(tiny.directory, tmp_path / "out", verify=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("dtype", "name", "wrong"),
    [
        ("fp32", "decoder.layers.1.qkv.weight", np.full(16, 16, np.float32)),
        ("fp16", "decoder.norm.weight", np.full(16, np.nan, np.float16)),
    ],
)
def test_failed_verification_leaves_nothing(
    dtype: str, name: str, wrong: np.ndarray, tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight goes wrong on its way to the file; no error of a latent is larger than NaN, or smaller."""
    write = WeightLayout.write

    def spoil(self: WeightLayout, model: Any, directory: Path) -> None:
        write(self, model, directory)
        with (directory / "weights.bin").open("r+b") as file:
            file.seek(self.entries[name].offset)
            file.write(wrong.tobytes())

    monkeypatch.setattr(WeightLayout, "write", spoil)
    with pytest.raises(VitalError, match="verify: the graphs disagree with torch"):
        vitalrt.export.onnx(tiny.directory, tmp_path / "out", dtype=dtype, device="cpu")
    assert not list(tmp_path.iterdir())


def test_broken_directories(tiny, tmp_path: Path) -> None:
    directory = vitalrt.export.onnx(tiny.directory, tmp_path / "out", verify=False).directory
    (directory / "head.onnx").write_bytes(b"not a graph")
    with pytest.raises(VitalError, match=r"head\.onnx cannot be opened by ONNX Runtime"):
        Sessions(directory, "cpu").session("head")
    (directory / "onnx.json").write_text(json.dumps({"format": 2}))
    with pytest.raises(VitalError, match=r"onnx\.json: expected format 1, got 2"):
        Sessions(directory, "cpu")


class TestPlan:
    def test_it_foretells_an_export(self, tiny, tmp_path: Path) -> None:
        for options in ({}, {"dtype": "fp16"}, {"int8": True}):
            plan = vitalrt.export.plan(tiny.directory, **options)
            export = vitalrt.export.onnx(tiny.directory, tmp_path / str(options), verify=False, **options)
            assert plan.files.items() <= export.files.items()

    def test_eight_billion_parameters_from_config_json_alone(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps(QWEN3_VL_8B))
        plan = vitalrt.export.plan(tmp_path / "config.json", dtype="bf16")
        assert plan.files["weights.bin"] == pytest.approx(2 * 8_767_123_696, rel=1e-4)
        assert sum(plan.files.values()) - plan.files["weights.bin"] < 2 << 20
        assert plan.kv_per_token == 2 * 36 * 8 * 128 * 2
        assert plan.export_memory > plan.files["weights.bin"]
        assert vitalrt.export.plan(tmp_path, int8=True).files["weights.bin"] < 13 << 30

    def test_bad_arguments(self, tiny) -> None:
        with pytest.raises(VitalError, match="dtype: expected one of"):
            vitalrt.export.plan(tiny.directory, dtype="fp8")
        with pytest.raises(VitalError, match=r"has no config\.json"):
            vitalrt.export.plan(tiny.directory / "nowhere")


def test_only_the_companions_travel(tiny, tmp_path: Path) -> None:
    """Neither the checkpoint's own weights nor their index are copied."""
    shutil.copytree(tiny.directory, tmp_path / "in")
    (tmp_path / "in" / "notes.safetensors.index.json").write_text("{}")
    (tmp_path / "in" / "merges.txt").write_text("")
    export = exporter.export_onnx(tmp_path / "in", tmp_path / "out", verify=False, k=7)
    graphs = {"vision", "prefill", "latent_step", "decode_step", "latent_loop", "head"}
    companions = {"config.json", "generation_config.json", "merges.txt", "vital.json", "onnx.json", "weights.bin"}
    assert set(export.files) == {f"{name}.onnx" for name in graphs} | companions
    assert json.loads((export.directory / "vital.json").read_text())["k"] == 7


QWEN3_VL_8B = {
    "model_type": "qwen3_vl",
    "image_token_id": 151655,
    "video_token_id": 151656,
    "tie_word_embeddings": False,
    "text_config": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5000000,
        "rope_scaling": {"mrope_section": [24, 20, 20], "mrope_interleaved": True, "rope_type": "default"},
    },
    "vision_config": {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "in_channels": 3,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "out_hidden_size": 4096,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [8, 16, 24],
    },
}
