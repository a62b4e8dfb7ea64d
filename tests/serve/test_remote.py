"""Images by link: from named origins only, and not led elsewhere."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from vitalrt.errors import VitalError
from vitalrt.serve import remote
from vitalrt.serve.errors import ApiError
from vitalrt.serve.remote import Fetcher

DEMO = Path(__file__).parents[2] / "examples" / "demo.png"


class Pictures(BaseHTTPRequestHandler):
    """What a picture server may do to a client."""

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        if self.path.startswith("/demo"):
            self._send(200, DEMO.read_bytes(), "text/html")  # whatever it claims: the bytes decide
        elif self.path == "/redirect":
            self.send_response(302)
            self.send_header("Location", "/demo.png")
            self.end_headers()
        elif self.path == "/text":
            self._send(200, b"<html>", "image/png")
        elif self.path == "/large":
            self._send(200, bytes(200_000), "image/png")
        elif self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # whoever asked has had enough
                for _ in range(100):
                    self.wfile.write(b"x")
                    time.sleep(0.05)
        else:
            self.send_error(404)

    def _send(self, status: int, body: bytes, mime: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", mime)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture(scope="module")
def pictures() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    server.paths = []
    server.origin = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def fetch(fetcher: Fetcher, url: str) -> bytes:
    return fetcher.fetch(url, "url")


def refused(fetcher: Fetcher, url: str) -> ApiError:
    with pytest.raises(ApiError) as error:
        fetch(fetcher, url)
    assert url not in str(error.value)
    return error.value


def test_an_allowed_origin_is_fetched_with_its_query(pictures):
    fetcher = Fetcher([pictures.origin], 100_000)
    assert fetch(fetcher, f"{pictures.origin}/demo.png?size=1#part") == DEMO.read_bytes()
    assert pictures.paths[-1] == "/demo.png?size=1"
    assert fetch(fetcher, f"HTTP://127.0.0.1:{pictures.server_port}/demo") == DEMO.read_bytes()


@pytest.mark.parametrize(
    "url",
    [
        "{origin}@127.0.0.1:{port}/demo",
        "http://user:secret@127.0.0.1:{port}/demo",
        "http://127.0.0.1:1/demo",
        "http://127.0.0.1/demo",
        "http://127.1:{port}/demo",
        "http://2130706433:{port}/demo",
        "http://[::1]:{port}/demo",
        "http://[::ffff:127.0.0.1]:{port}/demo",
        "http://localhost:{port}/demo",
        "https://127.0.0.1:{port}/demo",
        "ftp://127.0.0.1:{port}/demo",
        "file:///etc/passwd",
        "gopher://127.0.0.1:{port}/",
        "//127.0.0.1:{port}/demo",
        "/demo",
        "http://127.0.0.1:{port}\\@example.org/demo",
        "http://127.0.0.1:{port}/demo\r\nHost: other",
        "http://127.0.0.1:{port}/de mo",
        "http://127.0.0.1:{port}x/demo",
        "http://[127.0.0.1:{port}/demo",
        "http://１２７.0.0.1:{port}/demo",
    ],
)
def test_nothing_else_is_asked_for_anything(pictures, url):
    before = len(pictures.paths)
    refused(Fetcher([pictures.origin], 100_000), url.format(origin=pictures.origin, port=pictures.server_port))
    assert len(pictures.paths) == before


def test_without_an_allow_list_no_link_is_fetched(pictures):
    assert "data URI" in refused(Fetcher([], 100_000), f"{pictures.origin}/demo").message


@pytest.mark.parametrize(("path", "word"), [("/redirect", "302"), ("/nowhere", "404")])
def test_redirects_and_errors_are_refused(pictures, path, word):
    before = len(pictures.paths)
    assert word in refused(Fetcher([pictures.origin], 100_000), pictures.origin + path).message
    assert pictures.paths[before:] == [path]


def test_a_large_file_is_given_up(pictures):
    assert refused(Fetcher([pictures.origin], 100_000), f"{pictures.origin}/large").status == 413


def test_a_slow_file_is_given_up(pictures, monkeypatch):
    monkeypatch.setattr(remote, "TIMEOUT_S", 0.3)
    started = time.monotonic()
    assert "TimeoutError" in refused(Fetcher([pictures.origin], 100_000), f"{pictures.origin}/slow").message
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("address", ["127.0.0.1", "10.1.2.3", "169.254.169.254", "::1", "fd00::1", "::ffff:10.0.0.1"])
def test_a_name_that_leads_to_a_private_address_is_refused(monkeypatch, address):
    """Whether by mistake or because somebody changed the name's record after it was allowed."""

    def lookup(*_, **__):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (found, 80)) for found in ("93.184.216.34", address)]

    def connect(*_, **__):
        raise AssertionError("it connected")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    monkeypatch.setattr(socket, "create_connection", connect)
    assert "private" in refused(Fetcher(["http://images.example.org"], 1000), "http://images.example.org/a").message


def test_the_address_that_was_checked_is_the_one_that_is_used(monkeypatch):
    asked: list[tuple[str, int]] = []

    def connect(address, **_):
        asked.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *_, **__: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", 80))]
    )
    monkeypatch.setattr(socket, "create_connection", connect)
    refused(Fetcher(["https://images.example.org"], 1000), "https://images.example.org/a")
    assert asked == [("93.184.216.34", 443)]


@pytest.mark.parametrize(
    "origin", ["example.org", "https://", "https://a.org/path", "ftp://a.org", "https://u@a.org", "*"]
)
def test_origins_that_are_none(origin):
    with pytest.raises(VitalError, match="image_origins"):
        Fetcher([origin], 1000)


def test_the_server_answers_about_a_linked_image(phantom, serve, pictures):
    with serve(phantom, image_origins=(pictures.origin,)) as running:
        answer = running.post(messages=running.messages(urls=[f"{pictures.origin}/demo.png"]))
        assert answer.json()["choices"][0]["message"]["content"] == "lower left"
        text = running.post(messages=running.messages(urls=[f"{pictures.origin}/text"]))
        assert (text.status_code, text.json()["error"]["code"]) == (400, "invalid_image")
