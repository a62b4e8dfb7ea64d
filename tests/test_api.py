"""What users call: answers, streams, threads, and a named error for every bad argument."""

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import vitalrt
from vitalrt.api import WORTH_A_THREAD_S
from vitalrt.api import generate as generate_with_any_model
from vitalrt.inputs import image as image_reading
from vitalrt.inputs import processor

PICTURES = [np.random.default_rng(seed).integers(0, 256, (20 + seed, 30, 3), dtype=np.uint8) for seed in range(4)]


@pytest.fixture
def model(talker, assert_nothing_held) -> Iterator[vitalrt.Model]:
    yield talker.model
    assert_nothing_held(talker.model)


@contextmanager
def spoken(ids: list[int], end: int) -> Iterator[None]:
    """Whatever the weights say, every answer is `ids` and then the end token."""
    said: dict[int, int] = {}

    def choose(logits, decodings, generators) -> list[int]:
        tokens = []
        for decoding in decodings:
            said[id(decoding)] = said.get(id(decoding), -1) + 1
            tokens.append([*ids, end][said[id(decoding)]])
        return tokens

    with mock.patch("vitalrt.engine.scheduler.choose_tokens", choose):
        yield


class TestAnswers:
    def test_generate(self, talker, model) -> None:
        answer = model.generate(PICTURES[0], "Is the liver visible?", k=3, max_new_tokens=9)
        prompt = model.prepare(PICTURES[0], "Is the liver visible?")
        latents, ids = talker.think(prompt, 3, 9)
        assert answer.token_ids == [token for token in ids if token not in talker.stop_ids]
        torch.testing.assert_close(answer.latents, latents, atol=1e-4, rtol=1e-4)
        assert answer.text == str(answer) == model.processor.tokenizer.decode(answer.token_ids)
        assert answer.logits is None
        assert answer.usage == vitalrt.Usage(prompt.num_tokens, 0, 3, len(ids))
        assert "Research use only" in answer.notice

    def test_timings(self, model) -> None:
        timings = model.generate(PICTURES[0], "What?", k=2, max_new_tokens=3).timings
        parts = [timings.preprocess, timings.prefill, timings.latent, timings.decode]
        assert min(parts) > 0
        assert timings.total >= sum(parts) * 0.999
        assert model.generate(None, "What?", k=0, max_new_tokens=1).timings.latent == 0

    def test_the_default_k_is_the_checkpoints(self, talker, model, tmp_path) -> None:
        assert len(model.generate(None, "What?", max_new_tokens=1).latents) == 4
        directory = shutil.copytree(talker.directory, tmp_path / "model")
        (directory / "vital.json").write_text(json.dumps({"k": 2}))
        assert len(generate_with_any_model(None, "What?", model=directory, max_new_tokens=1).latents) == 2
        assert len(generate_with_any_model(None, "What?", 0, model=directory, max_new_tokens=1).latents) == 0

    def test_questions_about_one_image_read_it_once(self, model, monkeypatch, tmp_path) -> None:
        Image.fromarray(PICTURES[0]).save(path := tmp_path / "one.png")
        original, reads = image_reading.read_image, []
        monkeypatch.setattr(
            image_reading, "read_image", lambda *args, **kw: reads.append(args[0]) or original(*args, **kw)
        )
        several = [str(path), str(path), PICTURES[1], PICTURES[1], PICTURES[1].copy()]
        requests = [vitalrt.Request(image, f"Is {n} visible?", k=n) for n, image in enumerate(several)]
        answers = model.generate_batch(requests)
        assert len(reads) == 3
        for request, answer in zip(requests, answers, strict=True):
            assert answer.token_ids == model.generate(request.image, request.question, request.k).token_ids

    def test_an_image_is_resized_when_the_tower_must_look(self, talker, monkeypatch) -> None:
        resized = []
        patchify = processor.patchify
        monkeypatch.setattr(processor, "patchify", lambda *of: resized.append(of) or patchify(*of))
        model = talker.load(cache_tokens=256)

        def ask(question: str, salt: str | None = None) -> vitalrt.Answer:
            return model.generate(PICTURES[0], question, k=1, max_new_tokens=3, terms=vitalrt.Terms(cache_salt=salt))

        first = ask("What?")
        assert ask("What?").token_ids == first.token_ids and len(resized) == 1
        assert "".join(model.stream(PICTURES[0], "What?", k=1, max_new_tokens=3)) == first.text and len(resized) == 1
        assert ask("What?", "a tenant's").token_ids == first.token_ids and len(resized) == 2
        assert model.prepare(PICTURES[0], "What?").pixel_values is not None and len(resized) == 3
        salts = [vitalrt.Terms(), vitalrt.Terms(cache_salt="new")]
        asked = [vitalrt.Request(PICTURES[0], "What?", k=1, max_new_tokens=3, terms=terms) for terms in salts]
        with monkeypatch.context() as patch:  # a batch resizes before the engine is asked, whoever comes first
            patch.setattr(
                model.engine, "submit", lambda *_: pytest.fail("resized too late") if len(resized) < 4 else 1 / 0
            )
            with pytest.raises(ZeroDivisionError):
                model.generate_batch(asked)
        # It was kept when the request came, and is gone with all its pages when it is looked at.
        monkeypatch.setattr(model.engine.encoder, "knows", lambda key: True)
        assert ask("What?", "another's").token_ids == first.token_ids and len(resized) == 5

    def test_pictures_are_read_side_by_side_once_one_is_slow(self, model, monkeypatch) -> None:
        original, readers = image_reading.read_image, []
        two_at_once = threading.Barrier(2, timeout=30)

        def read(source, *rest, **named):
            readers.append(threading.get_ident())
            if len(readers) == 3:
                time.sleep(2 * WORTH_A_THREAD_S)
            elif len(readers) > 3:
                two_at_once.wait()
            return original(source, *rest, **named)

        monkeypatch.setattr(image_reading, "read_image", read)
        monkeypatch.setattr("vitalrt.api.WORTH_A_THREAD_S", 5.0)
        model.generate_batch([vitalrt.Request(picture.copy(), "What?", max_new_tokens=1) for picture in PICTURES[:2]])
        assert set(readers) == {threading.get_ident()}  # quick ones, by the caller alone
        monkeypatch.setattr("vitalrt.api.WORTH_A_THREAD_S", WORTH_A_THREAD_S)
        model.generate_batch([vitalrt.Request(picture.copy(), "What?", max_new_tokens=1) for picture in PICTURES[:3]])
        assert len(readers) == 5 and not {threading.get_ident()} & set(readers[3:])

    def test_the_first_picture_that_cannot_be_read_is_named(self, model, tmp_path) -> None:
        paths = [tmp_path / f"{name}.png" for name in ("one", "other")]
        requests = [vitalrt.Request(image, "What?") for image in (PICTURES[0], *paths)]
        with pytest.raises(vitalrt.InputError, match=r"'one\.png'"):
            model.generate_batch(requests)
        with pytest.raises(vitalrt.InputError, match=r"'other\.png'"):
            model.generate_batch(requests[::-1])

    def test_batch_equals_singles(self, model) -> None:
        requests = [
            vitalrt.Request(PICTURES[0], "Is the liver visible?", k=0),
            vitalrt.Request(PICTURES[1:3], "Where?", k=3, max_new_tokens=5),
            vitalrt.Request(None, "What?", max_new_tokens=30),
            vitalrt.Request(Image.fromarray(PICTURES[3]), "Left?", k=1, temperature=1.5, top_k=40, top_p=0.95, seed=3),
        ]
        for request, answer in zip(requests, model.generate_batch(requests), strict=True):
            alone = model.generate(**vars(request))
            assert (answer.text, answer.token_ids) == (alone.text, alone.token_ids)
            assert replace(answer.usage, cached_tokens=0) == replace(alone.usage, cached_tokens=0)
            torch.testing.assert_close(answer.latents, alone.latents, atol=1e-5, rtol=1e-5)
        assert model.generate_batch([]) == []

    def test_run_takes_what_prepare_gives(self, model) -> None:
        prompt = model.prepare(PICTURES[0], "Is the liver visible?")
        [answer] = model.run([prompt], k=2, max_new_tokens=6, return_logits=True)
        assert answer.text == model.generate(PICTURES[0], "Is the liver visible?", k=2, max_new_tokens=6).text
        assert answer.logits.shape == (answer.usage.completion_tokens, model.weights.config.decoder.vocab_size)

    def test_threads(self, model) -> None:
        def ask(number: int) -> tuple[list[int], int]:
            answer = model.generate(PICTURES[number % 4], f"Question {number}?", k=number % 5, max_new_tokens=6)
            return answer.token_ids, answer.usage.latent_steps

        expected = [ask(number) for number in range(12)]
        with ThreadPoolExecutor(6) as threads:
            assert list(threads.map(ask, range(12))) == expected


