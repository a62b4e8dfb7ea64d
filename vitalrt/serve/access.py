"""The outermost layer: who may come in, what every response carries, and what is logged of it."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vitalrt.engine.request import RESEARCH_NOTICE
from vitalrt.serve.errors import ApiError, internal_error, place_of
from vitalrt.serve.metrics import HttpMetrics

logger = logging.getLogger("vitalrt.serve")

OPEN_PATHS = ("/health", "/ready")  # for probes, which hold no key
NOTICE_HEADER = "X-Vitalrt-Notice"
REQUEST_ID = "vitalrt.request_id"  # key in the ASGI scope; who calls the application may set it


class Gate:
    """Wraps the whole application, so that it sees every response, errors of the framework included.

    The log line of a request holds its id, route, status and time: no query, no header, no body.
    """

    def __init__(self, app: ASGIApp, api_keys: Sequence[str], metrics: HttpMetrics) -> None:
        self.app = app
        self.metrics = metrics
        self._digests = [hashlib.sha256(key.encode()).digest() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope[REQUEST_ID] = request_id = scope.get(REQUEST_ID) or f"chatcmpl-{uuid.uuid4().hex}"
        started = time.perf_counter()
        status = 0

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                headers[NOTICE_HEADER] = RESEARCH_NOTICE
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        try:
            self._check_key(scope)
            await self.app(scope, receive, send_marked)
        except ApiError as error:
            await error.response()(scope, receive, send_marked)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            logger.error("%s failed: %s", request_id, place_of(error))
            if not status:
                await internal_error().response()(scope, receive, send_marked)
        finally:
            if status:  # none where the client was gone, or the server told to stop, before there was an answer
                self.metrics.count_response(status)
            route = getattr(scope.get("route"), "path", "") or "-"  # the template: a path may be anything
            elapsed_ms = (time.perf_counter() - started) * 1000
            logger.info("%s %s %s %d %.0f ms", request_id, scope["method"], route, status, elapsed_ms)

    def _check_key(self, scope: Scope) -> None:
        """Compares with all keys, whichever fits, so that the time tells nothing."""
        if not self._digests or scope["path"] in OPEN_PATHS:
            return
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        given = hashlib.sha256(key.strip().encode()).digest()
        matches = sum(hmac.compare_digest(given, digest) for digest in self._digests)
        if scheme.lower() != "bearer" or not matches:
            raise ApiError(
                401,
                "expected a key of this server as `Authorization: Bearer <key>`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
