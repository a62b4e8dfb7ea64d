"""What clients do to a server under load, and whether its answers are right: for serve_load, ray_recovery and tests."""

from __future__ import annotations

import base64
import functools
import io
import itertools
import json
import random
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
from PIL import Image
from rich.console import Console
from rich.progress import track

import vitalrt
from vitalrt_training.data.phantom import ask, draw_phantom

NUM_KNOWN = 8  # phantoms that come back; half of all questions are about them
MOST_STEPS = 4
MAX_TOKENS = 48
KINDS = {"whole": 40, "streamed": 30, "sampled": 8, "left": 10, "malformed": 10, "looked up": 2}  # in a hundred visits
TIMEOUT_S = 120.0
PATH = "/v1/chat/completions"
REPLICA_LOST = "a stream ended with replica_lost"  # a trouble


@dataclass(frozen=True)
class Question:
    """About phantom number `phantom`.  seed: None for a greedy answer."""

    phantom: int
    text: str
    k: int
    seed: int | None = None

    def body(self, **more: Any) -> dict[str, Any]:
        content = [
            {"type": "image_url", "image_url": {"url": data_uri(self.phantom)}},
            {"type": "text", "text": self.text},
        ]
        sampling = {} if self.seed is None else {"temperature": 1.0, "seed": self.seed}
        asked = {"model": f"phantom@k={self.k}", "messages": [{"role": "user", "content": content}]}
        return {**asked, "max_tokens": MAX_TOKENS, **sampling, **more}


@dataclass(frozen=True)
class Visit:
    """One request, as the client saw it.

    texts: of each choice, where it was answered.  trouble: what no server should do.
    started: time.perf_counter().
    """

    kind: str
    question: Question | None = None
    texts: tuple[str, ...] = ()
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    trouble: str | None = None
    started: float = 0.0
    first_token_s: float | None = None
    total_s: float = 0.0

    @property
    def ended(self) -> float:
        return self.started + self.total_s