class TestStream:
    @settings(max_examples=60, deadline=None)
    @given(text=st.text(max_size=25) | st.text("é肝🫁👩‍⚕️ñ", min_size=1, max_size=12))
    def test_pieces_are_whole_characters(self, talker, text) -> None:
        model = talker.model
        text = model.processor.tokenizer.backend_tokenizer.normalizer.normalize_str(text)
        ids = model.processor.tokenizer(text)["input_ids"]
        with spoken(ids, talker.stop_ids[0]):
            pieces = list(model.stream(None, "What?", k=1, max_new_tokens=len(ids) + 1))
        assert "".join(pieces) == model.processor.decode(ids)
        assert all(pieces)
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in pieces)

    def test_characters_come_as_soon_as_they_are_whole(self, talker, model) -> None:
        ids = model.processor.tokenizer("a🫁b")["input_ids"]
        assert len(ids) == 6
        with spoken(ids, talker.stop_ids[0]):
            assert list(model.stream(None, "What?", k=0)) == ["a", "🫁", "b"]

    @pytest.mark.parametrize("seed", range(6))
    def test_any_bytes_join_to_the_text(self, model, seed) -> None:
        """Random weights speak bytes that are no UTF-8, and stop inside characters."""
        options = {"k": 2, "max_new_tokens": 40, "temperature": 3.0, "seed": seed}
        answer = model.generate(PICTURES[0], "What?", **options)
        assert "\ufffd" in answer.text
        assert "".join(model.stream(PICTURES[0], "What?", **options)) == answer.text

    def test_an_unfinished_character_at_the_end_is_not_lost(self, talker, model) -> None:
        ids = model.processor.tokenizer("ab🫁")["input_ids"][:-1]
        with spoken(ids, talker.stop_ids[0]):
            pieces = list(model.stream(None, "What?", k=0))
        assert pieces[:2] == ["a", "b"]
        assert "".join(pieces) == model.processor.decode(ids)

    @pytest.mark.parametrize("num_pieces", [0, 1, 3])
    def test_closing_half_way_frees_the_cache(self, model, num_pieces) -> None:
        pieces = model.stream(PICTURES[0], "What?", k=2, max_new_tokens=50, temperature=1.0, seed=1)
        for _ in range(num_pieces):
            next(pieces)
        assert (model.engine.statistics().pages_used > 0) == (num_pieces > 0)
        pieces.close()
        assert model.engine.statistics().pages_used == 0
        assert list(pieces) == []

    def test_nothing_is_lost_when_others_move_it_on(self, model) -> None:
        """Another request's steps advance a stream too, even to its end, while its reader does something else."""
        options = {"k": 1, "max_new_tokens": 12, "temperature": 1.0, "seed": 2}
        expected = model.generate(PICTURES[0], "What?", **options).text
        pieces = model.stream(PICTURES[0], "What?", **options)
        first = next(pieces)
        model.generate(PICTURES[1], "Where?", k=3, max_new_tokens=40, temperature=1.0, seed=4)
        assert first + "".join(pieces) == expected

    def test_streams_in_threads(self, model) -> None:
        options = {"k": 2, "max_new_tokens": 25, "temperature": 2.0}
        expected = [model.generate(None, f"Question {n}?", seed=n, **options).text for n in range(8)]
        start = threading.Barrier(8)

        def read(number: int) -> str:
            start.wait()
            return "".join(model.stream(None, f"Question {number}?", seed=number, **options))

        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(read, range(8))) == expected

    def test_arguments_are_checked_at_once(self, model) -> None:
        with pytest.raises(vitalrt.VitalError, match=r"^k: "):
            model.stream(None, "What?", k=-1)
        with pytest.raises(vitalrt.InputError, match=r"^question: "):
            model.stream(None, "")


