"""A pytest plugin: a line of JSON for each test as soon as it has ended, so that a run cut short has told something."""

import json
from pathlib import Path

import pytest

TAIL = 600  # characters of why one failed


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--verdicts", type=Path, help="file that gets them")


class Verdicts:
    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:  # setting up and tearing down are told of where they fail
            self._tell(report, round(report.duration, 2))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._tell(report, 0.0)

    def _tell(self, report: pytest.TestReport | pytest.CollectReport, seconds: float) -> None:
        verdict = {"test": report.nodeid, "outcome": report.outcome, "seconds": seconds}
        if report.failed:
            verdict["why"] = report.longreprtext[-TAIL:]
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(verdict) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # its reports reach the process that started it
        config.pluginmanager.register(Verdicts(config.getoption("--verdicts")))