@functools.lru_cache(maxsize=4 * NUM_KNOWN)
def png(phantom: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(draw_phantom("test", seed=0, index=phantom).image).save(file, "PNG")
    return file.getvalue()


def data_uri(phantom: int) -> str:
    return "data:image/png;base64," + base64.b64encode(png(phantom)).decode()


class Visitor:
    """Visits one server, from any number of threads.  What visit number i does depends on the seed and i alone.

    kinds: how often each comes.
    """

    def __init__(self, url: str, seed: int, kinds: Mapping[str, int] = KINDS) -> None:
        self._seed = seed
        self._kinds = kinds
        self._http = httpx.Client(base_url=url, timeout=TIMEOUT_S)
        self.close = self._http.close

    def visit(self, number: int) -> Visit:
        draw = random.Random(f"{self._seed} {number}")
        [kind] = draw.choices(list(self._kinds), list(self._kinds.values()))
        started = time.perf_counter()
        try:
            match kind:
                case "whole":
                    visit = self._whole(kind, draw_question(draw, number))
                case "sampled":
                    visit = self._whole(kind, draw_question(draw, number, seed=draw.randrange(1000)), n=2)
                case "streamed":
                    visit = self._streamed(draw_question(draw, number), started)
                case "left":
                    visit = self._left(draw_question(draw, number), draw)
                case "malformed":
                    visit = self._malformed(draw)
                case _:
                    visit = self._looked_up(draw)
        except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
            visit = Visit(kind, status=0, trouble=f"{type(error).__name__}: {error}")
        return replace(visit, started=started, total_s=time.perf_counter() - started)

    def _whole(self, kind: str, question: Question, **more: Any) -> Visit:
        response = self._post(json=question.body(**more))
        visit = Visit(kind, question, status=response.status_code, headers=response.headers)
        if response.status_code != 200:
            return replace(visit, trouble=trouble_with_error(response))
        return replace(visit, texts=tuple(choice["message"]["content"] for choice in response.json()["choices"]))

    def _streamed(self, question: Question, started: float) -> Visit:
        visit = Visit("streamed", question)
        first_token_s, text, data = None, "", ""
        with self._http.stream("POST", PATH, json=question.body(stream=True)) as response:
            visit = replace(visit, status=response.status_code, headers=response.headers)
            if response.status_code != 200:
                response.read()
                return replace(visit, trouble=trouble_with_error(response))
            for line in response.iter_lines():
                data = line.removeprefix("data: ") or data
                if not line or data == "[DONE]":
                    continue
                event = json.loads(data)
                if "error" in event:
                    return replace(visit, status=0, trouble=f"a stream ended with {event['error']['code']}")
                text += event["choices"][0]["delta"].get("content") or ""
                if text and first_token_s is None:
                    first_token_s = time.perf_counter() - started
        if data != "[DONE]":
            return replace(visit, status=0, trouble="the stream ended early")
        return replace(visit, texts=(text,), first_token_s=first_token_s)

    def _left(self, question: Question, draw: random.Random) -> Visit:
        """The client goes away: before the answer, or after the first events."""
        if draw.random() < 0.5:
            with suppress(httpx.TimeoutException):
                self._post(json=question.body(), timeout=draw.uniform(0.001, 0.03))
        else:
            with self._http.stream("POST", PATH, json=question.body(stream=True, n=2)) as response:
                for _ in itertools.islice(response.iter_lines(), draw.randrange(1, 8)):
                    pass
        return Visit("left", question)

    def _malformed(self, draw: random.Random) -> Visit:
        content, content_type = draw.choice(MALFORMED)()
        response = self._post(content=content, headers={"content-type": content_type})
        trouble = trouble_with_error(response)
        if not 400 <= response.status_code < 500:
            trouble = f"a malformed body gave a {response.status_code}"
        return Visit("malformed", status=response.status_code, trouble=trouble)

    def _looked_up(self, draw: random.Random) -> Visit:
        path = draw.choice(["/metrics", "/health", "/v1/models", "/v1/models/phantom@k=3", "/version"])
        response = self._http.get(path)
        trouble = None if response.status_code == 200 else f"{path} gave a {response.status_code}"
        return Visit("looked up", status=response.status_code, trouble=trouble)

    def _post(self, **request: Any) -> httpx.Response:
        return self._http.post(PATH, **request)


class Load:
    """Clients that visit a server until the block ends.  visits: those that are complete, so far."""

    def __init__(self, url: str, num_clients: int, seed: int, kinds: Mapping[str, int] = KINDS) -> None:
        self.visits: list[Visit] = []
        self._visitor = Visitor(url, seed, kinds)
        self._numbers = itertools.count()  # next() of it is atomic
        self._stop = threading.Event()
        self._clients = ThreadPoolExecutor(num_clients)
        self._num_clients = num_clients

    def __enter__(self) -> Load:
        self._running = [self._clients.submit(self._visit) for _ in range(self._num_clients)]
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._clients.shutdown()
        self._visitor.close()
        for client in self._running:
            client.result()

    def _visit(self) -> None:
        while not self._stop.is_set():
            self.visits.append(self._visitor.visit(next(self._numbers)))


def draw_question(draw: random.Random, number: int, seed: int | None = None) -> Question:
    """About a phantom that comes back, or about one that was not shown before."""
    phantom = draw.randrange(NUM_KNOWN) if draw.random() < 0.5 else NUM_KNOWN + number
    return Question(phantom, draw.choice(questions_about(phantom)), draw.randint(0, MOST_STEPS), seed)


@functools.lru_cache(maxsize=4 * NUM_KNOWN)
def questions_about(phantom: int) -> list[str]:
    return [sample.question for sample in ask(draw_phantom("test", seed=0, index=phantom))]


def _changed(**changes: Any) -> tuple[bytes, str]:
    question = Question(0, "Is the liver visible?", 1)
    return json.dumps(question.body(**changes)).encode(), "application/json"


def _with_image(data: bytes) -> tuple[bytes, str]:
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]
    return _changed(messages=[{"role": "user", "content": parts}])


MALFORMED = (
    lambda: (b"", "application/json"),
    lambda: (_changed()[0][:-20], "application/json"),
    lambda: (b"\xff\xfe\x00", "application/json"),
    lambda: (_changed()[0], "text/plain"),
    lambda: _changed(model="another"),
    lambda: _changed(messages=[]),
    lambda: _changed(n={}),
    lambda: _changed(seed=1.5),
    lambda: _changed(stop=[""]),
    lambda: _changed(temperature=9),
    lambda: _changed(max_tokens=10**9),
    lambda: _changed(vital={"latent_steps": 65}),
    lambda: _with_image(b"not an image"),
    lambda: _with_image(png(0)[:100]),
)


def trouble_with_error(response: httpx.Response) -> str | None:
    """None where the response is an error in OpenAI's shape."""
    try:
        error = response.json()["error"]
        fits = set(error) == {"message", "type", "param", "code"} and bool(error["message"])
    except (ValueError, KeyError, TypeError):
        fits = False
    return None if fits else f"a {response.status_code} without OpenAI's shape"


def wrong_answers(visits: Iterable[Visit], model: vitalrt.Model) -> list[str]:
    """What differs from the model's answer to the question alone."""
    alone: dict[Question, str] = {}
    wrong = []
    for visit in track(list(visits), "comparing", console=Console(stderr=True)):
        for index, text in enumerate(visit.texts):
            assert visit.question is not None
            seed = visit.question.seed
            question = visit.question if seed is None else replace(visit.question, seed=seed + index)
            if question not in alone:
                sampling = {} if question.seed is None else {"temperature": 1.0, "seed": question.seed}
                answer = model.generate(
                    png(question.phantom), question.text, question.k, max_new_tokens=MAX_TOKENS, **sampling
                )
                alone[question] = str(answer)
            if text != alone[question]:
                wrong.append(f"{question}: {text!r} instead of {alone[question]!r}")
    return wrong
