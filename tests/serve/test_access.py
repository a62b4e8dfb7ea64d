"""Keys."""

from __future__ import annotations

import hmac

import openai
import pytest

KEYS = ("first-key-of-many", "second-key-of-many")


@pytest.fixture(scope="module")
def locked(phantom, serve):
    with serve(phantom, api_keys=KEYS) as running:
        yield running


@pytest.mark.parametrize("key", KEYS)
def test_any_key_opens(locked, key):
    assert locked.openai(api_key=key).models.list().data


@pytest.mark.parametrize(
    "header", [None, "Bearer", "Bearer first-key", f"Basic {KEYS[0]}", KEYS[0], "Bearer first-key-of-manyy"]
)
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/version", "/openapi.json", "/nowhere"])
def test_anything_else_does_not(locked, header, path):
    with locked.http() as http:
        response = http.get(path, headers={} if header is None else {"Authorization": header})
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"] | {"message": ""} == {
        "message": "",
        "type": "authentication_error",
        "param": None,
        "code": "invalid_api_key",
    }


def test_a_body_is_not_read_without_a_key(locked):
    def body():
        raise AssertionError("it was read")
        yield b""

    with locked.http() as http:
        headers = {"content-type": "application/json", "content-length": "5"}
        assert http.post("/v1/chat/completions", headers=headers, content=b"12345").status_code == 401


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_probes_need_none(locked, path):
    with locked.http() as http:
        assert http.get(path).status_code == 200


def test_the_client_sees_an_authentication_error(locked):
    with pytest.raises(openai.AuthenticationError):
        locked.openai(api_key="wrong").chat.completions.create(model="phantom", messages=locked.messages())


def test_every_key_is_compared_in_constant_time(locked, monkeypatch):
    """With all keys, whichever fits first."""
    compared = []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(len(a) == len(b)) or compare(a, b))
    locked.openai(api_key=KEYS[0]).models.list()
    assert compared == [True, True]
