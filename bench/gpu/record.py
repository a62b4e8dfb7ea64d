"""What a run leaves behind: results written after every section, each section with its own time and its own failure."""

from __future__ import annotations

import faulthandler
import json
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from vitalrt.files import replace_whole

GRACE_S = 20.0  # a section that is over its time by this waits for a device that will not answer


class SkippedError(Exception):
    """Why a section or a part of it cannot run here."""


def in_short(error: Exception) -> str:
    """Its kind, and the first line of what it says, if it says anything."""
    first, *_ = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {first[:300]}"


@dataclass(frozen=True)
class Section:
    """name: key of its results.  run(record) returns them as JSON takes them.  budget_s: time it may take."""

    name: str
    run: Callable[[Record], dict[str, Any]]
    budget_s: float


@dataclass
class Record:
    """path: of the JSON, written anew after every section, whole or not at all.  results: by section.

    is_broken(): whether this process can use its device no more; then restart() goes on in a new one, and does not
    return. restart may be called by another thread, where a section hangs.  started: as time.monotonic tells, which new
    processes have in common.
    """

    path: Path
    environment: dict[str, Any]
    console: Console
    total_s: float
    quick: bool = False
    is_broken: Callable[[], bool] = bool
    restart: Callable[[], object] = object
    results: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    deadline: float = 0.0

    def run(self, sections: Sequence[Section]) -> None:
        for section in sections:
            self._run_one(section)
            self.write()
            if self.results[section.name]["status"] == "failed" and self._finds_it_broken(section.name):
                self.console.print("the device is of no more use to this process: going on in a new one")
                self.restart()

    def _finds_it_broken(self, name: str) -> bool:
        with self._watched(name, 0):  # it may hang as well
            return self.is_broken()

    def _run_one(self, section: Section) -> None:
        began = time.monotonic()
        budget = min(section.budget_s, self.total_s - (began - self.started))
        self.console.print(f"[bold]{section.name}[/]", end=" ")
        try:
            if budget <= 1:
                raise SkippedError(f"the run's {self.total_s:.0f} s were used up")
            self.deadline = began + budget
            with _alarm(budget), self._watched(section.name, budget):
                outcome = {"status": "done", **section.run(self)}
        except SkippedError as reason:
            outcome = {"status": "skipped", "reason": str(reason)}
        except Exception as error:  # the next section may still tell something
            last = traceback.format_exc().strip().splitlines()[-12:]
            outcome = {"status": "failed", "reason": f"{type(error).__name__}: {error}", "traceback": last}
        outcome = {**self.results.get(section.name, {}), **outcome}  # what a broken section had told by then stays
        outcome["seconds"] = round(time.monotonic() - began, 2)
        self.results[section.name] = outcome
        said = f": {outcome['reason']}" if "reason" in outcome else ""
        self.console.print(f"{outcome['status']} after {outcome['seconds']} s{said}", highlight=False)

    @contextmanager
    def _watched(self, name: str, budget: float) -> Iterator[None]:
        """Where a call into a library does not return, the section has failed and the rest goes on without it."""

        def give_up() -> None:
            faulthandler.dump_traceback()
            self.tell(name, status="failed", reason=f"did not return {GRACE_S:.0f} s after its time was over")
            self.write()
            self.restart()

        watchdog = threading.Timer(budget + GRACE_S, give_up)
        watchdog.daemon = True
        watchdog.start()
        try:
            yield
        finally:
            watchdog.cancel()

    def tell(self, section: str, **parts: Any) -> None:
        """Results that count even if the rest of the section fails."""
        self.results.setdefault(section, {}).update(parts)

    @property
    def seconds_left(self) -> float:
        """Of the section that is running."""
        return self.deadline - time.monotonic()

    def rounds(self, most: int, reserve_s: float = 0.0) -> Iterator[int]:
        """0 .. most - 1, for as long as a round like the longest so far still fits into the section's time."""
        longest = 0.0
        for round_ in range(most):
            if round_ and self.seconds_left < 1.2 * longest + reserve_s:
                return
            began = time.monotonic()
            yield round_
            longest = max(longest, time.monotonic() - began)

    @contextmanager
    def at_most(self, seconds: float) -> Iterator[None]:
        """Less time than the section has, for a part that the rest can do without: TimeoutError when it is over.

        In the main thread, as the section itself.
        """
        signal.setitimer(signal.ITIMER_REAL, max(0.001, min(seconds, self.seconds_left)))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, max(0.001, self.seconds_left))

    def as_dict(self) -> dict[str, Any]:
        return {**self.environment, "seconds": round(time.monotonic() - self.started, 1), "sections": self.results}

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.as_dict(), indent=1) + "\n"
        replace_whole(self.path, lambda path: path.write_text(text, encoding="utf-8"))


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the main thread when the time is over; a call into a library returns first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"expected to be done within {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
