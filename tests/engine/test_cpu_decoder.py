"""The C++ decoder against the torch decoder: the same cache, sequences and inputs through both."""

from __future__ import annotations

import ctypes
import random
from pathlib import Path

import pytest
import torch

import vitalrt
from vitalrt import _core
from vitalrt.describe import describe_model
from vitalrt.engine import cpu_decoder, torch_threads
from vitalrt.engine.cache import PagedCache
from vitalrt.engine.cpu_decoder import CpuDecoder, why_not_cpu_decoder
from vitalrt.engine.image_encoder import images_of
from vitalrt.engine.request import Decoding
from vitalrt.engine.scheduler import Engine
from vitalrt.engine.sequence import Sequence
from vitalrt.engine.step import Chunk, RunningBatch, prefill
from vitalrt.engine.torch_threads import parallel_address
from vitalrt.inputs.prompt import Prompt
from vitalrt.model.rope import mrope_positions

TOLERANCE = 1e-5  # of a row's length


def scatter(cache: PagedCache, sequences: list[Sequence], lengths: list[int], seed: int) -> list[Sequence]:
    """Give the sequences room for a few tokens more than lengths, in pages all over the cache."""
    free = random.Random(seed).sample(range(cache.pool.num_blocks), cache.pool.num_blocks)
    for sequence, length in zip(sequences, lengths, strict=True):
        pages = [free.pop() for _ in range(cache.num_pages_for(length + 4))]
        sequence.place(pages, cache._slots_of(pages))
    return sequences


def scattered(model, cache: PagedCache, lengths: list[int], seed: int) -> list[Sequence]:
    """Sequences in the middle of an answer, positions ahead of their tokens."""
    draw = random.Random(seed)
    sequences = []
    for length in lengths:
        prompt = model.prompt(0)
        sequence = Sequence(prompt, torch.zeros(3, 1), prompt.num_tokens + draw.randrange(50), Decoding(k=0))
        sequence.num_tokens = length
        sequences.append(sequence)
    return scatter(cache, sequences, lengths, seed)


def scattered_prompts(model, prompts: list[Prompt], seed: int) -> list[Sequence]:
    """Sequences before their prefill."""
    engine = model.model.engine
    sequences = []
    for prompt in prompts:
        positions = mrope_positions(prompt.input_ids, prompt.grids(), engine.model.config)
        images = images_of(prompt, b"", engine.model.config.image_token_id)
        sequences.append(Sequence(prompt, *positions, Decoding(k=0), images=images))
    return scatter(engine.cache, sequences, [prompt.num_tokens for prompt in prompts], seed)


def fill(cache: PagedCache, sequences: list[Sequence], seed: int) -> None:
    """Random keys and values where the sequences have tokens, NaN everywhere else."""
    generator = torch.Generator().manual_seed(seed)
    for numbers in (cache.k, cache.v):
        numbers.fill_(float("nan"))
        for sequence in sequences:
            used = sequence.slots[: sequence.num_tokens]
            shape = (numbers.shape[0], len(used), *numbers.shape[2:])
            numbers[:, used] = torch.randn(shape, generator=generator)


