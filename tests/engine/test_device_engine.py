"""The engine with its step on the device, through the kernels' references, against the engine without it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import vitalrt
from vitalrt.engine import device_step, scheduler
from vitalrt.engine.device_step import DeviceStep, why_not_device_step
from vitalrt.model.decoder import Decoder

GRIDS = [[], [(1, 2, 3)], [(1, 1, 1), (1, 3, 2)]]


@pytest.fixture
def load_on_device(tiny, monkeypatch: pytest.MonkeyPatch, assert_nothing_held):
    """load(**options): a model whose engine takes the path of a GPU; all its pages must be free afterwards."""
    loaded: list[vitalrt.Model] = []

    def load(**options) -> vitalrt.Model:
        with monkeypatch.context() as patch:
            patch.setattr(scheduler, "why_not_device_step", lambda decoder: None)
            patch.setattr(scheduler, "why_not_cpu_decoder", lambda decoder: "the device step is to be tested")
            loaded.append(tiny.load(**options))
        assert loaded[-1].engine.device_graphs is not None
        return loaded[-1]

    yield load
    for model in loaded:
        assert_nothing_held(model)


def prompts_of(tiny, count: int) -> list[vitalrt.Prompt]:
    return [tiny.prompt(seed, GRIDS[seed % 3], num_text=1 + seed * 5 % 17) for seed in range(count)]


def assert_alike(got: vitalrt.Answer, expected: vitalrt.Answer) -> None:
    assert got.token_ids == expected.token_ids and got.finish_reason == expected.finish_reason
    assert got.usage.completion_tokens == expected.usage.completion_tokens
    torch.testing.assert_close(got.latents, expected.latents, atol=1e-4, rtol=1e-4)
    if expected.logits is not None:
        torch.testing.assert_close(got.logits, expected.logits, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("options", [{}, {"max_batch": 3}, {"cache_tokens": 96, "max_batch": 4}])
def test_mixed_requests(tiny, load_on_device, options) -> None:
    """Joining, leaving, growing and, in a small cache, preemption."""
    prompts, steps = prompts_of(tiny, 10), [seed * 4 % 7 for seed in range(10)]
    expected = tiny.model.run(prompts, k=steps, max_new_tokens=20, return_logits=True)
    model = load_on_device(**options)
    for got, one in zip(model.run(prompts, k=steps, max_new_tokens=20, return_logits=True), expected, strict=True):
        assert_alike(got, one)
    if "cache_tokens" in options:
        assert model.engine.statistics().num_preemptions > 0


def test_alone_and_sampling(tiny, load_on_device) -> None:
    """A lone prompt takes the prefill of the device; sampled tokens come from the host."""
    model = load_on_device()
    for seed, prompt in enumerate(prompts_of(tiny, 4)):
        options = {"k": seed, "max_new_tokens": 9, "temperature": 0.8 * (seed % 2), "seed": seed}
        assert_alike(model.run([prompt], **options)[0], tiny.model.run([prompt], **options)[0])


def test_a_prefix_that_is_cached(tiny, load_on_device) -> None:
    model = load_on_device()
    prompt = tiny.prompt(7, [(1, 4, 4)], num_text=20)
    for k in (4, 2, 4):
        answer = model.run([prompt], k=k, max_new_tokens=6)[0]
        assert_alike(answer, tiny.model.run([prompt], k=k, max_new_tokens=6)[0])
    assert answer.usage.cached_tokens > 0


def test_the_step_is_captured_and_not_the_torch_one(tiny, load_on_device, monkeypatch: pytest.MonkeyPatch) -> None:
    model, steps = load_on_device(), []
    original = DeviceStep.step
    monkeypatch.setattr(DeviceStep, "step", lambda self, *args: (steps.append(args), original(self, *args)))
    answer = model.run([tiny.prompt(2)], k=3, max_new_tokens=4)[0]
    assert len(steps) == 3 + answer.usage.completion_tokens - 1


def test_why_not(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = tiny.model.weights.decoder
    assert "cpu tensors take the torch form" in why_not_device_step(decoder)
    monkeypatch.setattr(device_step, "why_not_triton", lambda device: None)
    assert why_not_device_step(decoder) is None
    assert "float64" in why_not_device_step(Decoder(decoder.config).double())
    with torch.device("meta"):
        wide = Decoder(replace(decoder.config, head_dim=512))
    assert "wider than 256" in why_not_device_step(wide)
