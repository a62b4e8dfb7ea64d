"""What is captured in a CUDA graph works on tensors of the device alone, and reads none of them back.

On the meta device a tensor of the host is another device's, and one without data cannot be read: both raise here, where
a card would refuse to capture, or replay what the host had said once.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vitalrt.engine import device_prefill, device_step
from vitalrt.engine.device_prefill import DevicePrefill, DeviceVision, Inputs
from vitalrt.engine.device_step import DeviceStep, StepWeights
from vitalrt.engine.graphs import Graphs, StepGraphs
from vitalrt.model.decoder import Decoder
from vitalrt.model.vision import VisionTower
from vitalrt_kernels.paged_attention import BLOCK_L

PAGE, PAGES, ROWS = 4, 32, 4
META = torch.device("meta")
splits_that_came: list[object] = []


class OnDeviceOnly(TorchDispatchMode):
    """Raises at an operation with a tensor of another device, the host's included."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor) and leaf.device != META:
                raise AssertionError(f"{operation} inside a capture, with a tensor on {leaf.device}")
        return result


@pytest.fixture(autouse=True)
def captured(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Keys of what was captured, in order."""
    keys: list[object] = []

    def call(self: Graphs, key, function, dry_run) -> None:
        keys.append(key)
        with OnDeviceOnly():
            function()

    monkeypatch.setattr(Graphs, "__call__", call)
    # Their references read lengths and slots, and their Triton forms do not.
    monkeypatch.setattr(device_step, "paged_attention", _queries)
    monkeypatch.setattr(device_prefill, "paged_attention", lambda q, *others: torch.empty_like(q))
    monkeypatch.setattr(device_prefill, "norm_rope_append", _queries)
    with torch.inference_mode():
        yield keys


def _queries(qkv: torch.Tensor, *others: object) -> torch.Tensor:
    """In place of attention, or of norm_rope_append. The last argument of the one is how often contexts are split."""
    splits_that_came.append(others[-1])
    k_cache = next(part for part in others if isinstance(part, torch.Tensor) and part.ndim == 3)
    return qkv[:, : qkv.shape[1] - 2 * k_cache.shape[1]].contiguous()


@pytest.fixture
def decoder(tiny) -> Decoder:
    return Decoder(tiny.model.weights.decoder.config).to(META)


@pytest.fixture
def caches(decoder: Decoder) -> torch.Tensor:
    config = decoder.config
    shape = (2, config.num_hidden_layers, PAGE * PAGES, config.num_key_value_heads, config.head_dim)
    return torch.empty(shape, device=META)


def test_the_mode_sees_the_host() -> None:
    x = torch.empty(3, device=META)
    with OnDeviceOnly():
        x + 1
        with pytest.raises(AssertionError, match="inside a capture"):
            x.copy_(torch.ones(3))


def test_steps(decoder: Decoder, caches: torch.Tensor, captured: list[object]) -> None:
    """Nor does what places rows between them read anything."""
    step = DeviceStep(StepWeights(decoder), *caches, PAGE, ROWS, stop_ids=[3])
    graphs = StepGraphs(step)
    step.place(0, step.rows.hidden[0], 5, 9, torch.zeros(3, dtype=torch.int32), k=3, limit=20)
    graphs.think(3)
    graphs.step(3, answers=True)
    step.load(step.rows.hidden[:2], [3, 4], [3, 9], [0, 1], [8, 8], torch.zeros(2, 3, dtype=torch.int32))
    step.tell([1, 2])
    graphs.step(1, answers=False)
    assert captured == [("think", 3, 8), ("step", 4, True, 8), ("step", 1, False, 8)]
    with pytest.raises(NotImplementedError, match="meta"):
        step.rows.tokens.tolist()


def test_longer_contexts_have_graphs_of_more_splits(decoder: Decoder, captured: list[object]) -> None:
    config = decoder.config
    shape = (2, config.num_hidden_layers, 32 * BLOCK_L, config.num_key_value_heads, config.head_dim)
    step = DeviceStep(StepWeights(decoder), *torch.empty(shape, device=META), PAGE, ROWS)
    graphs = StepGraphs(step)
    splits_that_came.clear()
    pages = torch.zeros(32 * BLOCK_L // PAGE, dtype=torch.int32)
    step.place(0, step.rows.hidden[0], 8 * BLOCK_L - 2, 0, pages, k=1, limit=900)
    graphs.think(1)
    for _ in range(2):
        graphs.step(1, answers=True)
    step.place(1, step.rows.hidden[0], 16 * BLOCK_L, 0, pages, k=0, limit=900)
    graphs.step(2, answers=True)
    step.clear(1)
    graphs.step(2, answers=True)
    step.load(step.rows.hidden[:1], [9], [9], [0], [900], pages[None])
    graphs.step(2, answers=True)
    step.has_stepped(1, 99 * BLOCK_L)  # the row has no more pages, whatever the host counts
    graphs.step(1, answers=True)
    expected = [8, 8, 8, 16, 16, 8, 32]
    assert [key[-1] for key in captured] == expected  # type: ignore[index]
    assert splits_that_came[:: config.num_hidden_layers] == expected, "attention is told"


def test_the_first_step_of_a_kind_is_captured_for_longer_contexts_too(decoder: Decoder, monkeypatch) -> None:
    """So that no answer stops in its middle; and no other step captures anything."""
    config = decoder.config
    shape = (2, config.num_hidden_layers, 32 * BLOCK_L, config.num_key_value_heads, config.head_dim)
    step = DeviceStep(StepWeights(decoder), *torch.empty(shape, device=META), PAGE, ROWS)
    prepared: list[object] = []
    monkeypatch.setattr(Graphs, "prepare", lambda self, key, *functions: prepared.append(key))
    monkeypatch.setattr(Graphs, "__contains__", lambda self, key: key in prepared)
    monkeypatch.setattr(Graphs, "__call__", lambda self, key, *functions: None)
    graphs = StepGraphs(step)
    step.place(0, step.rows.hidden[0], 8 * BLOCK_L, 0, torch.zeros(512, dtype=torch.int32), k=0, limit=900)
    for _ in range(3):
        graphs.step(1, answers=True)
    assert prepared == [("step", 1, True, splits) for splits in (8, 16, 32)]


@pytest.mark.parametrize("num_levels", [0, 2])
def test_prompts(num_levels: int, decoder: Decoder, caches: torch.Tensor, captured: list[object]) -> None:
    prefill = DevicePrefill(StepWeights(decoder), *caches, PAGE, num_deepstack=num_levels)
    x = torch.empty(5, decoder.config.hidden_size, device=META)
    positions, slots = (torch.zeros(*shape, 5, dtype=torch.int64, device=META) for shape in ((3,), ()))
    images = torch.zeros(2, dtype=torch.int64, device=META), [x[:2]] * num_levels
    prefill.begin(Inputs(x, positions, *images), slots)
    pages, reach = torch.zeros(5, 3, dtype=torch.int32), torch.ones(5, dtype=torch.int32)
    prefill.go_on(Inputs(x, positions, *images), slots, pages, reach)
    assert captured == [("begin", 64, num_levels), ("go on", 16, num_levels)]


def test_pictures(tiny, captured: list[object]) -> None:
    vision = DeviceVision(VisionTower(tiny.model.weights.config.vision).to(META))
    pixels, grids = torch.empty(8, vision.tower.config.patch_dim, device=META), [(1, 2, 4)]
    vision(pixels, grids)
    assert captured == [], "what has come once may never come again"
    vision(pixels, grids)
    assert captured == [((1, 2, 4),)]
