"""One of several copies of the application, as Ray Serve runs them."""

from __future__ import annotations

import asyncio
import logging.config
from collections.abc import AsyncIterator, Iterator
from typing import Any

from prometheus_client.metrics_core import Metric
from starlette.datastructures import MutableHeaders
from starlette.types import Message

from vitalrt.api import load
from vitalrt.serve.app import build_app
from vitalrt.serve.server import logging_config
from vitalrt.serve.settings import ServeConfig

REPLICA_HEADER = "X-Vitalrt-Replica"


class Replica:
    """A model with its engine and its application; Ray Serve starts it anew when it dies or check_health() raises."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, loading: dict[str, Any], config: ServeConfig
    ) -> None:
        """loading: arguments of vitalrt.load."""
        from ray import serve

        logging.config.dictConfig(logging_config())
        self.name = serve.get_replica_context().replica_id.unique_id
        self._app = build_app(await asyncio.to_thread(lambda: load(**loading)), config, loading["adapter"])
        self._life = self._app.router.lifespan_context(self._app)
        await self._life.__aenter__()

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[Message]:
        """The application's ASGI messages for an HTTP request.  To give it up, cancel the call."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        request: Iterator[Message] = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> Message:
            for message in request:
                return message
            return await asyncio.Future()  # a client that goes cancels the call

        async def run() -> None:
            try:
                await self._app(scope, receive, messages.put)
            finally:
                messages.put_nowait(None)

        running = asyncio.create_task(run())
        try:
            while (message := await messages.get()) is not None:
                if message["type"] == "http.response.start":
                    MutableHeaders(scope=message)[REPLICA_HEADER] = self.name
                yield message
        finally:
            running.cancel()
            await asyncio.wait([running])

    async def metrics(self) -> tuple[str, list[Metric]]:
        """Under the replica's name."""
        return self.name, list(self._app.metrics.registry.collect())

    async def check_health(self) -> None:
        """Called by Ray Serve.  Raises RuntimeError when the engine's thread has ended."""
        if not self._app.worker.is_alive:
            raise RuntimeError("the engine's thread has ended")
