"""A replica under `vitalrt serve --ray` is killed at work: what becomes of its requests, and how soon all is well.

    python -m bench.ray_recovery [--rounds 5] [--clients 6] [--seed 0]

Two replicas of the bundled model on this machine, under constant load of whole and streamed answers. In every round one
of them gets SIGKILL. Told are the longest pause between two answers around the kill and in the seconds before it, when
a request about one of its images was answered again, and when a new replica stood in its place. Every answer is
compared with the model's own. Writes results/ray-recovery.json; exits with 1 where an answer is wrong, a request ends
in anything but an answer or a clear error, or the service does not recover.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import statistics
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console

import vitalrt
from bench.report import commit
from bench.serve_process import Served, served
from bench.serve_visits import REPLICA_LOST, Load, wrong_answers
from vitalrt import latency
from vitalrt.files import replace_whole

RESULT = Path(__file__).parent / "results" / "ray-recovery.json"
REPLICA = "ray::ServeReplica:vitalrt:Replica"
HEADER = "x-vitalrt-replica"
LOST = "its replica was lost"  # as the door's log says
KINDS = {"whole": 1, "streamed": 1}
CALM_S = 5.0  # under load before the kill; as long as what is compared with it after the kill
RECOVERY_S = 120.0
CLEAR_ERRORS = (None, REPLICA_LOST)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with (
        served("--ray", "--replicas", "2", "--cache-tokens", "8192") as server,
        Load(server.url, arguments.clients, arguments.seed, KINDS) as load,
    ):
        rounds = [kill_one(server, load) for _ in range(arguments.rounds)]
    torch.set_num_threads(1)
    model = vitalrt.load(device="cpu", prefix_cache=False)
    wrong = wrong_answers(load.visits, model)
    strange = sorted({str(v.trouble) for v in load.visits if v.trouble not in CLEAR_ERRORS})
    faults = wrong[:20] + strange + [f"round {row} did not recover" for row, r in enumerate(rounds) if not r]
    report = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "environment": latency.environment(model),
        "clients": arguments.clients,
        "requests": len(load.visits),
        "answers_compared": sum(len(visit.texts) for visit in load.visits),
        "wrong_answers": len(wrong),
        "statuses": dict(sorted(Counter(str(visit.status) for visit in load.visits).items())),
        "rounds": rounds,
        "medians": {name: round(statistics.median(r[name] for r in rounds), 2) for name in rounds[0] if all(rounds)},
        "faults": faults,
    }
    replace_whole(RESULT, lambda path: path.write_text(json.dumps(report, indent=1) + "\n"))
    Console().print_json(data=report)
    return 1 if faults else 0


def kill_one(server: Served, load: Load) -> dict[str, float]:
    """One round.  Seconds count from the kill; pauses are between two answers in a row."""
    time.sleep(CALM_S)
    old = replicas_of(server)
    num_lost = server.log.read_text(errors="replace").count(LOST)
    killed_at = time.perf_counter()
    os.kill(server.children(REPLICA)[0], signal.SIGKILL)
    while len(new := replicas_of(server)) < 2 or new == old:
        if time.perf_counter() - killed_at > RECOVERY_S:
            return {}
        time.sleep(0.1)
    replaced_s = time.perf_counter() - killed_at
    time.sleep(CALM_S)
    [dead] = old - new
    visits = list(load.visits)
    answered = [visit for visit in visits if visit.texts]
    its_phantoms = {
        v.question.phantom for v in answered if v.ended < killed_at and v.headers[HEADER] == dead and v.question
    }
    again = [v.ended for v in answered if v.started > killed_at and v.question and v.question.phantom in its_phantoms]
    ended = sorted(visit.ended for visit in answered)
    found = {
        "longest_pause_before_s": longest_pause([t for t in ended if killed_at - CALM_S < t < killed_at]),
        "longest_pause_s": longest_pause([t for t in ended if killed_at - 1 < t < killed_at + CALM_S]),
        "its_images_answered_again_s": min(again) - killed_at,
        "replaced_s": replaced_s,
        "calls_lost": server.log.read_text(errors="replace").count(LOST) - num_lost,
        "streams_cut": sum(visit.trouble == REPLICA_LOST and visit.ended > killed_at for visit in visits),
        "refused": sum(visit.status == 503 and visit.ended > killed_at for visit in visits),
    }
    return {name: round(value, 2) for name, value in found.items()}


def replicas_of(server: Served) -> set[str]:
    return {sample.labels["replica"] for sample in server.samples("prompt_tokens_total")}


def longest_pause(moments: list[float]) -> float:
    return max((after - before for before, after in itertools.pairwise(moments)), default=float("inf"))


if __name__ == "__main__":
    sys.exit(main())
