"""What /metrics says against what was sent and answered."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families


def test_metrics_agree_with_what_was_answered(phantom, serve, until):
    with serve(phantom) as running:
        usages = [running.post(vital={"latent_steps": k}).json()["usage"] for k in (0, 1, 4)]
        usages.append(running.post(n=2).json()["usage"])
        running.post(max_tokens=1)
        running.post(temperature=9)
        running.post(stream=True, vital={"latent_steps": 3})

        assert running.metric("generation_tokens_total") == sum(u["completion_tokens"] for u in usages) + 1 + 3
        prompt_tokens = usages[0]["prompt_tokens"]
        assert running.metric("prompt_tokens_total") == 7 * prompt_tokens
        assert running.metric("prefix_cache_queries_total") == 7 * prompt_tokens
        first, *others = (usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
        assert set(others) == {prompt_tokens // 16 * 16}
        hits = first + 6 * others[0]
        assert running.metric("prefix_cache_hits_total") == hits
        assert running.metric("prefix_cache_hit_rate") == pytest.approx(hits / (7 * prompt_tokens))
        assert running.metric("latent_steps_total") == 0 + 1 + 4 + 8 + 4 + 3
        assert running.metric("request_success_total", finished_reason="stop") == 6
        assert running.metric("request_success_total", finished_reason="length") == 1
        assert running.metric("http_responses_total", code="400") == 1
        assert running.metric("latent_step_seconds_count") == 6
        assert running.metric("request_latent_time_seconds_count") == 6
        for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
            assert running.metric(f"{name}_count") == 7
        assert 0 < running.metric("latent_step_seconds_sum") < running.metric("request_latent_time_seconds_sum")
        until(lambda: running.metric("num_requests_running") == 0)
        for idle in ("num_requests_waiting", "kv_cache_usage_perc"):
            assert running.metric(idle) == 0


def test_the_page_is_valid_and_each_server_has_its_own(running, phantom, serve):
    with serve(phantom, model_name="other") as second:
        second.post(model="other")
        with second.http() as http:
            response = http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = list(text_string_to_metric_families(response.text))
    assert all(family.name.startswith("vitalrt:") for family in families)
    assert {sample.labels.get("model_name", "other") for family in families for sample in family.samples} == {"other"}
