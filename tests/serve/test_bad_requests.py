"""Requests that cannot be served: a 4xx in OpenAI's shape that names the field and repeats nothing."""

from __future__ import annotations

import base64
import io
import json
import logging
from pathlib import Path

import numpy as np
import openai
import pytest
from PIL import Image

DEMO = Path(__file__).parents[2] / "examples" / "demo.png"
SECRET = "Jane Doe 1970-01-01"


@pytest.fixture(autouse=True)
def _logs_are_caught(running, monkeypatch):
    for name in ("vitalrt.serve", "uvicorn"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros((height, width), np.uint8)).save(file, "PNG")
    return file.getvalue()


def uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def user(*content) -> dict:
    return {"messages": [{"role": "user", "content": list(content)}]}


def image(url) -> dict:
    return user({"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": SECRET})


def vital(**options) -> dict:
    return {"vital": options}


URL = "messages[0].content[0].image_url.url"
BAD_FIELDS = {
    "no model": ({"model": None}, "model"),
    "model of another type": ({"model": 7}, "model"),
    "no messages": ({"messages": None}, "messages"),
    "messages empty": ({"messages": []}, "messages"),
    "messages a text": ({"messages": SECRET}, "messages"),
    "message a text": ({"messages": [SECRET]}, "messages[0]"),
    "message without content": ({"messages": [{"role": "user"}]}, "messages[0].content"),
    "content empty": (user(), "messages[0].content"),
    "content a number": ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    "blank question": ({"messages": [{"role": "user", "content": "  "}]}, "messages"),
    "nobody asks": ({"messages": [{"role": "system", "content": SECRET}]}, "messages"),
    "unknown role": ({"messages": [{"role": SECRET, "content": "a"}]}, "messages[0].role"),
    "role tool": ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
    "unknown part": (user({"type": SECRET, "text": "a"}), "messages[0].content[0].type"),
    "part without its field": (user({"type": "image_url", "text": SECRET}), "messages[0].content[0]"),
    "part without type": (user({"text": SECRET}), "messages[0].content[0].type"),
    "too many messages": ({"messages": [{"role": "user", "content": "a"}] * 257}, "messages"),
    "text too long": (user({"type": "text", "text": "a" * 100_001}), "messages"),
    "too many tokens": (user({"type": "text", "text": "liver " * 9000}), "messages"),
    "beyond the cache": ({**user({"type": "text", "text": "liver " * 3500}), "max_tokens": 1024}, "messages"),
    "placeholder in the text": (user({"type": "text", "text": "<|image_pad|>"}), "messages"),
    "temperature negative": ({"temperature": -0.1}, "temperature"),
    "temperature too high": ({"temperature": 2.1}, "temperature"),
    "temperature a text": ({"temperature": SECRET}, "temperature"),
    "top_p zero": ({"top_p": 0}, "top_p"),
    "top_p above one": ({"top_p": 1.5}, "top_p"),
    "seed a float": ({"seed": 1.5}, "seed"),
    "seed too large": ({"seed": 2**63}, "seed"),
    "max_tokens zero": ({"max_tokens": 0}, "max_tokens"),
    "max_tokens above the limit": ({"max_tokens": 1025}, "max_tokens"),
    "max_completion_tokens above the limit": ({"max_completion_tokens": 10**9}, "max_completion_tokens"),
    "max_tokens a text": ({"max_tokens": "9"}, "max_tokens"),
    "n zero": ({"n": 0}, "n"),
    "n above the limit": ({"n": 9}, "n"),
    "n true": ({"n": True}, "n"),
    "stop empty": ({"stop": ""}, "stop"),
    "too many stops": ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    "stop too long": ({"stop": ["a" * 65]}, "stop[0]"),
    "stop a number": ({"stop": 5}, "stop"),
    "stream a text": ({"stream": "yes"}, "stream"),
    "stream_options without stream": ({"stream_options": {"include_usage": True}}, "stream_options"),
    "top_logprobs without logprobs": ({"top_logprobs": 2}, "top_logprobs"),
    "top_logprobs above 20": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    "vital a text": ({"vital": SECRET}, "vital"),
    "latent_steps above 64": (vital(latent_steps=65), "vital.latent_steps"),
    "latent_steps negative": (vital(latent_steps=-1), "vital.latent_steps"),
    "latent_steps against the name": ({"model": "phantom@k=2", **vital(latent_steps=3)}, "vital.latent_steps"),
    "window of three": (vital(window=[1, 2, 3]), "vital.window"),
    "window without width": (vital(window=[40, 0]), "vital.window"),
    "window for a PNG's own view": (vital(window=1), URL),
    "frame negative": (vital(frame=-1), "vital.frame"),
    "frame of a PNG that is not there": (vital(frame=3), URL),
    "cache_salt empty": (vital(cache_salt=""), "vital.cache_salt"),
    "cache_salt a number": (vital(cache_salt=7), "vital.cache_salt"),
    "cache_salt too long": (vital(cache_salt="a" * 257), "vital.cache_salt"),
    "priority too high": (vital(priority=101), "vital.priority"),
    "priority a float": (vital(priority=0.5), "vital.priority"),
    "deadline_s zero": (vital(deadline_s=0), "vital.deadline_s"),
    "deadline_s a text": (vital(deadline_s=SECRET), "vital.deadline_s"),
    "link": (image(f"https://example.org/{SECRET}.png"), URL),
    "file link": (image("file:///etc/passwd"), URL),
    "no link at all": (image(SECRET), URL),
    "data URI without base64": (image("data:image/png," + SECRET), URL),
    "data URI without data": (image("data:image/png;base64,"), URL),
    "base64 broken": (image("data:image/png;base64,####"), URL),
    "an image of text": (image(uri(SECRET.encode())), URL),
    "SVG": (image(uri(b"<svg xmlns='http://www.w3.org/2000/svg'/>")), URL),
    "GIF": (image(uri(b"GIF89a" + bytes(40))), URL),
    "PNG cut short": (image(uri(DEMO.read_bytes()[:200])), URL),
    "PNG header damaged": (image(uri(DEMO.read_bytes()[:10])), URL),
    "JPEG of nothing": (image(uri(b"\xff\xd8\xff" + bytes(60))), URL),
    "DICOM of nothing": (image(uri(bytes(128) + b"DICM" + SECRET.encode())), URL),
    "too many pixels": (image(uri(png(5000, 4000))), URL),
    "too narrow": (image(uri(png(2000, 3))), URL),
    "too many images": (
        user(*[{"type": "image_url", "image_url": {"url": uri(png(8, 8))}}] * 9, {"type": "text", "text": "a"}),
        "messages",
    ),
}


