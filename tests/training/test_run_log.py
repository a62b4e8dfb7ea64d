"""The log of a run: lines of JSON, and the same numbers for a tracker."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vitalrt.errors import VitalError
from vitalrt_training.run_log import TRACKERS, check_trackers, open_log


def new_accelerator(run_dir, trackers):
    project = ProjectConfiguration(str(run_dir), str(run_dir / TRACKERS))
    return Accelerator(cpu=True, log_with=check_trackers(trackers), project_config=project)


def write_steps(run_dir, accelerator, stage, first_step, losses):
    with open_log(run_dir, accelerator, stage, first_step) as write:
        for step, loss in enumerate(losses, first_step):
            write({"stage": stage, "step": step, "loss": loss})


def lines(run_dir):
    records = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [(record["stage"], record["step"], record["loss"]) for record in records]


def test_a_resumed_run_replaces_what_it_does_again(tmp_path):
    """In the file and in TensorBoard, whose steps count through the stages."""
    accelerator = new_accelerator(tmp_path, ["tensorboard"])
    write_steps(tmp_path, accelerator, "phase 1", 0, [9.0, 8.0])
    write_steps(tmp_path, accelerator, "phase 2", 0, [7.0, 6.0, 5.0])
    write_steps(tmp_path, new_accelerator(tmp_path, ["tensorboard"]), "phase 2", 1, [4.0, 3.0])
    expected = [9.0, 8.0, 7.0, 4.0, 3.0]
    stages = [("phase 1", 0), ("phase 1", 1), ("phase 2", 0), ("phase 2", 1), ("phase 2", 2)]
    assert lines(tmp_path) == [(*place, loss) for place, loss in zip(stages, expected, strict=True)]
    assert len(list(tmp_path.rglob("events.*"))) == 3  # a log that was closed is not written to again
    events = EventAccumulator(str(tmp_path / TRACKERS / "vitalrt")).Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == list(enumerate(expected))


def test_without_trackers_there_is_the_file_alone(tmp_path):
    write_steps(tmp_path, new_accelerator(tmp_path, []), "phase 1", 0, [1.0])
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_line_is_there_as_soon_as_it_is_written(tmp_path):
    with open_log(tmp_path, new_accelerator(tmp_path, []), "phase 1", 0) as write:
        write({"stage": "phase 1", "step": 0, "loss": 1.0})
        assert lines(tmp_path) == [("phase 1", 0, 1.0)]


def test_a_tracker_that_is_not_installed_is_an_error():
    with pytest.raises(VitalError, match=r"trackers: expected one that is installed, of .*'tensorboard'.*'nothing'"):
        check_trackers(["tensorboard", "nothing"])


def test_only_the_main_process_writes(tmp_path):
    other = SimpleNamespace(is_main_process=False, trackers=[], init_trackers=lambda name, init_kwargs: None)
    with open_log(tmp_path, other, "phase 1", 0) as write:
        write({"stage": "phase 1", "step": 0, "loss": 1.0})
    assert not list(tmp_path.iterdir())
