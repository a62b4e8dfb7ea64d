"""What requests leave for each other, as usage and metrics tell it."""

from __future__ import annotations

import io
import threading

import httpx
import numpy as np
import pytest
from PIL import Image

import vitalrt
from vitalrt.engine.sequence import Sequence

PAGE = 16  # tokens
COUNTERS = ("prompt_tokens_total", "prefix_cache_queries_total", "prefix_cache_hits_total", "images_encoded_total")


@pytest.fixture(scope="module")
def running(serve):
    """A server whose caches nobody else has used."""
    with serve(vitalrt.load(device="cpu", cache_tokens=4096)) as found:
        yield found


@pytest.fixture
def counted(running):
    """counted(): by how much each of COUNTERS has grown since the test began."""
    before = {name: running.metric(name) for name in COUNTERS}
    return lambda: [running.metric(name) - before[name] for name in COUNTERS]


def picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (96, 96), np.uint8)).save(file, "PNG")
    return file.getvalue()


def usage_of(running, number: int, question: str = "Is the liver visible?", **more) -> dict:
    """Of a question about picture `number`."""
    response = running.post(messages=running.messages(question, [running.data_uri(picture(number))]), **more)
    assert response.status_code == 200
    return response.json()["usage"]


def cached(usage: dict) -> int:
    return usage["prompt_tokens_details"]["cached_tokens"]


def test_hit_rates_agree_with_usage_and_with_the_engine(running, counted):
    engine = running.app.worker.engine
    before = engine.statistics()
    usages = [
        usage_of(running, number, question, vital={"latent_steps": k})
        for question in ("Is the liver visible?", "Where is the cyst?", "Is the liver visible?")
        for number in (1, 2, 3)
        for k in (0, 2)
    ]
    prompt_tokens, hits = sum(u["prompt_tokens"] for u in usages), sum(map(cached, usages))
    assert counted() == [prompt_tokens, prompt_tokens, hits, 3]
    assert hits > prompt_tokens / 2
    after = engine.statistics()
    assert after.prompt_tokens - before.prompt_tokens == prompt_tokens
    assert after.cached_tokens - before.cached_tokens == hits
    assert running.metric("prefix_cache_hit_rate") == pytest.approx(
        running.metric("prefix_cache_hits_total") / running.metric("prefix_cache_queries_total")
    )


def test_a_second_question_finds_the_image_and_a_repeated_one_nearly_all(running, counted):
    first = usage_of(running, 10)
    other = usage_of(running, 10, "Where is the cyst?")
    again = usage_of(running, 10)
    assert cached(first) == 0
    assert cached(other) >= PAGE
    assert (
        cached(again) == (again["prompt_tokens"] - 1) // PAGE * PAGE
        or cached(again) == again["prompt_tokens"] // PAGE * PAGE
    )
    assert counted()[3] == 1


def test_tenants_do_not_see_each_others_hits(running, counted):
    """By the statistics alone: a tenant's first request finds nothing of what others have asked, word for word."""
    salts = ["one", "other", None]
    for salt in salts:
        vital = {} if salt is None else {"cache_salt": salt}
        assert cached(usage_of(running, 20, vital=vital)) == 0
        assert cached(usage_of(running, 20, vital=vital)) >= PAGE
    assert counted()[3] == len(salts)  # features of images are not shared either


def test_choices_share_their_prompt(running, counted):
    usage = usage_of(running, 30, n=4, seed=0, temperature=1.0)
    prompt_tokens, queries, hits, images = counted()
    assert (prompt_tokens, queries, images) == (4 * usage["prompt_tokens"], 4 * usage["prompt_tokens"], 1)
    assert hits >= 3 * ((usage["prompt_tokens"] - 1) // PAGE * PAGE)


def test_lower_priority_numbers_go_first(serve, until):
    """One place in the batch. Who is in it goes on; of those that wait, the number decides, and then the arrival."""
    model = vitalrt.load(device="cpu", cache_tokens=2048, max_batch=1)
    engine = model.engine
    submit, advance, may_step = engine.submit, engine.advance, threading.Event()
    sequences: list[Sequence] = []  # as they came to the engine
    finished: list[int] = []

    def note_submitted(*request) -> Sequence:
        sequences.append(submit(*request))
        return sequences[-1]

    def note_finished() -> None:
        if may_step.wait(0.01):
            advance()
            ended = (number for number, sequence in enumerate(sequences) if sequence.is_finished)
            finished.extend(number for number in ended if number not in finished)

    engine.submit, engine.advance = note_submitted, note_finished
    statuses: list[int] = []
    with serve(model) as running:
        threads = []
        for number, priority in enumerate([-100, 5, 0, 5, -5]):
            vital = {"priority": priority, "latent_steps": 0}
            threads.append(
                threading.Thread(target=lambda vital=vital: statuses.append(running.post(vital=vital).status_code))
            )
            threads[-1].start()
            until(lambda number=number: len(sequences) == number + 1)
        may_step.set()
        for thread in threads:
            thread.join(30)
    assert statuses == [200] * 5
    assert finished == [0, 4, 2, 1, 3]


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_may_set_itself_a_shorter_deadline(phantom, brake, serve, short_deadline_s, stream):
    with serve(phantom, deadline_s=60) as running:
        response: httpx.Response = running.post(stream=stream, vital={"deadline_s": short_deadline_s})
        brake.allow(1000)
        assert f"deadline of {short_deadline_s:g} seconds" in response.text
        assert response.status_code == (200 if stream else 408)


def test_a_request_cannot_set_itself_a_longer_deadline(phantom, brake, serve):
    with serve(phantom, deadline_s=0.3) as running:
        response = running.post(vital={"deadline_s": 50})
        brake.allow(1000)
    assert response.status_code == 408
