"""vitalrt.load of an exported directory: the same Model, run by ONNX Runtime."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import vitalrt
import vitalrt.export
from vitalrt.describe import describe_machine, describe_model


@pytest.fixture(scope="module")
def directory(tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("onnx") / "out"
    return vitalrt.export.onnx(tiny.directory, out, k=2, verify=False).directory


@pytest.fixture(scope="module")
def exported(directory: Path) -> vitalrt.Model:
    return vitalrt.load(directory, device="cpu")


@pytest.fixture(scope="module")
def prompts(tiny) -> list[vitalrt.Prompt]:
    return [tiny.prompt(1, [(1, 3, 2)]), tiny.prompt(2), tiny.prompt(3, [(1, 1, 4), (2, 2, 2)], num_text=11)]


def same(ours: vitalrt.Answer, theirs: vitalrt.Answer) -> None:
    assert ours.token_ids == theirs.token_ids
    assert ours.finish_reason == theirs.finish_reason
    # An export has no prefix cache.
    assert replace(ours.usage, cached_tokens=0) == replace(theirs.usage, cached_tokens=0)
    assert ours.latents.dtype == torch.float32 and torch.allclose(ours.latents, theirs.latents, atol=1e-4)


@pytest.mark.parametrize("steps", [0, 3, [0, 8, 1]])
def test_run_answers_as_torch_does(steps: Any, tiny, exported: vitalrt.Model, prompts: list[vitalrt.Prompt]) -> None:
    options = {"k": steps, "max_new_tokens": 9, "return_logits": True}
    for ours, theirs in zip(tiny.model.run(prompts, **options), exported.run(prompts, **options), strict=True):
        same(ours, theirs)
        assert ours.logits is not None and theirs.logits is not None
        assert torch.allclose(ours.logits, theirs.logits, atol=1e-3)


def test_sampling_is_the_same(tiny, exported: vitalrt.Model, prompts: list[vitalrt.Prompt]) -> None:
    options = {"k": 2, "temperature": 0.7, "top_p": 0.9, "seed": 5, "max_new_tokens": 12}
    for ours, theirs in zip(tiny.model.run(prompts, **options), exported.run(prompts, **options), strict=True):
        same(ours, theirs)


def test_the_exports_own_k_is_the_default(exported: vitalrt.Model, prompts: list[vitalrt.Prompt]) -> None:
    assert exported.run(prompts[:1])[0].usage.latent_steps == 2


def test_more_requests_than_fit_take_turns(tiny, directory: Path, prompts: list[vitalrt.Prompt]) -> None:
    narrow = vitalrt.load(directory, device="cpu", max_batch=2, cache_tokens=100)
    many = prompts * 3
    for ours, theirs in zip(tiny.model.run(many, k=1), narrow.run(many, k=1, max_new_tokens=64), strict=True):
        same(ours, theirs)


def test_what_never_fits_is_refused(exported: vitalrt.Model, prompts: list[vitalrt.Prompt]) -> None:
    with pytest.raises(vitalrt.CapacityError, match="cache_tokens: the request needs"):
        exported.run(prompts, max_new_tokens=10**6)
    with pytest.raises(vitalrt.InputError, match="pixel_values: expected"):
        image = exported.checkpoint.config.image_token_id
        exported.run([vitalrt.Prompt([image], torch.zeros(4, 95), [[1, 2, 2]])])
    assert exported.run(prompts[:1], max_new_tokens=1)[0].finish_reason


def test_a_failing_run_cancels_its_batch_and_no_other(exported: vitalrt.Model, prompts: list[vitalrt.Prompt]) -> None:
    with (
        mock.patch.object(exported.engine.sessions, "decode_step", side_effect=RuntimeError("lost")),
        pytest.raises(RuntimeError, match="lost"),
    ):
        exported.run(prompts, max_new_tokens=5)
    assert len(exported.run(prompts, max_new_tokens=5)) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter": Path(__file__).parent}, "adapter: an ONNX export cannot take one"),
        ({"dtype": "bfloat16"}, "dtype: the ONNX export is fp32, got 'bfloat16'"),
        ({"device": "mps"}, "device: expected 'auto', 'cpu' or 'cuda"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str, directory: Path) -> None:
    with pytest.raises(vitalrt.VitalError, match=message):
        vitalrt.load(directory, **options)


def test_info_says_who_runs_it(exported: vitalrt.Model) -> None:
    report = describe_model(exported)
    assert report["engine"].startswith("onnxruntime") and report["dtype"] == "fp32"
    assert describe_machine()["backend: onnx"].startswith("runs exported directories")
    with pytest.raises(vitalrt.VitalError, match="got an ONNX export"):
        _ = exported.weights


def test_8_bits_are_chosen_when_it_is_exported(directory: Path) -> None:
    with pytest.raises(vitalrt.VitalError, match="int8: an ONNX export is in 8 bits if it was written so"):
        vitalrt.load(directory, int8=True)


def test_what_needs_torchs_weights_is_refused(exported: vitalrt.Model, prompts: list[vitalrt.Prompt]) -> None:
    with pytest.raises(vitalrt.VitalError, match="model: expected a checkpoint, got an ONNX export"):
        exported.explain(None, "What?")
    with pytest.raises(vitalrt.VitalError, match="latents: expected none, got some for an ONNX export"):
        exported.run(prompts[:1], k=2, latents=[torch.zeros(1, 48)])
