"""The routes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import vitalrt
from vitalrt.api import Model
from vitalrt.checkpoint import resolve
from vitalrt.engine.request import RESEARCH_NOTICE
from vitalrt.serve.access import Gate
from vitalrt.serve.audit import AuditLog, directory_digest
from vitalrt.serve.chat import Chat
from vitalrt.serve.conversation import PromptMaker
from vitalrt.serve.errors import ApiError
from vitalrt.serve.images import ImageReader
from vitalrt.serve.metrics import Metrics
from vitalrt.serve.models import Catalog
from vitalrt.serve.protocol import component_schemas
from vitalrt.serve.remote import Fetcher
from vitalrt.serve.settings import ServeConfig
from vitalrt.serve.worker import Worker

CHAT_PATH = "/v1/chat/completions"
METRICS_TYPE = "text/plain; version=0.0.4"


class App(FastAPI):
    """Its OpenAPI document holds the schemas of bodies that we read and write ourselves."""

    worker: Worker
    metrics: Metrics

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            document = get_openapi(title=self.title, version=self.version, routes=self.routes)
            document.setdefault("components", {}).setdefault("schemas", {}).update(component_schemas())
            self.openapi_schema = document
        return self.openapi_schema


def build_app(model: Model, config: ServeConfig, adapter: str | None = None) -> App:
    """An ASGI application over a loaded model; it alone may use the model's engine while it runs.

    adapter: what was merged into the model, for the audit file.  Raises VitalError.
    """
    catalog = Catalog(model, config)
    metrics = Metrics(catalog.name)
    worker = Worker(model.engine, config.max_queue, metrics.count_finished)
    metrics.watch(worker)
    images = ImageReader(Fetcher(config.image_origins, config.max_body_bytes), config.max_image_pixels)
    audit = _open_audit(model, config, catalog, adapter)
    chat = Chat(model, config, catalog, worker, PromptMaker(model, images, config), audit)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await worker.stop()
        chat.close()
        if audit is not None:
            audit.close()

    app = App(
        title="vitalrt",
        version=vitalrt.__version__,
        lifespan=lifespan,
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    app.worker, app.metrics = worker, metrics
    app.add_middleware(Gate, api_keys=config.api_keys, metrics=metrics)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, http_error)
    _add_routes(app, chat, catalog, metrics, worker)
    return app


def _add_routes(app: App, chat: Chat, catalog: Catalog, metrics: Metrics, worker: Worker) -> None:
    body = {"required": True, "content": {"application/json": {"schema": _ref("ChatRequest")}}}
    answers = {
        "application/json": {"schema": _ref("ChatCompletion")},
        "text/event-stream": {"itemSchema": _event_schema("ChatChunk", "ErrorBody")},
    }
    errors: dict[int | str, dict[str, Any]] = {"4XX": _documented("ErrorBody"), "5XX": _documented("ErrorBody")}

    @app.post(
        CHAT_PATH,
        response_class=Response,
        openapi_extra={"requestBody": body},
        responses={200: {"description": "the answer", "content": answers}, **errors},
    )
    async def chat_completions(request: Request) -> Response:
        return await chat.answer(request)

    @app.get("/v1/models", response_class=Response, responses={200: _documented("ModelList"), **errors})
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [card.model_dump() for card in catalog.cards()]})

    @app.get("/v1/models/{model}", response_class=Response, responses={200: _documented("ModelCard"), **errors})
    async def model_card(model: str) -> JSONResponse:
        return JSONResponse(catalog.card(model).model_dump())

    @app.get("/health")
    async def health() -> JSONResponse:
        """Whether the process works at all: if not, start it anew."""
        return JSONResponse({"status": "ok" if worker.is_alive else "the engine's thread has ended"}, _status(worker))

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """Whether it would take one more request now."""
        worker.require_room()
        return JSONResponse({"status": "ok"}, _status(worker))

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def prometheus() -> Response:
        return Response(metrics.render(), media_type=METRICS_TYPE)

    @app.get("/version")
    async def version() -> JSONResponse:
        return JSONResponse({"version": vitalrt.__version__, "notice": RESEARCH_NOTICE})


def _open_audit(model: Model, config: ServeConfig, catalog: Catalog, adapter: str | None) -> AuditLog | None:
    if config.audit_file is None:
        return None
    weights = {
        "model": catalog.name,
        "model_sha256": directory_digest(model.checkpoint.directory),
        "adapter_sha256": None if adapter is None else directory_digest(resolve(adapter, "adapter")),
        "precision": model.precision,
    }
    return AuditLog(config.audit_file, config.audit_text, weights)


def _status(worker: Worker) -> int:
    return 200 if worker.is_alive else 503


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _event_schema(*names: str) -> dict[str, Any]:
    """Of a server-sent event: one of these as JSON, or the last event's [DONE]. For OpenAPI 3.2's itemSchema, which
    FastAPI writes into documents of 3.1 too."""
    payload = {"anyOf": [_ref(name) for name in names]}
    data = [{"const": "[DONE]"}, {"type": "string", "contentMediaType": "application/json", "contentSchema": payload}]
    return {"type": "object", "required": ["data"], "properties": {"data": {"anyOf": data}}}


def _documented(name: str) -> dict[str, Any]:
    return {"description": name, "content": {"application/json": {"schema": _ref(name)}}}


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def http_error(_: Request, error: Exception) -> Response:
    """Unknown paths and methods, in the shape of all other errors."""
    assert isinstance(error, HTTPException)
    what = {404: "there is nothing at this path", 405: "this path does not take that method"}
    message = what.get(error.status_code, "the request cannot be served")
    return ApiError(error.status_code, message, code="not_found", headers=error.headers).response()
