"""What stands between Ray Serve's HTTP proxy and the replicas."""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import json
import logging.config
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import generate_latest
from prometheus_client.metrics_core import Metric
from pydantic_core import from_json
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vitalrt.serve.access import OPEN_PATHS, REQUEST_ID, Gate
from vitalrt.serve.app import CHAT_PATH, METRICS_TYPE, http_error
from vitalrt.serve.chat import read_body
from vitalrt.serve.errors import (
    ApiError,
    deadline_passed,
    internal_error,
    no_replica,
    place_of,
    queue_full,
    replica_lost,
)
from vitalrt.serve.metrics import HttpMetrics
from vitalrt.serve.server import logging_config
from vitalrt.serve.settings import ServeConfig

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

logger = logging.getLogger("vitalrt.serve")

TRIES = 2  # a request under which two replicas died may be what they died of
PROBE_S = 5.0  # of /health, /ready and /metrics
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Door:
    """Checks keys and sizes, finds the image that a request is about, and passes the request on to a replica.

    A request whose replica dies before the answer has begun goes to another one.
    """

    def __init__(self, replicas: DeploymentHandle[Any], config: ServeConfig) -> None:
        logging.config.dictConfig(logging_config())
        self._replicas = replicas
        self._config = config
        self._metrics = HttpMetrics()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Ray Serve, once."""
        app = Starlette(
            routes=[Route("/metrics", self._show_metrics), Mount("", self._pass_on)],
            middleware=[Middleware(Gate, api_keys=self._config.api_keys, metrics=self._metrics)],
            exception_handlers={HTTPException: http_error},
        )
        return _NamedByRay(app)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ApiError as long as nothing has been sent."""
        request = Request(scope, receive)
        path = request.url.path
        limit_s = PROBE_S if path in OPEN_PATHS else self._config.deadline_s
        deadline = asyncio.get_running_loop().time() + limit_s
        body, image = b"", None
        try:
            async with asyncio.timeout_at(deadline):
                if (request.method, path) == ("POST", CHAT_PATH):
                    body = await read_body(request, self._config.max_body_bytes)
                    image = await asyncio.to_thread(first_image, body)
        except TimeoutError:
            raise deadline_passed(limit_s) from None
        late = no_replica() if path in OPEN_PATHS else deadline_passed(limit_s)
        for _ in range(TRIES):
            if await self._try(_for_replica(scope), body, image, send, deadline, late):
                return
        raise replica_lost()

    async def _try(
        self, scope: Scope, body: bytes, image: str | None, send: Send, deadline: float, late: ApiError
    ) -> bool:
        """Pass one replica's answer on; False if the replica died before there was any.

        Raises ApiError before the answer has begun: late when the deadline passes, and when all replicas are full.
        """
        from ray.exceptions import ObjectLostError, RayActorError
        from ray.serve.exceptions import BackPressureError

        start: Message | None = None  # kept back until there is more to send, for until then another may answer
        is_events = has_begun = is_complete = False
        replicas = self._replicas.options(method_name="answer", stream=True, session_id=image or "")
        # In a context of its own: when a client goes, Ray cancels all that its request has called, and is mistaken at
        # times about which those calls are. We cancel our own.
        call: Any = contextvars.Context().run(replicas.remote, scope, body)
        try:
            async with asyncio.timeout_at(deadline) as limit:
                async for message in call:
                    if message["type"] == "http.response.start":
                        start = message
                        continue
                    if start is not None:
                        limit.reschedule(None)  # the replica keeps the time itself
                        is_events = (
                            Headers(raw=start["headers"]).get("content-type", "").startswith("text/event-stream")
                        )
                        await send(start)
                        start, has_begun = None, True
                    await send(message)
                    is_complete = not message.get("more_body", False)
        except TimeoutError:
            raise late from None
        except BackPressureError:
            raise queue_full(self._config.max_queue) from None
        except (Exception, asyncio.CancelledError) as error:
            if _is_cancelled():
                raise
            if is_complete:
                return True  # it was lost after its last word
            # A call that Ray has cancelled, though nobody here had asked for it, is as lost as one whose replica died.
            is_lost = isinstance(error, RayActorError | ObjectLostError | asyncio.CancelledError)
            logger.warning(
                "%s: its replica %s (%s)", scope[REQUEST_ID], "was lost" if is_lost else "failed", place_of(error)
            )
            if is_lost and not has_begun:
                return False
            if not (has_begun and is_events):
                raise  # an answer that has begun is cut off, which its client notices
            last = (replica_lost() if is_lost else internal_error()).body()
            await send({"type": "http.response.body", "body": f"data: {json.dumps(last)}\n\ndata: [DONE]\n\n".encode()})
        finally:
            call.cancel()  # where the client has gone; does nothing to a call that is complete
        return True

    async def _show_metrics(self, _: Request) -> Response:
        """Of all replicas, each sample with its replica's name, and of the door itself."""
        try:
            answers = await self._replicas.broadcast("metrics").results_async(timeout_s=PROBE_S, return_exceptions=True)
        except TimeoutError:
            answers = []
        own = list(self._metrics.registry.collect())
        pages: dict[str, list[Metric]] = dict(answer for answer in answers if isinstance(answer, tuple))
        return Response(generate_latest(_Families([*own, *_merged(pages, own)])), media_type=METRICS_TYPE)


def _is_cancelled() -> bool:
    """Whether it is the running task itself that was told to stop."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def first_image(body: bytes) -> str | None:
    """SHA-256 of the first image of a chat request, as it is written there; None where there is none.

    Two requests share cached positions as far as they are alike from the beginning: the first image says most.
    """
    try:
        for message in from_json(body)["messages"]:
            if isinstance(message["content"], list):
                for part in message["content"]:
                    if part["type"] == "image_url":
                        url = part["image_url"]["url"]
                        return hashlib.sha256((url.partition(",")[2] or url).encode()).hexdigest()
    except (ValueError, TypeError, KeyError, AttributeError):
        pass  # whichever replica gets it says what is wrong with it
    return None


def _for_replica(scope: Scope) -> Scope:
    """What the application needs of a request: no key, no cookie, no address."""
    wanted = [(name, value) for name, value in scope["headers"] if name == b"content-type"]
    kept = {name: scope[name] for name in ("type", "http_version", "method", "scheme", "path", "query_string")}
    return {**kept, "asgi": {"version": "3.0"}, "headers": wanted, REQUEST_ID: scope[REQUEST_ID]}


def _merged(pages: Mapping[str, Iterable[Metric]], own: Iterable[Metric]) -> Iterable[Metric]:
    """One family per name, over all replicas; what the door counts itself is left out."""
    skipped = {family.name for family in own}
    merged: dict[str, Metric] = {}
    for replica, families in pages.items():
        for family in families:
            if family.name not in skipped:
                whole = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    whole.add_sample(sample.name, {**sample.labels, "replica": replica}, sample.value)
    return merged.values()


class _Families:
    """As generate_latest takes them."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


class _NamedByRay:
    """Ray Serve's proxy gives every request an id and writes it into the response: that one is ours too, once."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            given = Headers(scope=scope).get("x-request-id", "")
            if UUID.fullmatch(given):  # a client may have chosen another
                scope[REQUEST_ID] = f"chatcmpl-{given}"

        async def send_unnamed(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)["X-Request-Id"]
            await send(message)

        await self.app(scope, receive, send_unnamed)
