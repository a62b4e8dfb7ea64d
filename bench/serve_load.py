"""Mixed requests to a server on loopback: is every answer right, does anything leak, how long does it take.

    python -m bench.serve_load [--minutes 5] [--clients 8] [--seed 0]

Starts `vitalrt serve` with the bundled model and visits it from several clients: whole and streamed answers, sampled
choices, K from 0 to 4, new phantoms and some that come back, clients that leave half way, bodies that are no request.
Afterwards every answer is compared with what the model says in this process, asked alone. The server has to be idle
again, with no page held and no thread or file more, and to have grown by at most 64 MiB after its first minute, not
counting what its cache of image features says it holds. Both of its caches are so small that they are full by then and
evict all the time: what grows is not a cache.
Writes results/serve-load.json; exits with 1 where anything of this does not hold.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

import vitalrt
from bench.report import commit
from bench.serve_process import Served, served
from bench.serve_visits import KINDS, Load, Visit, wrong_answers
from vitalrt import latency
from vitalrt.files import replace_whole

RESULT = Path(__file__).parent / "results" / "serve-load.json"
CACHE_TOKENS = 8192
VISION_CACHE_BYTES = 16 << 20
MAX_GROWTH_BYTES = 64 << 20
WARM_UP = 0.2  # of the whole time, then the server's footprint is taken for the first time
IDLE = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
ANSWERED = ("whole", "streamed", "sampled")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    seconds = arguments.minutes * 60
    sizes = ("--cache-tokens", str(CACHE_TOKENS), "--vision-cache-bytes", str(VISION_CACHE_BYTES))
    with served(*sizes) as server:
        with Load(server.url, arguments.clients, arguments.seed) as load:
            time.sleep(seconds * WARM_UP)
            footprints = [footprint(server)]
            time.sleep(seconds * (1 - WARM_UP))
        idle = wait_until_idle(server)
        footprints.append(footprint(server))
        hits, queries = (server.metric(f"prefix_cache_{name}_total") for name in ("hits", "queries"))
    visits = load.visits
    torch.set_num_threads(1)
    model = vitalrt.load(device="cpu", prefix_cache=False)
    wrong = wrong_answers(visits, model)
    faults = [f"wrong answer: {each}" for each in wrong[:20]] + troubles(visits) + leaks(footprints, idle)
    report = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "environment": latency.environment(model),
        "minutes": arguments.minutes,
        "clients": arguments.clients,
        "seed": arguments.seed,
        "requests": len(visits),
        "requests_per_second": round(len(visits) / seconds, 1),
        "answers_compared": sum(len(visit.texts) for visit in visits),
        "wrong_answers": len(wrong),
        "prefix_cache": {"hits": hits, "queries": queries},
        "latency_ms": {kind: spread(visits, kind) for kind in KINDS},
        "statuses": dict(sorted(Counter(str(visit.status) for visit in visits).items())),
        "footprint_after_warm_up_and_at_the_end": footprints,
        "idle": idle,
        "faults": faults,
    }
    replace_whole(RESULT, lambda path: path.write_text(json.dumps(report, indent=1) + "\n"))
    Console().print_json(data=report)
    return 1 if faults else 0


def footprint(server: Served) -> dict[str, int]:
    return {**server.footprint(), "image_cache_bytes": int(server.metric("image_cache_bytes"))}


def wait_until_idle(server: Served, seconds: float = 30) -> dict[str, float]:
    """The gauges that have to be 0, when they are, or when time is up."""
    deadline = time.monotonic() + seconds
    while any((gauges := {name: server.metric(name) for name in IDLE}).values()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return gauges


def troubles(visits: list[Visit]) -> list[str]:
    strange = Counter(f"{visit.kind}: {visit.trouble}" for visit in visits if visit.trouble)
    refused = Counter(f"{v.kind}: {v.status}" for v in visits if v.kind in ANSWERED and not v.texts and not v.trouble)
    return [f"{count} x {what}" for what, count in (strange + refused).items()]


def leaks(footprints: list[dict[str, int]], idle: dict[str, float]) -> list[str]:
    warm, last = footprints
    found = [f"{name} is {value} on an idle server" for name, value in idle.items() if value]
    own = [each["resident_bytes"] - each["image_cache_bytes"] for each in footprints]
    if (growth := own[1] - own[0]) > MAX_GROWTH_BYTES:
        found.append(f"the server has grown by {growth:,} bytes")
    return found + [f"more {name} than under load" for name in ("threads", "files") if last[name] > warm[name]]


def spread(visits: list[Visit], kind: str) -> dict[str, Any]:
    chosen = [visit for visit in visits if visit.kind == kind]
    percentiles: dict[str, Any] = {"count": len(chosen)}
    firsts = [visit.first_token_s for visit in chosen if visit.first_token_s is not None]
    for name, seconds in {"total": [visit.total_s for visit in chosen], "first_token": firsts}.items():
        if seconds:
            p50, p99 = np.percentile(seconds, [50, 99]) * 1000
            percentiles[name] = {"p50": round(p50, 1), "p99": round(p99, 1), "max": round(max(seconds) * 1000, 1)}
    return percentiles


if __name__ == "__main__":
    sys.exit(main())
