"""Everything that is to be known of a GPU, in one command that ends within eight minutes: python -m bench.gpu [--quick]

Needs a source checkout and torch, transformers, triton, rich and matplotlib; nothing is installed, built or downloaded.
Results are written after every section; a section that fails, or is over its time, takes none of the others with it.
Without a GPU a miniature runs the same code, to show that it runs: its times say nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import re
import signal
import sys
import warnings
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

ROOT = Path(__file__).parents[2]
for folder in ("training", "kernels", "."):  # a checkout that nobody has installed
    if str(ROOT / folder) not in sys.path:
        sys.path.insert(0, str(ROOT / folder))

from bench.files import commit, sources  # noqa: E402
from bench.gpu import checks, int8, kernels, numerics, product, profile, projector, report, requests, tune  # noqa: E402
from bench.gpu.compile_ahead import compile_ahead  # noqa: E402
from bench.gpu.record import Record, Section, SkippedError  # noqa: E402
from bench.gpu.shapes import random_model, small_config  # noqa: E402
from bench.gpu.timing import copy_bandwidth, matmul_flops  # noqa: E402
from vitalrt.model_cost import KNOWN_MODELS, Card, find_config  # noqa: E402
from vitalrt_kernels.tuned import TABLE  # noqa: E402

TOTAL_S = 460.0
NEEDED = {"model", "compile", "card"}  # by all the others


class Bench:
    """What sections share: the device, its ceilings, the model, the contenders."""

    def __init__(self, device: torch.device, model: str | None, tunes: bool) -> None:
        self.device = device
        self.model_name, self.tunes = model, tunes
        is_cuda = device.type == "cuda"
        self.dtype = torch.bfloat16 if is_cuda else torch.float32
        self.config = find_config(model) if model else KNOWN_MODELS["Qwen3-VL-8B"] if is_cuda else small_config()
        self.card = Card(device_name(device), 1.0, None, "measured in this run")

    def measure_card(self, record: Record) -> dict[str, Any]:
        is_cuda = self.device.type == "cuda"
        bandwidth = copy_bandwidth(self.device, 1 << (32 if is_cuda else 26))
        flops = matmul_flops(self.device, 8192 if is_cuda else 512, self.dtype)
        self.card = Card(device_name(self.device), bandwidth, flops, "measured in this run")
        return {"copy_bytes_per_s": bandwidth, "matmul_flops_per_s": flops}

    def build(self, record: Record) -> dict[str, Any]:
        self.model = random_model(self.config, self.device, self.dtype)
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return {"parameters": parameters, "dtype": str(self.dtype).removeprefix("torch."), "config": repr(self.config)}

    def measure_requests(self, record: Record) -> dict[str, Any]:
        is_promised = "H200" in device_name(self.device) and self.config == KNOWN_MODELS["Qwen3-VL-8B"]
        contenders = requests.Contenders(self.model, record.quick)
        return requests.measure_requests(record, contenders, is_promised)

    def needs_model(self, measure: Any) -> Any:
        def run(record: Record) -> dict[str, Any]:
            if not hasattr(self, "model"):
                raise SkippedError("there is no model: its section says why")
            try:
                outcome: dict[str, Any] = measure(record)
            finally:
                gc.collect()  # models and graphs of the section refer to themselves
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
            return outcome

        return run

    def sections(self) -> list[Section]:
        """In the order of how much would be missed. Budgets add up to more than the whole: few use theirs up."""
        needs = self.needs_model
        return [
            Section("model", self.build, 60),
            *([Section("compile", lambda r: compile_ahead(r, self.device, self.model_name), 90)] if self.tunes else []),
            Section("card", self.measure_card, 30),
            Section("kernels", needs(lambda r: kernels.measure(r, self.model, self.card)), 90),
            Section("numerics", needs(lambda r: numerics.measure(r, self.model)), 60),
            Section("requests", needs(self.measure_requests), 190),
            Section("batches", needs(lambda r: requests.measure_batches(r, self.model, self.card)), 45),
            Section("profile", needs(lambda r: profile.measure(r, self.model, self.card)), 30),
            Section("int8", needs(lambda r: int8.measure(r, self.model)), 40),
            Section("projector", needs(lambda r: projector.measure(r, self.device)), 60),
            Section("product", lambda r: product.measure(r, self.device), 60),
            Section("tests", checks.run_tests, 120),
            Section("sanitizer", checks.run_sanitizer, 160),
            Section("tune", needs(lambda r: tune.measure(r, self.model)), 400),
        ]


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def environment(device: torch.device, arguments: list[str]) -> dict[str, Any]:
    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "none"

    names = ("torch", "triton", "transformers")
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "sources": sources(),
        "command": " ".join(["python -m bench.gpu", *arguments]),
        "device": device_name(device),
        "capability": list(torch.cuda.get_device_capability(device)) if device.type == "cuda" else None,
        "cuda": torch.version.cuda,
        "versions": {"python": platform.python_version()} | {name: of(name) for name in names},
    }


def is_broken(device: torch.device) -> bool:
    """After some errors every call fails, until the process ends."""
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def restart(arguments: list[str], record: Record) -> None:
    """Becomes a new process that does what is left."""
    signal.setitimer(signal.ITIMER_REAL, 0)  # it would outlive this program
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "bench.gpu", *arguments, "--resume", f"{record.started}"])


def resume(record: Record, started: float) -> None:
    """As the process before left it, but for what every process has to have for itself."""
    told = json.loads(record.path.read_text())
    record.started = started
    record.environment |= {name: told[name] for name in ("created", "command")}
    record.results = {name: outcome for name, outcome in told["sections"].items() if name not in NEEDED}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, no compiled peer, fewer dtypes")
    parser.add_argument("--tune", action="store_true", help="only choose tiles, and write tuned.json for this card")
    parser.add_argument("--only", action="append", metavar="SECTION", help="these sections, and what they need")
    parser.add_argument("--model", help="shape: a directory or a known name [Qwen3-VL-8B; a miniature on a CPU]")
    parser.add_argument("--seconds", type=float, default=TOTAL_S, help=f"for all of it [{TOTAL_S:.0f}]")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder of the results")
    parser.add_argument("--resume", type=float, metavar="STARTED", help=argparse.SUPPRESS)  # by restart alone
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning)  # transformers on its own argument names
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.tune and device.type != "cuda":
        parser.error("--tune: expected a CUDA device, whose card the table is of; torch sees none")
    bench = Bench(device, options.model, options.tune)
    sections = bench.sections()
    names = [section.name for section in sections]
    wanted = ["tune"] if options.tune else options.only or [name for name in names if name != "tune"]
    if unknown := sorted(set(wanted) - set(names)):
        parser.error(f"--only: expected some of {names}, got {unknown}")
    console = Console(width=140)
    kind = "gpu-tune" if options.tune else "gpu"
    stem = f"{kind}-" + re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    given = sys.argv[1:] if arguments is None else arguments
    record = Record(options.out / f"{stem}.json", environment(device, given), console, options.seconds, options.quick)
    if options.resume is not None and record.path.is_file():
        resume(record, options.resume)
    if device.type == "cuda":
        record.is_broken = lambda: is_broken(device)
        record.restart = lambda: restart(given, record)
    else:
        console.print("no CUDA device: a miniature runs on the CPU; no time below says anything about a GPU")
    with torch.no_grad():
        left = set(wanted) - record.results.keys()
        record.run([section for section in sections if left and section.name in {*NEEDED, *left}])
    if options.tune:
        outcome = record.results["tune"]
        if outcome.get("rows"):
            text = tune.write_table(bench.card.name, outcome["entries"])
            console.print(f"{TABLE}:\n{text}", highlight=False)
        return
    console.print(report.table(record.results))
    versions = ", ".join(f"{name} {number}" for name, number in record.environment["versions"].items())
    shape = options.model or ("Qwen3-VL-8B" if device.type == "cuda" else "miniature")
    title = f"{device_name(device)}, shape of {shape}; {versions}"
    picture = record.path.with_suffix(".png")
    report.draw(record.results, title, picture)
    console.print("written:", record.path, picture, f"in {record.as_dict()['seconds']} s", highlight=False)


if __name__ == "__main__":
    main()
