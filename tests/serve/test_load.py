"""Many clients at once: every answer is the right one, and nothing is left behind."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest

from bench.serve_visits import KINDS, Visitor, wrong_answers


@pytest.fixture
def num_tasks(running):
    """How many asyncio tasks the server's event loop has."""
    return lambda: len(asyncio.all_tasks(running.app.worker._loop))


def test_mixed_requests_cancellations_and_bad_bodies(running, until, phantom, num_tasks):
    num_idle_tasks = num_tasks()
    visitor = Visitor(running.url, seed=0)
    with ThreadPoolExecutor(8) as clients:
        visits = list(clients.map(visitor.visit, range(120)))
    assert {visit.kind for visit in visits} == set(KINDS)
    assert not [visit for visit in visits if visit.trouble]
    assert all(visit.texts for visit in visits if visit.kind in ("whole", "streamed", "sampled"))
    assert not wrong_answers(visits, phantom)
    until(lambda: running.num_pages_taken == 0)
    visitor.close()
    until(lambda: not running.uvicorn.server_state.tasks)
    until(lambda: num_tasks() <= num_idle_tasks)
    worker = running.app.worker
    assert worker.num_waiting == 0 and not worker._jobs and not worker._choices
    worker.engine.cache.pool.check_integrity()
