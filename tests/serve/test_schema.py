"""Requests made up from the OpenAPI document: none may end in a 5xx, or in a way that the document does not tell."""

from __future__ import annotations

import collections

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import CHECKS, load_all_checks

OPERATIONS = {
    "POST /v1/chat/completions": 80,
    "GET /v1/models": 3,
    "GET /v1/models/{model}": 20,
    "GET /health": 3,
    "GET /ready": 3,
    "GET /metrics": 3,
    "GET /version": 3,
}

CONFORMANCE = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)
load_all_checks()


def operations_of(running):
    schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
    return {found.ok().label: found.ok() for found in schema.get_all_operations()}


@pytest.fixture(scope="module")
def operations(running):
    return operations_of(running)


def test_every_operation_is_tried(operations):
    assert set(operations) == set(OPERATIONS)


def _get_past_the_door(case, stream):
    """Made-up names of models, and questions, are refused at once: give it real ones beside what else was made up."""
    if "model" in case.path_parameters:
        case.path_parameters["model"] = "phantom@k=3"
    if isinstance(case.body, dict):
        case.body |= {"model": "phantom", "messages": [{"role": "user", "content": "Is the liver visible?"}]}
        if stream:
            case.body["stream"] = True


@pytest.mark.parametrize("label", OPERATIONS)
def test_no_made_up_request_ends_in_a_5xx(operations, label):
    """Half of the requests fit the schema, half break it in one place or another."""
    operation = operations[label]
    modes = [operation.as_strategy(generation_mode=mode) for mode in schemathesis.GenerationMode]
    statuses: collections.Counter[int] = collections.Counter()

    @settings(
        max_examples=OPERATIONS[label],
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def check(data):
        case = data.draw(st.one_of(modes))
        if data.draw(st.booleans()):
            _get_past_the_door(case, stream=data.draw(st.booleans()))
        response = case.call()
        statuses[response.status_code] += 1
        case.validate_response(response, checks=CHECKS.get_by_names(CONFORMANCE))

    check()
    assert max(statuses) < 500
    assert 200 in statuses


@pytest.mark.parametrize(("steps", "last"), [(1, '"code": "deadline_exceeded"'), (1000, '"finish_reason":"stop"')])
def test_the_events_of_a_stream_are_as_documented(phantom, brake, serve, short_deadline_s, steps, last):
    brake.allow(steps)
    with serve(phantom, deadline_s=short_deadline_s) as running:
        operation = operations_of(running)["POST /v1/chat/completions"]
        body = {"model": "phantom", "messages": running.messages(), "stream": True}
        response = operation.Case(body=body, media_type="application/json").call_and_validate()
        documented = running.http().get("/openapi.json").json()["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert last in response.text.split("\n\n")[-3]
    assert "itemSchema" in documented["200"]["content"]["text/event-stream"], "events were held to nothing"
