"""Exported graphs against torch: random shapes, every K, batches, padding, precisions, and one weights file for all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

import vitalrt.export
from vitalrt import VitalError
from vitalrt.config import EngineConfig
from vitalrt.engine.scheduler import Engine
from vitalrt.export.runtime import OnnxEngine
from vitalrt.export.sessions import Sessions
from vitalrt.export.verify import batches, compare
from vitalrt.inputs.probes import random_prompts

GRAPHS = ("vision", "prefill", "latent_step", "decode_step", "latent_loop", "head")
ENGINE = EngineConfig(cache_tokens=4096)


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vitalrt.export.onnx(tiny.directory, tmp_path_factory.mktemp("onnx") / "fp32", verify=False).directory


@pytest.fixture(scope="module")
def sessions(exported: Path) -> Sessions:
    return Sessions(exported, "cpu", num_threads=1)


def drivers(directory: Path) -> list[OnnxEngine]:
    """The loop in one run, and step by step."""
    sessions = Sessions(directory, "cpu", num_threads=1)
    return [OnnxEngine(sessions, ENGINE, stop_ids=(), fused=fused) for fused in (True, False)]


def torch_engine(tiny) -> Engine:
    return Engine(tiny.model.weights, ENGINE, stop_ids=())


@pytest.mark.parametrize("seed", range(12))
def test_random_shapes_agree_with_torch(seed: int, make_tiny: Callable, tmp_path: Path) -> None:
    """K = 0..8, batches of 1 to 9, pictures of many sizes, two frames, none: the same tokens and latents."""
    tiny = make_tiny(seed, random_shape=True)
    directory = vitalrt.export.onnx(tiny.directory, tmp_path / "out", verify=False).directory
    prompts = random_prompts(tiny.model.checkpoint.config, seed)
    result = compare(torch_engine(tiny), drivers(directory), prompts, "fp32")
    assert result.same_answers == result.answers >= 60
    assert result.latent_error < 1e-3


@pytest.mark.parametrize("opset", [20, 21, 23])
def test_opsets(opset: int, tiny, tmp_path: Path) -> None:
    export = vitalrt.export.onnx(tiny.directory, tmp_path / "out", opset=opset, device="cpu")
    assert export.verification is not None
    for name in GRAPHS:
        model = onnx.load(export.directory / f"{name}.onnx", load_external_data=False)
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]


@pytest.mark.parametrize(("dtype", "int8"), [("fp16", False), ("fp32", True), ("fp16", True)])
def test_lower_precisions_stay_close(dtype: str, int8: bool, tiny, tmp_path: Path) -> None:
    export = vitalrt.export.onnx(tiny.directory, tmp_path / "out", dtype=dtype, int8=int8, device="cpu")
    assert export.verification is not None
    assert 0 < export.verification.median_latent_error <= export.verification.tolerance
    assert export.verification.same_tokens > 0.5


def test_bf16_graphs_compute_what_fp32_graphs_do(tiny, exported: Path, sessions: Sessions, tmp_path: Path) -> None:
    """ONNX Runtime has no bf16 kernels for the CPU, so ONNX's own reference runs these."""
    from onnx.reference import ReferenceEvaluator

    directory = vitalrt.export.onnx(tiny.directory, tmp_path / "out", dtype="bf16", verify=False).directory
    width = tiny.model.weights.config.decoder.hidden_size
    ids = np.array([[3, 1, 4, 1, 5]])
    feeds = {
        "input_ids": ids,
        "positions": np.broadcast_to(np.arange(5), (3, 1, 5)).copy(),
        "lengths": np.array([5]),
        "image_features": np.zeros((0, width), np.float32),
        "deepstack": np.zeros((2, 0, width), np.float32),
    }
    hidden = ReferenceEvaluator(str(directory / "prefill.onnx")).run(["hidden"], {**feeds, "capacity": np.array([6])})[
        0
    ]
    expected, _ = sessions.prefill(
        feeds["input_ids"], feeds["positions"], feeds["lengths"], feeds["image_features"], feeds["deepstack"], 6
    )
    assert np.linalg.norm(hidden - expected) < 0.05 * np.linalg.norm(expected)


def test_every_weight_is_on_disk_once(tiny, exported: Path) -> None:
    """All graphs name the same places of weights.bin, places do not overlap, and nothing is left over."""
    places: dict[str, tuple[int, int]] = {}
    for name in GRAPHS:
        model = onnx.load(exported / f"{name}.onnx", load_external_data=False)
        for tensor in model.graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                assert len(tensor.raw_data) <= 256
                continue
            entry = {item.key: item.value for item in tensor.external_data}
            assert entry["location"] == "weights.bin"
            place = int(entry["offset"]), int(entry["length"])
            assert places.setdefault(tensor.name, place) == place
    end = 0
    for offset, length in sorted(places.values()):
        assert end <= offset < end + 64
        end = offset + length
    assert end <= (exported / "weights.bin").stat().st_size < end + 64
    assert set(places) == {name for name, _ in tiny.model.weights.named_parameters()}