def test_a_failure_elsewhere_is_not_an_empty_answer(model, monkeypatch) -> None:
    """A thread whose step fails takes down the batch that it shares; the others hear of it."""
    pieces = model.stream(None, "What?", k=0, max_new_tokens=30, temperature=1.0, seed=0)
    next(pieces)
    with monkeypatch.context() as patch:
        patch.setattr(model.engine, "cpu_decoder", None)
        patch.setattr("vitalrt.engine.step.decode_attention", None)
        with pytest.raises(TypeError):
            model.generate(None, "Where?", k=3)
    with pytest.raises(RuntimeError, match="another thread"):
        list(pieces)


BAD_DECODINGS = [
    *[("k", value) for value in (-1, 65, 1.0, "4", True, [2])],
    *[("max_new_tokens", value) for value in (0, -5, 2.0, None, True)],
    *[("temperature", value) for value in (-0.1, float("nan"), float("inf"), 101, "hot", None, True)],
    *[("top_p", value) for value in (0, -0.5, 1.5, float("nan"), "much")],
    *[("top_k", value) for value in (-1, 2.5, None)],
    *[("seed", value) for value in (-1, 2**63, 1.5, "x")],
]


@pytest.mark.parametrize(("name", "value"), BAD_DECODINGS)
def test_bad_sampling_arguments_are_named(model, name, value) -> None:
    options = {"temperature": 1.0, name: value}
    for call in (model.generate, model.stream):
        with pytest.raises(vitalrt.VitalError, match=rf"^{name}: expected .* got "):
            call(None, "What?", **options)
    with pytest.raises(vitalrt.VitalError, match=rf"^{name}: expected .* got "):
        model.generate_batch([vitalrt.Request(None, "Fine?"), vitalrt.Request(None, "What?", **options)])
    if name != "k" or not isinstance(value, list):  # run() takes a list of k
        with pytest.raises(vitalrt.VitalError, match=rf"^{name}: expected .* got "):
            model.run([vitalrt.Prompt([1])], **options)