def step_in_core(engine, batch: RunningBatch, slots: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return engine.cpu_decoder(batch.hidden, slots, lengths, torch.ones_like(lengths), batch.positions[None])


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    error = (actual - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert actual.shape == expected.shape
    assert float(error.max()) < TOLERANCE  # NaN is not


@pytest.mark.parametrize("seed", range(200, 225))
@torch.inference_mode()
def test_random_shapes_and_batches(make_tiny, seed: int) -> None:
    """Hidden states, and keys and values of every layer, over three steps; slots of others stay as they are."""
    tiny = make_tiny(seed, random_shape=True)
    engine = tiny.model.engine
    cache, draw = engine.cache, random.Random(seed)
    lengths = [draw.choice([1, 2, 15, 16, 17, 31, 63, 100]) for _ in range(draw.choice([1, 2, 3, 5, 20]))]
    results = []
    for step in (engine.cpu_decoder, None):
        sequences = scattered(tiny, cache, lengths, seed)
        fill(cache, sequences, seed)
        inputs = torch.randn(len(lengths), engine.model.config.decoder.hidden_size, generator=torch.manual_seed(seed))
        batch = RunningBatch(sequences, inputs)
        hidden = []
        for _ in range(3):
            batch.step(engine.model, cache, batch.hidden, step)
            hidden.append(batch.hidden)
        assert batch.lengths.tolist() == [length + 3 for length in lengths]
        assert batch.positions.tolist() == [sequence.position for sequence in sequences]
        results.append((torch.stack(hidden), cache.k.clone(), cache.v.clone()))
    (ours, k, v), (expected, k_expected, v_expected) = results
    assert_close(ours, expected)
    torch.testing.assert_close(k, k_expected, atol=1e-4, rtol=1e-4, equal_nan=True)
    torch.testing.assert_close(v, v_expected, atol=1e-4, rtol=1e-4, equal_nan=True)


@pytest.mark.parametrize("seed", range(500, 530))
@torch.inference_mode()
def test_random_prompts(make_tiny, seed: int) -> None:
    """Prompts of any length and number of pictures, packed: hidden states, and keys and values of every layer."""
    tiny = make_tiny(seed, random_shape=True)
    engine, draw = tiny.model.engine, random.Random(seed)
    prompts = []
    for n in range(draw.randint(1, 4)):
        grids = [(1, draw.randint(1, 4), draw.randint(1, 4)) for _ in range(draw.randint(0, 2))]
        prompts.append(tiny.prompt(10 * seed + n, grids, num_text=draw.choice([1, 3, 8, 20, 60])))
    results = []
    for decoder in (engine.cpu_decoder, None):
        sequences = scattered_prompts(tiny, prompts, seed)
        for numbers in (engine.cache.k, engine.cache.v):
            numbers.fill_(float("nan"))
        chunks = [Chunk(sequence, sequence.num_known) for sequence in sequences]
        hidden = prefill(engine.model, engine.cache, chunks, engine.encoder, decoder)
        assert [sequence.num_tokens for sequence in sequences] == [prompt.num_tokens for prompt in prompts]
        results.append((hidden, engine.cache.k.clone(), engine.cache.v.clone()))
    (ours, k, v), (expected, k_expected, v_expected) = results
    assert_close(ours, expected)
    torch.testing.assert_close(k, k_expected, atol=1e-4, rtol=1e-4, equal_nan=True)
    torch.testing.assert_close(v, v_expected, atol=1e-4, rtol=1e-4, equal_nan=True)


@pytest.mark.parametrize("seed", range(300, 305))
@torch.inference_mode()
def test_a_row_does_not_depend_on_the_others(make_tiny, seed: int) -> None:
    """To the last bit: the batch only shares the reading of weights."""
    tiny = make_tiny(seed, random_shape=True)
    engine, lengths = tiny.model.engine, [5, 40, 1, 16, 23, 2, 33, 8, 9, 11, 30]
    sequences = scattered(tiny, engine.cache, lengths, seed)
    fill(engine.cache, sequences, seed)
    inputs = torch.randn(len(lengths), engine.model.config.decoder.hidden_size)

    def step(rows: slice) -> torch.Tensor:
        batch = RunningBatch(sequences[rows], inputs[rows])
        return step_in_core(engine, batch, batch.slots, batch.lengths)

    together = step(slice(None))
    for row in range(len(lengths)):
        assert torch.equal(step(slice(row, row + 1))[0], together[row])


@torch.inference_mode()
def test_weights_that_bf16_cannot_hold(make_tiny) -> None:
    """The core keeps matrices in bf16 where that changes nothing, and only there: one number in each decides."""
    tiny = make_tiny(600, random_shape=True)
    for weights in tiny.model.weights.decoder.layers.parameters():
        weights.copy_(weights.bfloat16())
        weights.flatten()[-1] += 2**-20
    engine = Engine(tiny.model.weights, tiny.model.engine.config, tiny.stop_ids)
    for weights in tiny.model.weights.decoder.layers.parameters():
        weights.copy_(weights.bfloat16())
    narrow = Engine(tiny.model.weights, tiny.model.engine.config, tiny.stop_ids)
    assert engine.cpu_decoder.num_bytes == pytest.approx(2 * narrow.cpu_decoder.num_bytes, rel=0.05)
    for weights in tiny.model.weights.decoder.layers.parameters():
        weights.flatten()[-1] += 2**-20
    results = []
    for step in (engine.cpu_decoder, None):
        sequences = scattered(tiny, engine.cache, [20, 3], seed=0)
        fill(engine.cache, sequences, seed=0)
        inputs = torch.randn(2, engine.model.config.decoder.hidden_size, generator=torch.manual_seed(0))
        batch = RunningBatch(sequences, inputs)
        batch.step(engine.model, engine.cache, batch.hidden, step)
        results.append(batch.hidden)
    assert_close(*results)


def test_torchs_threads_change_nothing(monkeypatch) -> None:
    """To the last bit, in prompts and in steps."""
    model = vitalrt.load(device="cpu", cache_tokens=1024, prefix_cache=False)
    draw = random.Random(0)
    prompts = [vitalrt.Prompt([draw.randrange(600) for _ in range(draw.randint(1, 60))]) for _ in range(12)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert parallel_address()
        together = model.run(prompts, k=2, max_new_tokens=3)
        monkeypatch.setattr(cpu_decoder, "parallel_address", lambda: 0)
        alone = model.run(prompts, k=2, max_new_tokens=3)
    finally:
        torch.set_num_threads(before)
    for answer, expected in zip(together, alone, strict=True):
        assert answer.token_ids == expected.token_ids
        assert torch.equal(answer.latents, expected.latents)


def test_sequences_are_shared_out(monkeypatch) -> None:
    """Prompts and steps with enough to do start the whole team; here one thread is all of it, and does all of it."""
    teams = []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    def start(function, data, num_threads, flags) -> None:
        teams.append((num_threads, flags))
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)(data)

    model = vitalrt.load(device="cpu", cache_tokens=1024, prefix_cache=False)
    prompts = [vitalrt.Prompt(list(range(1, 40 + n))) for n in range(4)]
    expected = model.run(prompts, k=2, max_new_tokens=1)
    monkeypatch.setattr(cpu_decoder, "parallel_address", lambda: ctypes.cast(start, ctypes.c_void_p).value)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    answers = model.run(prompts, k=2, max_new_tokens=1)
    assert teams == [(3, 0)] * 3  # one prefill, two steps
    for answer, wanted in zip(answers, expected, strict=True):
        assert torch.equal(answer.latents, wanted.latents)


def test_threads_are_torchs_own(monkeypatch, tmp_path) -> None:
    """Whatever else has brought an OpenMP. Without /proc, without OpenMP, or with several that may be torch's, none."""
    line = "7f00-7f01 r-xp 00000000 00:00 0    {}\n"
    cases = [
        "",
        line.format("/usr/lib/libcompute.so"),
        "".join(map(line.format, ("/a/libgomp.so.1", "/b/libiomp5.so"))),
    ]
    monkeypatch.setattr(torch_threads, "MAPS", maps := tmp_path / "maps")
    assert parallel_address.__wrapped__() == 0
    for text in [*cases, line.format("/nowhere/libgomp.so.1")]:
        maps.write_text(text)
        assert parallel_address.__wrapped__() == 0
    real = [row for row in Path("/proc/self/maps").read_text().splitlines() if "/torch" in row]
    other = Path(torch.__file__).parents[1] / "scikit_learn.libs" / "libgomp-1234.so.1.0.0"
    maps.write_text("\n".join([*real, line.format(other)]))
    assert parallel_address.__wrapped__() == parallel_address() != 0


@torch.inference_mode()
def test_far_positions(tiny) -> None:
    """Angles of thousands of turns are where a sloppy cosine shows."""
    engine = tiny.load().engine
    results = []
    for step in (engine.cpu_decoder, None):
        [sequence] = sequences = scattered(tiny, engine.cache, [20], seed=0)
        fill(engine.cache, sequences, seed=0)
        sequence.next_position += 262_143 - sequence.position
        batch = RunningBatch(sequences, torch.randn(1, 48, generator=torch.manual_seed(0)))
        batch.step(engine.model, engine.cache, batch.hidden, step)
        results.append(batch.hidden)
    assert_close(*results)


@pytest.mark.parametrize("seed", range(400, 410))
def test_whole_answers(make_tiny, monkeypatch, seed: int) -> None:
    """Sequences of any k join and leave; tokens and latents are those of the torch step."""
    tiny = make_tiny(seed, stop_ids=range(0, 80, 9), random_shape=True)
    prompts = [tiny.prompt(seed + n, [(1, 2, 1 + n)] * (n % 2), num_text=2 + 7 * n) for n in range(5)]
    steps = [0, 4, 1, 7, 2]
    ours = tiny.load().run(prompts, k=steps, max_new_tokens=8)
    monkeypatch.setattr(cpu_decoder, "MAX_LAYER_WEIGHTS", 0)
    in_torch = tiny.load()
    assert in_torch.engine.cpu_decoder is None
    for answer, expected in zip(ours, in_torch.run(prompts, k=steps, max_new_tokens=8), strict=True):
        assert answer.token_ids == expected.token_ids
        assert_close(answer.latents, expected.latents) if len(answer.latents) else None


@torch.inference_mode()
def test_numbers_that_are_not_finite_pass_through(tiny) -> None:
    """A broken sequence shows as NaN, in its own row alone."""
    engine = tiny.load().engine
    sequences = scattered(tiny, engine.cache, [9, 9, 9], seed=1)
    fill(engine.cache, sequences, seed=1)
    inputs = torch.randn(3, 48)
    inputs[0, 3], inputs[1, 5] = float("nan"), float("inf")
    batch = RunningBatch(sequences, inputs)
    batch.step(engine.model, engine.cache, inputs, engine.cpu_decoder)
    assert batch.hidden.isnan().all(dim=1).tolist() == [True, True, False]
    assert bool(batch.hidden[2].isfinite().all())


@torch.inference_mode()
def test_slots_outside_the_cache_are_refused(tiny) -> None:
    engine = tiny.load().engine
    sequences = scattered(tiny, engine.cache, [9, 9], seed=2)
    batch = RunningBatch(sequences, torch.randn(2, 48))
    before = engine.cache.k.clone()
    for slots, lengths in (
        (batch.slots.clone().fill_(engine.cache.num_tokens), batch.lengths),
        (batch.slots.clone().fill_(-1), batch.lengths),
        (batch.slots, batch.lengths + batch.slots.shape[1]),
        (batch.slots, -batch.lengths),
    ):
        with pytest.raises(IndexError, match=r"expected 0 to \d+"):
            step_in_core(engine, batch, slots, lengths)
    assert torch.equal(engine.cache.k.nan_to_num(7), before.nan_to_num(7))


def test_shapes_without_a_meaning_are_refused() -> None:
    good = {
        **dict.fromkeys(["hidden_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size", "num_slots"], 2),
        **dict.fromkeys(["final_norm", "inverse_frequencies", "axes", "k_cache", "v_cache"], 0),
        "rms_norm_eps": 1e-6,
        "layers": [],
    }
    _core.CpuDecoder(**good)
    for bad in ({"num_kv_heads": 3}, {"head_dim": 3}, {"head_dim": 0}, {"hidden_size": -2}, {"num_slots": 0}):
        with pytest.raises(ValueError, match="shape: expected"):
            _core.CpuDecoder(**{**good, **bad})


def test_who_uses_it(tiny, monkeypatch) -> None:
    assert isinstance(tiny.model.engine.cpu_decoder, CpuDecoder)
    assert describe_model(tiny.model)["cpu decoder"].startswith("in C++")
    half = tiny.load(dtype="bfloat16")
    assert half.engine.cpu_decoder is None
    assert "not float32" in describe_model(half)["cpu decoder"]
    monkeypatch.setattr(cpu_decoder, "MAX_LAYER_WEIGHTS", 10)
    assert "a layer has" in why_not_cpu_decoder(tiny.model.weights.decoder)