def test_the_checker_passes_every_graph(exported: Path) -> None:
    for name in GRAPHS:
        onnx.checker.check_model(exported / f"{name}.onnx", full_check=True)


def test_padding_changes_nothing(sessions: Sessions, tiny) -> None:
    """Whatever stands in the padding: hidden states, later steps and their logits are the same to the last bit."""
    width = tiny.model.weights.config.decoder.hidden_size
    features, deepstack = np.zeros((0, width), np.float32), np.zeros((2, 0, width), np.float32)
    ids, lengths = np.array([[5, 6, 7, 8, 9, 10], [11, 12, 13, 0, 0, 0]]), np.array([6, 3])
    positions = np.broadcast_to(np.arange(6), (3, 2, 6)).copy()
    results = []
    for fill in (0, 42):
        ids[1, 3:], positions[:, 1, 3:] = fill, fill * 7
        hidden, cache = sessions.prefill(ids, positions, lengths, features, deepstack, 12)
        latents, logits = sessions.latent_loop(hidden, np.array([2, 3]), lengths, lengths, cache)
        results.append(
            [hidden, latents, logits, sessions.decode_step(np.array([1, 2]), lengths + 3, lengths + 3, cache)]
        )
    for ours, theirs in zip(*results, strict=True):
        assert np.array_equal(ours, theirs)


def test_steps_write_one_slot_in_place(sessions: Sessions, tiny) -> None:
    """The cache's buffers stay where they are, and only slot lengths[b] of each row changes."""
    width = tiny.model.weights.config.decoder.hidden_size
    features, deepstack = np.zeros((0, width), np.float32), np.zeros((2, 0, width), np.float32)
    ids, lengths = np.array([[5, 6, 7, 8], [9, 10, 0, 0]]), np.array([4, 2])
    positions = np.broadcast_to(np.arange(4), (3, 2, 4)).copy()
    hidden, cache = sessions.prefill(ids, positions, lengths, features, deepstack, 9)
    places = {name: value.data_ptr() for name, value in cache.values.items()}
    before = {name: value.numpy().copy() for name, value in cache.values.items()}
    sessions.latent_step(hidden, lengths, lengths, cache)
    for name, value in cache.values.items():
        assert value.data_ptr() == places[name]
        after, written = value.numpy(), np.zeros((2, 9), bool)
        written[[0, 1], lengths] = True
        assert np.array_equal(after.swapaxes(1, 2)[~written], before[name].swapaxes(1, 2)[~written])
        assert not np.array_equal(after, before[name])
    assert {name: value.data_ptr() for name, value in cache.values.items()} == places


def test_the_loop_stops_each_row_at_its_own_step(sessions: Sessions, tiny) -> None:
    """latents[k] repeats where a row has done its steps, and its logits are those of its own last latent."""
    width = tiny.model.weights.config.decoder.hidden_size
    features, deepstack = np.zeros((0, width), np.float32), np.zeros((2, 0, width), np.float32)
    ids, lengths, steps = np.array([[5, 6], [7, 8], [9, 1]]), np.array([2, 2, 1]), np.array([0, 3, 1])
    positions = np.broadcast_to(np.arange(2), (3, 3, 2)).copy()
    hidden, cache = sessions.prefill(ids, positions, lengths, features, deepstack, 6)
    latents, logits = sessions.latent_loop(hidden, steps, lengths, lengths, cache)
    assert latents.shape == (3, 3, width)
    assert np.array_equal(latents[0, 0], hidden[0]) and np.array_equal(latents[2, 2], latents[0, 2])
    assert np.allclose(sessions.head(latents[-1]), logits, atol=1e-5)
    none, logits = sessions.latent_loop(hidden, np.array([0, 0, 0]), lengths, lengths, cache)
    assert none.shape == (0, 3, width) and np.allclose(sessions.head(hidden), logits, atol=1e-5)


def test_a_wrong_graph_does_not_pass(tiny, tmp_path: Path) -> None:
    """Verification sees a single changed weight."""
    export = vitalrt.export.onnx(tiny.directory, tmp_path / "out", verify=False)
    weights = np.fromfile(export.directory / "weights.bin", np.float32)
    weights[len(weights) // 2] += 5
    weights.tofile(export.directory / "weights.bin")
    with pytest.raises(VitalError, match="disagree"):
        compare(torch_engine(tiny), drivers(export.directory), random_prompts(tiny.model.checkpoint.config), "fp32")


def test_prompts_can_be_given_to_verify_on(tiny, tmp_path: Path) -> None:
    extra = [tiny.prompt(3, [(1, 2, 3)], num_text=n) for n in range(9, 23)]
    assert {id(prompt) for batch, _ in batches(extra) for prompt in batch} == {id(prompt) for prompt in extra}
    export = vitalrt.export.onnx(tiny.directory, tmp_path / "out", prompts=extra, k=2, device="cpu")
    assert export.verification is not None
    assert export.verification.latent_error < 1e-4
