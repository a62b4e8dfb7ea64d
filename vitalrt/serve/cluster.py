"""`vitalrt serve --ray`: the application of one machine in several replicas on Ray Serve.

Placement, restarts, health checks, the HTTP proxy and consistent hashing are Ray Serve's. Ours is the door between the
proxy and the replicas: it sends questions about one image to one replica, whose cache knows it, and turns to another
replica when one dies under a request.
"""

from __future__ import annotations

import logging.config
import os
import secrets
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from vitalrt.checkpoint import Checkpoint
from vitalrt.errors import VitalError
from vitalrt.serve.door import Door
from vitalrt.serve.replica import Replica
from vitalrt.serve.server import logging_config
from vitalrt.serve.settings import ServeConfig

logger = logging.getLogger("vitalrt.serve")

APP_NAME = "vitalrt"
HEALTH_PERIOD_S = 1.0  # how soon a dead replica is replaced
START_TRIES = 2  # of a replica, before the whole start counts as failed
ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"


def serve_on_ray(loading: dict[str, Any], config: ServeConfig, num_replicas: int) -> None:
    """Serve until SIGTERM or SIGINT; then running answers have drain_s to complete.

    loading: arguments of vitalrt.load, for every replica.  Joins the cluster that the environment names in RAY_ADDRESS,
    and otherwise starts Ray on this machine, for this machine alone.  Raises VitalError if the replicas do not start.
    """
    if num_replicas < 1:
        raise VitalError(f"replicas: expected at least 1, got {num_replicas}")
    if config.port == 0:
        raise VitalError("port: expected one above 0 with Ray Serve, got 0")
    logging.config.dictConfig(logging_config())
    Checkpoint.open(loading["model"], loading["adapter"])  # what is wrong with it is better said here, and once
    with _ray(num_replicas):
        from ray import serve

        quiet = {"enable_access_log": False, "log_level": "WARNING"}  # theirs would hold paths and queries
        serve.start(
            proxy_location="EveryNode", http_options={"host": config.host, "port": config.port}, logging_config=quiet
        )
        try:
            serve.run(_application(_everywhere(loading), config, num_replicas), name=APP_NAME, logging_config=quiet)
        except RuntimeError as error:
            raise VitalError(f"replicas: they did not start; Ray Serve says: {error}") from error
        logger.info("running on http://%s:%d with %d replicas", config.host, config.port, num_replicas)
        _wait_for_signal()
        serve.delete(APP_NAME)


def _application(loading: dict[str, Any], config: ServeConfig, num_replicas: int) -> Any:
    """The door and the replicas, as Ray Serve deployments."""
    import ray
    from ray import serve

    drain: dict[str, Any] = {"graceful_shutdown_timeout_s": config.drain_s, "graceful_shutdown_wait_loop_s": 0.2}
    health: dict[str, Any] = {"health_check_period_s": HEALTH_PERIOD_S, "max_constructor_retry_count": START_TRIES}
    has_gpus = ray.cluster_resources().get("GPU", 0) > 0
    replicas: Any = serve.deployment(
        Replica,
        num_replicas=num_replicas,
        ray_actor_options={"num_cpus": 1, "num_gpus": int(has_gpus and loading["device"] != "cpu")},
        request_router_config={"request_router_class": ROUTER},
        max_ongoing_requests=config.max_queue,  # a full replica hands on to the next on the ring
        max_queued_requests=config.max_queue,
        **drain,
        **health,
    )
    door: Any = serve.deployment(
        serve.ingress()(Door),
        name="Door",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=1_000_000,  # what is too much, the replicas say
        **drain,
        **health,
    )
    return door.bind(replicas.bind(loading, replace(config, api_keys=())), config)


def _everywhere(loading: dict[str, Any]) -> dict[str, Any]:
    """With paths that do not depend on the working directory."""
    paths = {
        name: str(Path(where).expanduser().resolve())
        for name in ("model", "adapter")
        if (where := loading[name]) is not None and Path(where).expanduser().exists()
    }
    return {**loading, **paths}


@contextmanager
def _ray(num_replicas: int) -> Iterator[None]:
    """Connected to Ray.  Its environment variables only count before it is imported."""
    is_own = "RAY_ADDRESS" not in os.environ
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # each request has its line
    if is_own:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        if "RAY_AUTH_TOKEN_PATH" not in os.environ:
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # A name from other systems, where Ray keeps to one machine: with 0 it listens to the loopback address.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        # Bodies of requests pass through Ray's shared memory: never onto a disk.
        os.environ.setdefault("RAY_automatic_object_spilling_enabled", "0")
    import ray
    from ray import serve

    try:
        if is_own:
            num_cpus = max(num_replicas, os.cpu_count() or 1)
            ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, logging_level=logging.WARNING)
        else:
            ray.init(logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise VitalError(f"ray: it cannot be reached or started ({error})") from error
    try:
        yield
    finally:
        if is_own:
            serve.shutdown()
        ray.shutdown()


def _wait_for_signal() -> None:
    """SIGTERM or SIGINT, once; what comes next acts as before."""
    stop = threading.Event()
    usual = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    stop.wait()
    for number, handler in usual.items():
        signal.signal(number, handler)
