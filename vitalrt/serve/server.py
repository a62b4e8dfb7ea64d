"""`vitalrt serve`: the application under uvicorn."""

from __future__ import annotations

import copy
import logging
from typing import Any

import uvicorn
from uvicorn.config import LOGGING_CONFIG

from vitalrt.serve.app import App
from vitalrt.serve.settings import ServeConfig

logger = logging.getLogger("vitalrt.serve")

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def server(app: App, config: ServeConfig) -> uvicorn.Server:
    """Its run() returns after SIGTERM or SIGINT, when running answers are complete or drain_s have passed."""
    found = uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        access_log=False,
        log_config=logging_config(),
        server_header=False,
        timeout_graceful_shutdown=config.drain_s,
        ws="none",
    )
    if config.host not in LOOPBACK and not config.api_keys:
        logger.warning("%s may be reachable from other machines, and no API keys were given", config.host)
    return uvicorn.Server(found)


def logging_config() -> dict[str, Any]:
    """For logging.config.dictConfig."""
    config = copy.deepcopy(LOGGING_CONFIG)
    config["loggers"]["uvicorn.access"] = {"level": "CRITICAL"}  # it prints queries: off, whoever listens
    config["loggers"]["vitalrt.serve"] = {"handlers": ["default"], "level": "INFO", "propagate": False}
    return config
