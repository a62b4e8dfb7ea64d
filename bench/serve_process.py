"""`vitalrt serve` as a process of its own, for serve_load, ray_recovery and tests/serve."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

START_S, STOP_S = 180.0, 90.0


@dataclass(frozen=True)
class Served:
    """A server that takes requests.  log: what it has written so far."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def samples(self, name: str) -> list[Sample]:
        """All series of `vitalrt:name`."""
        families = text_string_to_metric_families(httpx.get(f"{self.url}/metrics", timeout=30).text)
        return [sample for family in families for sample in family.samples if sample.name == f"vitalrt:{name}"]

    def metric(self, name: str, **labels: str) -> float:
        """The sum over those of these labels."""
        return sum(sample.value for sample in self.samples(name) if labels.items() <= sample.labels.items())

    def footprint(self) -> dict[str, int]:
        """Of the server's own process: resident bytes, threads, open files."""
        proc = Path("/proc") / str(self.process.pid)
        status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
        resident = int(status["VmRSS"].split()[0]) * 1024
        return {"resident_bytes": resident, "threads": int(status["Threads"]), "files": len(os.listdir(proc / "fd"))}

    def children(self, name: str) -> list[int]:
        """Process ids below the server's whose command line begins with `name`."""
        below, names = {self.process.pid}, {}
        parents = {}
        for proc in Path("/proc").glob("[0-9]*"):
            try:
                parents[int(proc.name)] = int((proc / "stat").read_text().rpartition(")")[2].split()[1])
                names[int(proc.name)] = (proc / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:  # it has ended meanwhile
                continue
        for _ in range(5):  # Ray's processes are great-grandchildren
            below |= {pid for pid, parent in parents.items() if parent in below}
        return sorted(pid for pid in below if names.get(pid, "").startswith(name))


@contextmanager
def served(*arguments: str, **environment: str) -> Iterator[Served]:
    """`vitalrt serve` with these arguments on a free port; in the end SIGTERM, which it has to obey within STOP_S."""
    port = free_port()
    command = [sys.executable, "-m", "vitalrt.cli", "serve", "--device", "cpu", "--port", str(port), *arguments]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}
            )
        try:
            deadline = time.monotonic() + START_S
            while not re.search(rf"running on http://127.0.0.1:{port}", log.read_text(errors="replace")):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the server did not start: {log.read_text(errors='replace')[-2000:]}")
                time.sleep(0.05)
            yield Served(process, f"http://127.0.0.1:{port}", log)
            process.send_signal(signal.SIGTERM)
            process.wait(STOP_S)
        finally:
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