PROMPT = vitalrt.Prompt([1, 2])
BAD_CALLS: dict[str, tuple[Callable[[vitalrt.Model], object], str]] = {
    "one prompt": (lambda m: m.run(PROMPT), r"prompts: expected a list of vitalrt.Prompt, got Prompt"),
    "ids": (lambda m: m.run([[1, 2]]), r"prompts: expected vitalrt.Prompt, got list"),
    "few k": (lambda m: m.run([PROMPT] * 3, k=[1, 2]), r"k: expected one int or 3 of them, got 2"),
    "k in words": (lambda m: m.run([PROMPT], k="4"), r"k: expected an int"),
    "one request": (lambda m: m.generate_batch(vitalrt.Request(None, "What?")), r"requests: expected a list"),
    "tuples": (lambda m: m.generate_batch([(None, "What?")]), r"requests: expected vitalrt.Request, got tuple"),
    "question": (lambda m: m.generate(None, 5), r"question: expected non-empty text, got int"),
    "picture": (lambda m: m.generate(3.5, "What?"), r"image"),
    "second picture": (lambda m: m.generate([PICTURES[0], 3.5], "What?"), r"image\[1\]"),
    "no file": (lambda m: m.generate("no-such-file.png", "What?"), r".*no-such-file.png"),
    "patch width": (
        lambda m: m.run([vitalrt.Prompt([m.weights.config.image_token_id], torch.zeros(4, 95), [[1, 2, 2]])]),
        r"pixel_values: expected \[patches, 96\], got \[4, 95\]",
    ),
    "too long": (lambda m: m.generate(None, "What?" * 3000), r"cache_tokens: the request needs"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_are_named(model, case) -> None:
    call, message = BAD_CALLS[case]
    with pytest.raises(vitalrt.VitalError, match=rf"^{message}") as caught:
        call(model)
    assert "\n" not in str(caught.value)
