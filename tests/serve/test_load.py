"""Many clients at once: every answer is the right one, and nothing is left behind."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

DEMO = Path(__file__).parents[2] / "examples" / "demo.png"
QUESTIONS = ("Where is the cyst?", "Can the kidney be seen here?", "Is the liver visible?")


@pytest.fixture(scope="module")
def expected(phantom) -> dict[tuple[str, int], str]:
    return {(question, k): str(phantom.generate(DEMO, question, k)) for question in QUESTIONS for k in range(5)}


def test_mixed_requests_cancellations_and_bad_bodies(running, until, expected):
    client = running.openai(max_retries=0)

    def visit(seed: int) -> str:
        draw = random.Random(seed)
        (question, k), answer = draw.choice(list(expected.items()))
        body = {"model": f"phantom@k={k}", "messages": running.messages(question)}
        kind = draw.choice(["whole", "stream", "stream", "leave", "bad"])
        if kind == "whole":
            assert client.chat.completions.create(**body).choices[0].message.content == answer
        elif kind == "stream":
            pieces = [
                chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**body, stream=True)
            ]
            assert "".join(pieces) == answer
        elif kind == "leave":
            with httpx.stream("POST", f"{running.url}/v1/chat/completions", json={**body, "stream": True}) as response:
                next(response.iter_lines())
        else:
            assert running.post(**{**body, draw.choice(["n", "seed", "stop"]): {}}).status_code == 400
        return kind

    with ThreadPoolExecutor(8) as clients:
        kinds = list(clients.map(visit, range(80)))
    assert set(kinds) == {"whole", "stream", "leave", "bad"}
    until(lambda: running.num_pages_taken == 0)
    until(lambda: not running.uvicorn.server_state.tasks)
    assert running.app.worker.num_waiting == 0
    assert not running.app.worker._jobs and not running.app.worker._choices
    running.app.worker.engine.cache.pool.check_integrity()
