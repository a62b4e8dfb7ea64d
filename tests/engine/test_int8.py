"""A model in 8 bits: every path computes with the same weights, and latents that go astray are refused."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from torch import nn

import vitalrt
from vitalrt.checkpoint import Checkpoint, load_weights
from vitalrt.config import EngineConfig
from vitalrt.describe import describe_model
from vitalrt.engine import cpu_decoder, scheduler
from vitalrt.engine.int8 import TOLERANCE, quantise
from vitalrt.engine.scheduler import Engine
from vitalrt.inputs.probes import random_prompts
from vitalrt.model.int8_linear import Int8Linear
from vitalrt_kernels import quantise_int8


@pytest.fixture
def rounded(tiny) -> vitalrt.Model:
    """Plain linear maps whose weights are those that 8 bits leave."""
    model = tiny.load()
    decoder = copy.deepcopy(model.weights.decoder)
    for module in decoder.modules():
        if isinstance(module, nn.Linear):
            values, scale = quantise_int8(module.weight)
            module.weight = nn.Parameter(values * scale[:, None], requires_grad=False)
    model.weights.decoder = decoder
    return vitalrt.Model(model.checkpoint, Engine(model.weights, model.engine.config, model.engine.stop_ids))


def assert_alike(model: vitalrt.Model, expected: vitalrt.Model, tiny) -> None:
    prompts = [tiny.prompt(seed, [(1, 2, 1 + seed)] * (seed % 2), num_text=3 + 20 * seed) for seed in range(5)]
    asked = {"k": [0, 4, 1, 2, 3], "max_new_tokens": 6, "return_logits": True}
    for got, wanted in zip(model.run(prompts, **asked), expected.run(prompts, **asked), strict=True):
        assert got.token_ids == wanted.token_ids
        torch.testing.assert_close(got.latents, wanted.latents, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(got.logits, wanted.logits, atol=1e-3, rtol=1e-3)


def test_in_cpp(tiny, rounded) -> None:
    model = tiny.load(int8=True)
    assert model.engine.cpu_decoder is not None
    assert_alike(model, rounded, tiny)


def test_in_torch(tiny, rounded, monkeypatch) -> None:
    monkeypatch.setattr(cpu_decoder, "MAX_LAYER_WEIGHTS", 0)
    model = tiny.load(int8=True)
    assert model.engine.cpu_decoder is None
    assert_alike(model, rounded, tiny)


def test_on_a_device(tiny, rounded, monkeypatch) -> None:
    """Through the kernels' references; a lone prompt through the prefill of the device."""
    monkeypatch.setattr(scheduler, "why_not_device_step", lambda decoder: None)
    monkeypatch.setattr(scheduler, "why_not_cpu_decoder", lambda decoder: "the device step is to be tested")
    model = tiny.load(int8=True)
    assert model.engine.device_graphs is not None
    assert_alike(model, rounded, tiny)
    prompt = tiny.prompt(9, [(1, 3, 3)], num_text=9)
    [got], [wanted] = (one.run([prompt], k=3, max_new_tokens=1) for one in (model, rounded))
    torch.testing.assert_close(got.latents, wanted.latents, atol=1e-4, rtol=1e-4)


def test_nothing_is_left_in_16_bits(tiny) -> None:
    plain, model = tiny.load(), tiny.load(int8=True)
    decoder = model.weights.decoder
    assert not any(isinstance(module, nn.Linear) for module in decoder.modules())
    assert sum(isinstance(module, Int8Linear) for module in decoder.modules()) == 4 * len(decoder.layers) + 1
    before, after = (describe_model(one) for one in (plain, model))
    assert after["parameters"] >= before["parameters"]  # a tied head is one of its own now
    assert after["weight bytes"] < before["weight bytes"]
    assert "int8" not in before and "6 prompts" in after["int8"]
    assert (before["dtype"], after["dtype"]) == ("float32", "float32, decoder int8")


def test_latents_that_go_astray_are_refused(tiny) -> None:
    """One weight that dwarfs all others of its row leaves those no step of their own."""
    checkpoint = Checkpoint.open(tiny.directory)
    weights = load_weights(checkpoint, None, torch.device("cpu"), torch.float32)
    for layer in weights.decoder.layers:
        layer.qk_norm.weight.zero_()  # attention is flat, so that only v counts
        layer.qkv.weight[:, 0] = 1e4
        layer.input_norm.weight[0] = 0.0  # and its input is none
    prompts = random_prompts(checkpoint.config)
    with pytest.raises(vitalrt.VitalError, match=rf"int8: expected a relative error of latents up to {TOLERANCE}, got"):
        quantise(weights, prompts)


def test_errors_are_of_the_whole_loop(tiny) -> None:
    checkpoint = Checkpoint.open(tiny.directory)
    weights = load_weights(checkpoint, None, torch.device("cpu"), torch.float32)
    prompts = random_prompts(checkpoint.config)
    plain = Engine(copy.deepcopy(weights), EngineConfig(cache_tokens=2048), ())
    error = quantise(weights, prompts)
    rounded = Engine(weights, EngineConfig(cache_tokens=2048), ())
    off = []
    for prompt in prompts:
        ours, theirs = (
            vitalrt.Model(checkpoint, engine).run([prompt], k=4, max_new_tokens=1)[0].latents
            for engine in (rounded, plain)
        )
        off += [float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True)]
    assert error.num_prompts == len(prompts)
    assert error.largest == pytest.approx(max(off), rel=1e-3)
    assert 0 < error.median < error.largest


def test_real_pictures_are_among_the_probes(talker, tmp_path) -> None:
    """Where the directory can prepare them; without a chat template ready-made prompts still run in 8 bits."""
    assert talker.load(int8=True).int8_error.num_prompts == 8
    directory = shutil.copytree(talker.directory, tmp_path / "copy")
    (directory / "preprocessor_config.json").rename(directory / "processor_config.json")
    assert vitalrt.load(directory, device="cpu", int8=True).int8_error.num_prompts == 8
    (directory / "chat_template.jinja").unlink()
    assert vitalrt.load(directory, device="cpu", int8=True).int8_error.num_prompts == 6
