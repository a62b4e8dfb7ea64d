"""The door before replicas that do as they are told."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'vitalrt[ray]'")

from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.exceptions import BackPressureError

from vitalrt.serve.door import Door, first_image
from vitalrt.serve.settings import ServeConfig

JSON, EVENTS = "application/json", "text/event-stream"


def start(content_type: str = JSON) -> dict[str, Any]:
    return {"type": "http.response.start", "status": 200, "headers": [(b"content-type", content_type.encode())]}


def body(text: str, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": text.encode(), "more_body": more}


class Replicas:
    """A handle to replicas; each call does the next of `acts`: messages to give, errors to raise, numbers to sleep."""

    def __init__(self, *acts: list[Any]) -> None:
        self.acts = iter(acts)
        self.sessions: list[str] = []
        self.scopes: list[dict[str, Any]] = []
        self.num_cancelled = 0

    def options(self, method_name: str, stream: bool, session_id: str) -> Replicas:
        assert (method_name, stream) == ("answer", True)
        self.sessions.append(session_id)
        return self

    def remote(self, scope: dict[str, Any], content: bytes) -> Any:
        self.scopes.append(scope)
        return Call(self, next(self.acts))


class Call:
    def __init__(self, replicas: Replicas, act: list[Any]) -> None:
        self.replicas, self.act = replicas, act

    async def __aiter__(self) -> Any:
        for what in self.act:
            if isinstance(what, BaseException):
                raise what
            if isinstance(what, dict):
                yield what
            else:
                await asyncio.sleep(what)

    def cancel(self) -> None:
        self.replicas.num_cancelled += 1


@pytest.fixture
def send() -> Callable[..., httpx.Response]:
    """send(replicas, method, path, headers=..., **settings): a response through a door of its own."""

    def send(
        replicas: Replicas,
        method: str = "POST",
        path: str = "/v1/chat/completions",
        headers: dict[str, str] | None = None,
        **settings: Any,
    ) -> httpx.Response:
        app = Door(replicas, ServeConfig(**settings)).__serve_build_asgi_app__()

        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://door") as client:
                return await client.request(method, path, json=chat(), headers=headers)

        return asyncio.run(ask())

    return send


def chat(*urls: str) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"model": "m", "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "a"}]}]}


def require_error(response: httpx.Response, status: int, code: str) -> None:
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert "not for clinical decisions" in response.headers["x-vitalrt-notice"]


DEAD = [ActorDiedError(), ActorUnavailableError("away", b"0" * 16), asyncio.CancelledError()]


@pytest.mark.parametrize("death", DEAD, ids=lambda death: type(death).__name__)
@pytest.mark.parametrize("before", [[], [start()]], ids=["at once", "after the header"])
def test_a_request_goes_to_another_replica_when_its_own_dies_before_an_answer(send, before, death):
    replicas = Replicas([*before, death], [start(), body("right")])
    response = send(replicas)
    assert (response.status_code, response.text) == (200, "right")
    assert replicas.num_cancelled == 2


def test_two_deaths_are_a_503_that_asks_to_try_again(send):
    response = send(Replicas(DEAD[:1], DEAD[:1]))
    require_error(response, 503, "replica_lost")
    assert response.json()["error"]["type"] == "server_error"
    assert response.headers["retry-after"] == "1"


@pytest.mark.parametrize(("error", "code"), [(DEAD[0], "replica_lost"), (RuntimeError("Jane Doe"), "internal_error")])
def test_a_stream_that_had_begun_ends_with_an_error(send, error, code):
    response = send(Replicas([start(EVENTS), body("data: {}\n\n", more=True), error]))
    assert response.status_code == 200
    *_, last, done, _ = response.text.split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == code
    assert done == "data: [DONE]"


def test_a_client_that_goes_ends_its_call():
    replicas = Replicas([start(), 60.0], [start(), body("never")])

    async def leave() -> None:
        app = Door(replicas, ServeConfig()).__serve_build_asgi_app__()
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://door") as client:
            asking = asyncio.create_task(client.post("/v1/chat/completions", json=chat()))
            while not replicas.scopes:
                await asyncio.sleep(0.01)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking

    asyncio.run(leave())
    assert (len(replicas.scopes), replicas.num_cancelled) == (1, 1)


def test_full_replicas_are_a_429(send):
    response = send(Replicas([BackPressureError(5, 5)]))
    require_error(response, 429, "queue_full")
    assert response.headers["retry-after"] == "1"


def test_a_replica_that_does_not_begin_in_time_is_a_408(send):
    replicas = Replicas([start(), 5.0])
    require_error(send(replicas, deadline_s=0.1), 408, "deadline_exceeded")
    assert replicas.num_cancelled == 1


def test_the_deadline_of_an_answer_that_has_begun_is_the_replicas(send):
    assert send(Replicas([start(), body("a", more=True), 1.5, body("b")]), deadline_s=1).text == "ab"


def test_a_fault_is_a_500_that_tells_nothing(send):
    response = send(Replicas([RuntimeError("Jane Doe")]))
    require_error(response, 500, "internal_error")
    assert "Jane" not in response.text


def test_keys_and_sizes_are_checked_at_the_door(send):
    nobody = Replicas()
    keys = ("a-key-of-this-server",)
    require_error(send(nobody, api_keys=keys), 401, "invalid_api_key")
    require_error(send(nobody, path="/metrics", method="GET", api_keys=keys), 401, "invalid_api_key")
    require_error(send(nobody, max_body_bytes=10), 413, "body_too_large")
    require_error(send(nobody, headers={"content-type": "text/plain"}), 415, "unsupported_media_type")
    assert nobody.scopes == []


def test_replicas_see_neither_keys_nor_cookies(send):
    replicas = Replicas([start(), body("{}")])
    key = "a-key-of-this-server"
    send(replicas, headers={"Authorization": f"Bearer {key}", "Cookie": "secret"}, api_keys=(key,))
    assert [name for name, _ in replicas.scopes[0]["headers"]] == [b"content-type"]


def test_rays_id_is_the_requests_id(send):
    replicas = Replicas([start(), body("{}")], [start(), body("{}")])
    given = "5e253612-7920-415d-b0c0-99daaec7bb2c"
    response = send(replicas, headers={"X-Request-Id": given})
    send(replicas, headers={"X-Request-Id": "a b\n"})
    ids = [scope["vitalrt.request_id"] for scope in replicas.scopes]
    assert ids[0] == f"chatcmpl-{given}"
    assert ids[1].startswith("chatcmpl-") and "a b" not in ids[1]
    assert "x-request-id" not in response.headers  # Ray's proxy writes it


def encoded(data: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def test_the_first_image_decides_whatever_is_said_about_it():
    one, other = encoded(b"one", "image/png"), encoded(b"other", "image/png")
    key = first_image(json.dumps(chat(one)).encode())
    assert key == first_image(json.dumps(chat(one, other), indent=3).encode())
    assert key == first_image(json.dumps({**chat(encoded(b"one", "image/jpeg")), "n": 3}).encode())
    assert key != first_image(json.dumps(chat(other, one)).encode())
    assert first_image(json.dumps(chat("https://example.org/a.png")).encode()) is not None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"[" * 100_000,
        b'{"messages": 3}',
        b'{"messages": [3]}',
        b'{"messages": [{"content": "a"}]}',
        b'{"messages": [{"content": [3]}]}',
        b'{"messages": [{"content": [{"type": "image_url"}]}]}',
        b'{"messages": [{"content": [{"type": "image_url", "image_url": {"url": 3}}]}]}',
        b'{"messages": [{"content": [{"type": "image_url", "image_url": {"url": "\\ud800"}}]}]}',
    ],
)
def test_a_body_without_an_image_has_no_key(content):
    assert first_image(content) is None
