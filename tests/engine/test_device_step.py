"""The step with its state on the device, through the kernels' references, against the engine that users call."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest
import torch

import vitalrt
from vitalrt.engine import device_step
from vitalrt.engine.device_prefill import MAX_SEEN, DevicePrefill, DeviceVision, Inputs
from vitalrt.engine.device_step import DeviceStep, StepWeights
from vitalrt.engine.graphs import StepGraphs, TokenReader, answer_alone
from vitalrt.model.rope import mrope_positions
from vitalrt.model_cost import step_cost

PAGE, PAGES, BATCH = 4, 64, 6


class DeviceRun:
    """A model's prefill and step on tensors of their own; slots nobody owns hold NaN."""

    def __init__(self, model: vitalrt.Model, stop_ids: Sequence[int], seed: int = 0, **options: bool) -> None:
        weights, config = model.weights, model.weights.config
        self.config = config
        shape = (config.decoder.num_hidden_layers, PAGE * PAGES, config.decoder.num_key_value_heads)
        self.caches = torch.full((2, *shape, config.decoder.head_dim), float("nan"))
        step_weights = StepWeights(weights.decoder)
        self.vision = DeviceVision(weights.vision)
        num_deepstack = len(config.vision.deepstack_visual_indexes)
        self.prefill = DevicePrefill(step_weights, *self.caches, PAGE, num_deepstack)
        self.step = DeviceStep(StepWeights(weights.decoder, **options), *self.caches, PAGE, BATCH, stop_ids)
        self.graphs = StepGraphs(self.step)
        self.reader = TokenReader(self.step.rows.tokens)
        self.free = random.Random(seed).sample(range(PAGES), PAGES)  # pages lie anywhere

    def place(self, row: int, prompt: vitalrt.Prompt, k: int, max_new_tokens: int) -> None:
        limit = prompt.num_tokens + k + max_new_tokens - 1
        pages = torch.tensor([self.free.pop() for _ in range(-(-limit // PAGE))], dtype=torch.int32)
        slots = (pages[:, None] * PAGE + torch.arange(PAGE)).flatten()[: prompt.num_tokens]
        positions, next_position = mrope_positions(prompt.input_ids, prompt.grids(), self.config)
        image_rows = (prompt.input_ids == self.config.image_token_id).nonzero().flatten()
        x, deepstack = self.step.weights.embed[prompt.input_ids], []
        if prompt.pixel_values is not None:
            tokens, *deepstack = self.vision(prompt.pixel_values, prompt.grids())
            x = x.index_copy(0, image_rows, tokens)
        [hidden] = self.prefill.begin(Inputs(x, positions, image_rows if deepstack else None, deepstack), slots)
        self.step.place(row, hidden, prompt.num_tokens, next_position, pages, k, limit)


def expected_of(model: vitalrt.Model, prompt: vitalrt.Prompt, k: int, max_new_tokens: int) -> vitalrt.Answer:
    return model.run([prompt], k=k, max_new_tokens=max_new_tokens)[0]


def without_stop(tokens: list[int], stop_ids: Sequence[int]) -> list[int]:
    return tokens[:-1] if tokens and tokens[-1] in stop_ids else tokens


@pytest.mark.parametrize("seed", range(6))
@torch.inference_mode()
def test_alone(seed: int, make_tiny) -> None:
    """Random shapes, prompts and K: the latents and the tokens of the engine."""
    draw = random.Random(seed)
    tiny = make_tiny(seed, stop_ids=[3, 7, 11, 19], random_shape=True)
    run = DeviceRun(tiny.model, tiny.stop_ids, seed)
    for k in (0, 1, 4):
        grids = [(1, draw.randint(1, 3), draw.randint(1, 4)) for _ in range(draw.randint(0, 2))]
        prompt = tiny.prompt(seed + k, grids, num_text=draw.randint(1, 9))
        expected = expected_of(tiny.model, prompt, k, 12)
        run.place(0, prompt, k, 12)
        tokens = list(answer_alone(run.graphs, run.reader, k, 12, tiny.stop_ids))
        assert without_stop(tokens, tiny.stop_ids) == expected.token_ids
        torch.testing.assert_close(run.step.latents[:k], expected.latents, atol=1e-4, rtol=1e-4)
        assert int(run.step.rows.limits[0]) == 0 and int(run.step.rows.lengths[0]) <= prompt.num_tokens + k + 11


@pytest.mark.parametrize("seed", range(3))
@torch.inference_mode()
def test_rows_of_any_phase_share_steps(seed: int, make_tiny) -> None:
    """Sequences join and leave at random; each gets what it gets alone, though the batch is rounded up."""
    draw = random.Random(seed)
    tiny = make_tiny(seed, stop_ids=[3, 7, 11])
    run = DeviceRun(tiny.model, tiny.stop_ids, seed)
    waiting = []
    for number in range(9):
        grids = [(1, draw.randint(1, 2), draw.randint(1, 3))] if draw.random() < 0.5 else []
        prompt = tiny.prompt(10 * seed + number, grids, num_text=draw.randint(1, 6))
        waiting.append((prompt, draw.randint(0, 3), draw.randint(1, 8)))
    running: dict[int, dict] = {}
    while waiting or running:
        for row in set(range(BATCH - 1)) - running.keys():
            if waiting and draw.random() < 0.6:
                prompt, k, length = waiting.pop()
                run.place(row, prompt, k, length)
                first = [int(run.step.rows.tokens[row])] if k == 0 else []
                running[row] = {"asked": (prompt, k, length), "left": k, "latents": [], "tokens": first}
        retire(run, tiny, running)
        if not running:
            continue
        run.graphs.step(max(running) + 1, answers=any(one["left"] <= 1 for one in running.values()))
        run.reader.post()
        tokens = run.reader.take()
        for row, one in running.items():
            if one["left"]:
                one["latents"].append(run.step.rows.hidden[row].clone())
                one["left"] -= 1
            if not one["left"]:
                one["tokens"].append(tokens[row])
        retire(run, tiny, running)
    assert not run.step.rows.limits.any()


def retire(run: DeviceRun, tiny, running: dict[int, dict]) -> None:
    for row, one in list(running.items()):
        (prompt, k, length), tokens = one["asked"], one["tokens"]
        if len(tokens) < length and not (tokens and tokens[-1] in tiny.stop_ids):
            continue
        expected = expected_of(tiny.model, prompt, k, length)
        assert without_stop(tokens, tiny.stop_ids) == expected.token_ids
        if k:
            torch.testing.assert_close(torch.stack(one["latents"]), expected.latents, atol=1e-4, rtol=1e-4)
        run.step.clear(row)
        del running[row]


@torch.inference_mode()
def test_int8_is_close_and_uses_int8(tiny) -> None:
    exact, rounded = DeviceRun(tiny.model, []), DeviceRun(tiny.model, [], int8=True)
    prompt = tiny.prompt(5, [(1, 2, 2)])
    for run in (exact, rounded):
        run.place(0, prompt, 4, 2)
        run.graphs.think(4)
    error = (rounded.step.latents[:4] - exact.step.latents[:4]).norm(dim=1) / exact.step.latents[:4].norm(dim=1)
    assert float(error.min()) > 0 and float(error.max()) < 0.1


def test_a_reader_refuses_to_lose_tokens() -> None:
    tokens = torch.arange(3)
    reader = TokenReader(tokens, depth=2)
    reader.post()
    tokens += 10
    reader.post()
    with pytest.raises(RuntimeError, match="at most 2"):
        reader.post()
    assert reader.take() == [0, 1, 2] and reader.take() == [10, 11, 12]


@pytest.mark.parametrize("answers", [False, True])
@torch.inference_mode()
def test_a_step_launches_what_the_cost_model_says(answers: bool, tiny, monkeypatch) -> None:
    run = DeviceRun(tiny.model, tiny.stop_ids)
    planned = Counter[str]()
    for operation in step_cost(run.config.decoder, answers=answers).operations:
        planned[operation.kernel] += operation.launches
    launched = Counter[str]()
    for name in planned:
        original = getattr(device_step, name)

        def counted(*args, name=name, original=original, **options):
            launched[name] += 1
            return original(*args, **options)

        monkeypatch.setattr(device_step, name, counted)
    run.step.step(1, answers)
    assert launched == planned


def test_only_what_comes_again_is_captured(tiny) -> None:
    vision = DeviceVision(tiny.model.weights.vision)
    grids = [((1, 2, 2 * n),) for n in range(1, MAX_SEEN + 2)]
    assert [vision._is_known(grid) for grid in (grids[0], grids[1], grids[0])] == [False, False, True]
    assert not any(vision._is_known(grid) for grid in grids[2:])
    assert vision._is_known(grids[0]) and not vision._is_known(grids[1]), "the one seen longest ago was forgotten"
