"""A full queue, deadlines, clients that leave, and a server that is told to stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest

MANY_STEPS = 1000


def in_background(function) -> threading.Thread:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


@pytest.fixture
def waiting(running_slowly, until):
    """waiting(n): so many requests of their own threads, that have reached the queue."""
    replies: list[httpx.Response] = []

    def start(count: int) -> list[httpx.Response]:
        for number in range(count):
            in_background(lambda: replies.append(running_slowly.post()))
            until(lambda number=number: running_slowly.app.worker.num_waiting == number + 1)
        return replies

    return start


@pytest.fixture
def running_slowly(phantom, brake, serve):
    with serve(phantom, max_queue=2, deadline_s=60) as running:
        yield running
        brake.allow(MANY_STEPS)


def test_a_full_queue_is_a_429_with_a_time_to_come_back(running_slowly, waiting, brake, until):
    replies = waiting(2)
    refused = running_slowly.post()
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["code"] == "queue_full"
    assert running_slowly.http().get("/ready").status_code == 429
    assert running_slowly.http().get("/health").status_code == 200
    assert running_slowly.metric("num_requests_waiting") == 2
    with pytest.raises(openai.RateLimitError):
        running_slowly.openai().chat.completions.create(model="phantom", messages=running_slowly.messages())
    brake.allow(MANY_STEPS)
    until(lambda: len(replies) == 2)
    assert [reply.status_code for reply in replies] == [200, 200]
    assert running_slowly.post().status_code == 200


def test_the_client_tries_again_when_it_is_told_to(running_slowly, waiting, brake):
    waiting(2)
    in_background(lambda: (time.sleep(0.2), brake.allow(MANY_STEPS)))
    client = running_slowly.openai(max_retries=3)
    answer = client.chat.completions.create(model="phantom", messages=running_slowly.messages())
    assert answer.choices[0].message.content == "lower left"


def test_choices_count_one_by_one(running_slowly, waiting):
    waiting(1)
    assert running_slowly.post(n=2).status_code == 429


def test_a_client_that_leaves_while_it_waits_gives_its_place_back(running_slowly, until):
    client = running_slowly.openai(timeout=0.5)
    with pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(model="phantom", messages=running_slowly.messages())
    until(lambda: running_slowly.app.worker.num_waiting == 0)
    assert running_slowly.num_pages_taken == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_pages_at_once(running_slowly, brake, until, stream):
    """The engine does no step after the client has gone, so that nothing but the cancellation frees the pages."""
    body = {"model": "phantom", "messages": running_slowly.messages(), "stream": stream, "n": 2}
    brake.allow(2)
    with pytest.raises(httpx.ReadTimeout), running_slowly.http(timeout=1) as http:
        with http.stream("POST", "/v1/chat/completions", json=body) as response:
            for _ in response.iter_lines():
                assert running_slowly.app.worker.num_waiting <= 2
        pytest.fail("the answer came to an end")
    until(lambda: running_slowly.num_pages_taken == 0)
    brake.allow(1)
    until(lambda: running_slowly.metric("request_success_total", finished_reason="abort") == 2)
    assert running_slowly.app.worker.num_waiting == 0


def test_pages_are_taken_while_a_stream_runs(running_slowly, brake, until):
    """What the test above relies on."""
    brake.allow(2)
    in_background(lambda: running_slowly.post(stream=True))
    until(lambda: running_slowly.num_pages_taken > 0)
    assert running_slowly.metric("num_requests_running") == 1
    assert 0 < running_slowly.metric("kv_cache_usage_perc") < 1


def test_a_deadline_is_a_408_that_asks_for_no_retry(phantom, brake, serve, short_deadline_s, until):
    with serve(phantom, deadline_s=short_deadline_s) as running:
        response = running.post()
        assert response.status_code == 408
        assert response.json()["error"]["code"] == "deadline_exceeded"
        until(lambda: running.app.worker.num_waiting == 0)
        streamed = running.post(stream=True)
        assert streamed.status_code == 200
        assert '"code": "deadline_exceeded"' in streamed.text
        assert streamed.text.endswith("data: [DONE]\n\n")
        started = time.monotonic()
        with pytest.raises(openai.APIStatusError) as late:
            running.openai(max_retries=2).chat.completions.create(model="phantom", messages=running.messages())
        assert late.value.status_code == 408
        assert time.monotonic() - started < 2 * short_deadline_s
        with pytest.raises(openai.APIError, match="deadline"):
            list(running.openai().chat.completions.create(model="phantom", messages=running.messages(), stream=True))
        brake.allow(MANY_STEPS)
        until(lambda: running.num_pages_taken == 0)


def test_a_request_that_arrives_slowly_meets_the_deadline_too(phantom, serve):
    def slowly():
        yield b"{"
        time.sleep(0.6)
        yield b"}"

    with serve(phantom, deadline_s=0.3) as running, running.http() as http:
        headers = {"content-type": "application/json"}
        assert http.post("/v1/chat/completions", content=slowly(), headers=headers).status_code == 408


def test_running_answers_are_complete_before_a_server_stops(phantom, brake, serve, until):
    with serve(phantom) as running:
        texts: list[str] = []
        thread = in_background(lambda: texts.append(running.post(stream=True).text))
        until(lambda: running.app.worker.num_waiting == 1)
        running.uvicorn.should_exit = True
        until(lambda: not running.uvicorn.servers[0].is_serving())
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{running.url}/health")
        brake.allow(MANY_STEPS)
        thread.join(20)
    assert '"finish_reason":"stop"' in texts[0]


def test_answers_that_take_too_long_are_cut_when_a_server_stops(phantom, brake, serve, until, tmp_path):
    audit = tmp_path / "audit.jsonl"
    with serve(phantom, drain_s=1, audit_file=audit) as running:
        failures: list[Exception] = []

        def ask() -> None:
            try:
                running.post(stream=True)
            except httpx.HTTPError as error:
                failures.append(error)

        thread = in_background(ask)
        until(lambda: running.app.worker.num_waiting == 1)
        running.uvicorn.should_exit = True
        thread.join(20)
        assert failures
        until(lambda: not running.app.worker.is_alive)
        assert running.num_pages_taken == 0
    assert json.loads(audit.read_text())["outcome"] == "disconnected"


def test_the_command_serves_and_ends_gracefully_on_sigterm(tmp_path):
    command = [sys.executable, "-m", "vitalrt.cli", "serve", "--device", "cpu", "--port", "0", "--cache-tokens", "2048"]
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 60
        while "running on" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        url = log.read_text().partition("running on ")[2].split()[0]
        assert url.startswith("http://127.0.0.1:")
        question = {"role": "user", "content": "Is the liver visible?"}
        body = {"model": "phantom", "messages": [question], "stream": True, "temperature": 2, "max_tokens": 1000}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert list(lines)[-2] == "data: [DONE]"
        assert process.wait(30) == -signal.SIGTERM
        assert "Application shutdown complete" in log.read_text()
        assert "liver" not in log.read_text()
    finally:
        process.kill()
