"""`vitalrt serve --ray` with two replicas of the bundled model on the CPU."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'vitalrt[ray]'")

from bench.serve_process import Served, served
from bench.serve_visits import REPLICA_LOST, Question, Visitor, wrong_answers
from vitalrt.cli import main

REPLICA = "x-vitalrt-replica"
QUESTION = "Is the liver visible?"


@pytest.fixture(scope="module")
def cluster():
    with served("--ray", "--replicas", "2", "--cache-tokens", "4096", "--drain-s", "5") as found:
        yield found


def ask(cluster: Served, phantom: int, text: str = QUESTION, **more) -> httpx.Response:
    body = Question(phantom, text, k=1).body(**more)
    return httpx.post(f"{cluster.url}/v1/chat/completions", json=body, timeout=60)


def replicas_of(cluster: Served) -> set[str]:
    return {sample.labels["replica"] for sample in cluster.samples("prompt_tokens_total")}


def test_questions_about_one_image_meet_at_one_replica_and_images_spread(cluster):
    met = defaultdict(set)
    for phantom in range(16):
        for text in (QUESTION, "Where is the cyst?"):
            response = ask(cluster, phantom, text)
            assert response.status_code == 200
            met[phantom].add(response.headers[REPLICA])
    assert all(len(replicas) == 1 for replicas in met.values())
    assert set.union(*met.values()) == replicas_of(cluster)
    assert len(replicas_of(cluster)) == 2


def test_requests_without_an_image_are_for_anybody(cluster):
    body = {"model": "phantom@k=0", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 1}
    url = f"{cluster.url}/v1/chat/completions"
    assert {httpx.post(url, json=body).headers[REPLICA] for _ in range(16)} == replicas_of(cluster)


def test_the_same_paths_answer_in_the_same_way(cluster):
    with httpx.Client(base_url=cluster.url, timeout=30) as http:
        for path, status in {
            "/health": 200,
            "/ready": 200,
            "/version": 200,
            "/v1/models": 200,
            "/nowhere": 404,
        }.items():
            response = http.get(path)
            assert response.status_code == status
            assert "not for clinical decisions" in response.headers["x-vitalrt-notice"]
            assert len(response.headers.get_list("x-request-id")) == 1
    refused = ask(cluster, 0, temperature=9)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "temperature")


def test_metrics_are_of_all_replicas(cluster):
    before = cluster.metric("prompt_tokens_total")
    usages = [ask(cluster, phantom).json()["usage"] for phantom in range(4)]
    assert cluster.metric("prompt_tokens_total") == before + sum(usage["prompt_tokens"] for usage in usages)


def test_a_client_that_leaves_frees_its_pages(cluster, until):
    """When an answer is under way depends on the machine: whoever left too early or too late leaves another time."""

    def num_aborted() -> float:
        return cluster.metric("request_success_total", finished_reason="abort")

    def left(patience_s: float) -> bool:
        before = num_aborted()
        body = Question(0, QUESTION, k=64).body(n=8, temperature=2, seed=0)
        with contextlib.suppress(httpx.ReadTimeout):
            httpx.post(f"{cluster.url}/v1/chat/completions", json=body, timeout=httpx.Timeout(60, read=patience_s))
        until(lambda: cluster.metric("num_requests_running") + cluster.metric("kv_cache_usage_perc") == 0)
        return num_aborted() > before

    assert any(left(0.01 * 1.25**number) for _ in range(3) for number in range(20))


def test_clients_that_leave_cost_others_nothing(cluster):
    visitor = Visitor(cluster.url, seed=2, kinds={"whole": 1, "streamed": 1, "left": 1})
    with ThreadPoolExecutor(6) as clients:
        visits = list(clients.map(visitor.visit, range(120)))
    visitor.close()
    assert not [visit for visit in visits if visit.trouble]
    assert all(visit.texts for visit in visits if visit.kind != "left")
    assert "its replica" not in cluster.log.read_text(errors="replace")


def test_a_replica_that_is_killed_is_replaced_and_no_answer_is_wrong(cluster, phantom):
    old = replicas_of(cluster)
    visitor = Visitor(cluster.url, seed=1, kinds={"whole": 1, "streamed": 1})

    def kill() -> None:
        time.sleep(1)
        os.kill(cluster.children("ray::ServeReplica:vitalrt:Replica")[0], signal.SIGKILL)

    with ThreadPoolExecutor(7) as clients:
        killing = clients.submit(kill)
        visits = list(clients.map(visitor.visit, range(200)))
        killing.result()
    visitor.close()
    assert {visit.status for visit in visits} <= {200, 503, 0}
    in_trouble = [(visit.kind, visit.trouble) for visit in visits if visit.trouble not in (None, REPLICA_LOST)]
    assert not in_trouble, cluster.log.read_text(errors="replace")[-20_000:]
    assert sum(bool(visit.texts) for visit in visits) > 150
    assert not wrong_answers(visits, phantom)

    deadline = time.monotonic() + 90
    while len(new := replicas_of(cluster)) < 2 or new == old:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert len(new & old) == 1
    assert {ask(cluster, phantom).headers[REPLICA] for phantom in range(16)} == new


def test_no_question_is_in_the_log(cluster):
    assert "liver" not in cluster.log.read_text(errors="replace")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--replicas", "2"], "--ray"),
        (["--ray", "--replicas", "0"], "replicas"),
        (["nowhere-at-all", "--ray"], "model"),
        (["--ray", "--port", "0"], "port"),
    ],
)
def test_bad_arguments_are_named_before_ray_is_started(capsys, arguments, named):
    assert main(["serve", "--device", "cpu", *arguments]) == 1
    assert named in capsys.readouterr().err