def require_shape(response, status: int) -> dict:
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and "\n" not in error["message"]
    assert SECRET not in response.text
    return error


@pytest.mark.parametrize("changes,param", BAD_FIELDS.values(), ids=BAD_FIELDS)
def test_bad_fields_are_named(running, caplog, changes, param):
    with caplog.at_level(logging.DEBUG):
        error = require_shape(running.post(**changes), 400)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert param in error["message"]
    assert SECRET not in caplog.text


@pytest.mark.parametrize(
    ("content", "headers", "status", "code"),
    [
        (b"", {}, 400, "invalid_json"),
        (b"{", {}, 400, "invalid_json"),
        (b"[]", {}, 400, None),
        (b"null", {}, 400, None),
        (b"\xff\xfe", {}, 400, "invalid_json"),
        (b'{"model": "\\ud800"}', {}, 400, "invalid_json"),
        (b"[" * 100_000, {}, 400, "invalid_json"),
        (json.dumps({"model": "m", "messages": [], "temperature": float("nan")}).encode(), {}, 400, None),
        (b"{}", {"content-type": "text/plain"}, 415, "unsupported_media_type"),
        (b"{}", {"content-type": ""}, 415, "unsupported_media_type"),
        (b" " * ((32 << 20) + 1), {}, 413, "body_too_large"),
    ],
)
def test_bodies_that_are_no_request(running, content, headers, status, code):
    with running.http() as http:
        headers = {"content-type": "application/json", **headers}
        error = require_shape(http.post("/v1/chat/completions", content=content, headers=headers), status)
    assert error["code"] == code


def test_a_body_of_unknown_length_is_limited_too(phantom, serve):
    with serve(phantom, max_body_bytes=1000) as running, running.http() as http:
        headers = {"content-type": "application/json"}
        response = http.post("/v1/chat/completions", content=(b" " * 100 for _ in range(11)), headers=headers)
        assert require_shape(response, 413)["code"] == "body_too_large"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", f"/{SECRET}?name={SECRET}", 404),
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/models", 405),
        ("GET", f"/v1/models/{SECRET}", 404),
        ("GET", "/docs", 404),
        ("POST", "/v1/completions", 404),
    ],
)
def test_paths_and_methods_that_are_not_there(running, caplog, method, path, status):
    with running.http() as http, caplog.at_level(logging.DEBUG):
        require_shape(http.request(method, path), status)
    served = [record.getMessage() for record in caplog.records if record.name.startswith(("vitalrt", "uvicorn"))]
    assert not any("Jane" in line for line in served)


@pytest.mark.parametrize(
    "model", ["other", "phantom@", "phantom@k=", "phantom@k=65", "phantom@k=-1", "phantom@k=١", ""]
)
def test_unknown_models(running, model):
    error = require_shape(running.post(model=model), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")


def test_the_client_raises_its_own_errors(running):
    client = running.openai()
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="phantom", messages=running.messages(), temperature=9)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt", messages=running.messages(), stream=True)
    assert missing.value.code == "model_not_found"


@pytest.mark.parametrize("stream", [False, True])
def test_a_failing_step_is_a_500_that_tells_nothing(running, monkeypatch, caplog, stream):
    def fail(*_):
        raise RuntimeError(SECRET)

    with monkeypatch.context() as patch, caplog.at_level(logging.DEBUG):
        patch.setattr("vitalrt.engine.scheduler.prefill", fail)
        response = running.post(stream=stream)
    assert SECRET not in response.text + caplog.text
    if stream:
        assert response.status_code == 200
        assert '"code": "internal_error"' in response.text
    else:
        assert require_shape(response, 500)["type"] == "server_error"
    assert running.post().status_code == 200


def test_an_error_of_our_own_is_a_500_that_tells_nothing(running, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError(SECRET)

    with monkeypatch.context() as patch, caplog.at_level(logging.DEBUG):
        patch.setattr("vitalrt.inputs.processor.fit_size", fail)
        require_shape(running.post(), 500)
    assert "RuntimeError" in caplog.text
    assert SECRET not in caplog.text
