"""Answers to requests that cannot be served, in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse


class ApiError(Exception):
    """Becomes {"error": {"message", "type", "param", "code"}} with an HTTP status.

    Messages are ours throughout: they never hold anything that the request's texts, images or links said.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


_TYPES = {401: "authentication_error", 404: "not_found_error", 408: "timeout_error", 429: "rate_limit_error"}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def deadline_passed(deadline_s: float) -> ApiError:
    """The client is told not to try again at once: that would only lengthen the queue."""
    message = f"the answer was not complete within this server's deadline of {deadline_s:g} seconds"
    return ApiError(408, message, code="deadline_exceeded", headers={"x-should-retry": "false"})


def queue_full(max_queue: int) -> ApiError:
    message = f"{max_queue} answers are waiting already; try again in a moment"
    return ApiError(429, message, code="queue_full", headers={"Retry-After": "1"})


def replica_lost() -> ApiError:
    message = "the replica that worked on this request was lost; try again in a moment"
    return ApiError(503, message, code="replica_lost", headers={"Retry-After": "1"})


def no_replica() -> ApiError:
    return ApiError(503, "no replica answers", code="no_replica", headers={"Retry-After": "1"})


def internal_error() -> ApiError:
    return ApiError(500, "the server failed on this request; its log names the place", code="internal_error")


def place_of(error: BaseException) -> str:
    """Kind of the error and the innermost line of code, for the log. Its text may quote a request, so it stays out."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = "" if trace is None else f" at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
    return type(error).__name__ + where
