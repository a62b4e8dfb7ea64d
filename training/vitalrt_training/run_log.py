"""A run's log: a line of JSON per step, and the same numbers for TensorBoard or whatever else watches the run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from vitalrt.errors import VitalError
from vitalrt_training.run_files import trim_log

LOG, TRACKERS = "log.jsonl", "trackers"


class Log(Protocol):
    def __call__(self, record: Mapping[str, Any]) -> None: ...


@contextmanager
def open_log(run_dir: Path, accelerator: Accelerator, stage: str, first_step: int) -> Iterator[Log]:
    """What to call with each step's record: it goes to run_dir/log.jsonl and to the accelerator's trackers.

    stage, first_step: what is to be done next; a resumed run drops what it logged after that. Trackers count steps
    through all stages. Call in every process: only the main one writes.
    """
    path = run_dir / LOG
    num_done = 0
    if accelerator.is_main_process:
        trim_log(path, stage, first_step)
        num_done = len(path.read_text().splitlines()) if path.is_file() else 0
    # What TensorBoard was told of steps that are done again is hidden from there on.
    accelerator.init_trackers("vitalrt", init_kwargs={"tensorboard": {"purge_step": num_done}})
    try:
        if not accelerator.is_main_process:
            yield lambda record: None
            return
        with path.open("a") as file:

            def write(record: Mapping[str, Any]) -> None:
                nonlocal num_done
                file.write(json.dumps(record) + "\n")
                file.flush()
                numbers = {name: v for name, v in record.items() if isinstance(v, int | float) and name != "step"}
                accelerator.log(numbers, step=num_done)
                num_done += 1

            yield write
    finally:
        for tracker in accelerator.trackers:  # end_training would also take the process group down
            tracker.finish()
        accelerator.trackers.clear()


def check_trackers(names: Sequence[str]) -> list[str] | None:
    """The names, for Accelerator(log_with=...), which leaves out silently what is not installed; None for no names.

    Raises VitalError on a tracker that accelerate does not know or that is not installed.
    """
    installed = sorted(str(tracker) for tracker in get_available_trackers())
    for name in names:
        if name not in installed:
            raise VitalError(f"trackers: expected one that is installed, of {installed}, got {name!r}")
    return list(names) or None
