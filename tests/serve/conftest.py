"""A server on loopback in a thread, with the bundled phantom model or a slowed-down one."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import uvicorn
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

import vitalrt
from vitalrt.serve.app import App, build_app
from vitalrt.serve.server import server
from vitalrt.serve.settings import ServeConfig

DEMO = Path(__file__).parents[2] / "examples" / "demo.png"
QUESTION = "Where is the cyst?"  # of the demo; the answer is "lower left"


@dataclass
class Running:
    """A server that takes requests."""

    app: App
    uvicorn: uvicorn.Server
    url: str

    def openai(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": "unused", "max_retries": 0, **options})

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, **{"timeout": 30, **options})

    @staticmethod
    def data_uri(data: bytes, mime: str = "image/png") -> str:
        return f"data:{mime};base64,{base64.b64encode(data).decode()}"

    @classmethod
    def messages(cls, question: str = QUESTION, urls: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """One turn about the demo image, or about what the links lead to."""
        urls = [cls.data_uri(DEMO.read_bytes())] if urls is None else urls
        images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        return [{"role": "user", "content": [*images, {"type": "text", "text": question}]}]

    def post(self, **changes: Any) -> httpx.Response:
        """A question about the demo image to chat completions, with fields changed."""
        body = {"model": "phantom", "messages": self.messages(), **changes}
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=30)

    def metric(self, name: str, **labels: str) -> float:
        """The sum over all series with these labels."""
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        lines = httpx.get(f"{self.url}/metrics", timeout=30).text.splitlines()
        found = [line for line in lines if line.startswith((f"vitalrt:{name} ", f"vitalrt:{name}{{"))]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found if all(label in line for label in wanted))

    @property
    def num_pages_taken(self) -> int:
        return self.app.worker.engine.statistics().pages_used


@contextmanager
def serving(model: vitalrt.Model, **settings: Any) -> Iterator[Running]:
    config = ServeConfig(port=0, **settings)
    app = build_app(model, config)
    process = server(app, config)
    thread = threading.Thread(target=process.run, daemon=True)
    thread.start()
    wait_until(lambda: process.started)
    port = process.servers[0].sockets[0].getsockname()[1]
    try:
        yield Running(app, process, f"http://127.0.0.1:{port}")
    finally:
        process.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive()
        assert not app.worker.is_alive


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


@pytest.fixture(scope="session")
def phantom() -> vitalrt.Model:
    return vitalrt.load(device="cpu", cache_tokens=4096)


@pytest.fixture(scope="module")
def running(phantom: vitalrt.Model) -> Iterator[Running]:
    with serving(phantom) as found:
        yield found
        wait_until(lambda: found.num_pages_taken == 0)


@pytest.fixture(scope="session")
def serve() -> Callable[..., Any]:
    """serve(model, **settings): a server with settings of its own, as a context manager."""
    return serving


@pytest.fixture(scope="session")
def until() -> Callable[..., None]:
    """until(condition, seconds=20): wait for something that another thread brings about."""
    return wait_until


@pytest.fixture(scope="session")
def short_deadline_s() -> float:
    """Soon over, and yet a request has always reached the engine by then: reading one has taken 0.5 s on a busy
    machine."""
    return 2.0


class Brake:
    """Stands in for an engine's advance(): steps happen only while it is open, or one by one."""

    def __init__(self, model: vitalrt.Model, monkeypatch: pytest.MonkeyPatch) -> None:
        self._allowed = threading.Semaphore(0)
        advance = model.engine.advance

        def braked() -> None:
            if self._allowed.acquire(timeout=0.01):
                advance()

        monkeypatch.setattr(model.engine, "advance", braked)

    def allow(self, steps: int) -> None:
        self._allowed.release(steps)


@pytest.fixture
def brake(phantom: vitalrt.Model, monkeypatch: pytest.MonkeyPatch) -> Brake:
    """The phantom model's engine does as many steps as it is allowed. Ask for it before the server starts."""
    return Brake(phantom, monkeypatch)


@pytest.fixture(scope="session")
def dicom_bytes() -> bytes:
    """A 64 x 48 grey ramp over 0..3071, with a patient's name that nothing may repeat."""
    ramp = np.arange(64 * 48, dtype=np.uint16).reshape(48, 64)
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", "1.2.3"
    dataset.PatientName = "Secret^Patient"
    dataset.Rows, dataset.Columns = ramp.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PixelRepresentation = 1, "MONOCHROME2", 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.PixelData = ramp.tobytes()
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()
