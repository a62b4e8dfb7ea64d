"""Files of a run: replaced whole or not at all, so that a run killed at any moment goes on from what it finds."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from vitalrt.errors import VitalError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to: it takes the place of `path` if the block ends well and is removed if not."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)  # a full disk needs the room
        raise


@contextmanager
def replacing_directory(path: Path) -> Iterator[Path]:
    """The same for a directory: an empty one to fill, renamed to `path` at the end."""
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_atomically(path: Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text)


def claim_directory(run_dir: Path, recipe: str) -> None:
    """Write the recipe (JSON text) to run_dir/recipe.json.  Raises VitalError if run_dir holds a run of another one."""
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "recipe.json"
    if path.is_file() and path.read_text() != recipe:
        raise VitalError(f"out: {run_dir} holds a run of another recipe; choose another directory or remove it")
    write_atomically(path, recipe)


def save_state(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """step: the first one that is still to be done."""
    with replacing(path) as partial:
        torch.save({"module": module.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, partial)


def restore_state(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Returns the step to go on from: 0, with nothing changed, where there is no state yet."""
    if not path.is_file():
        return 0
    state = torch.load(path, weights_only=True)
    module.load_state_dict(state["module"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def trim_log(path: Path, stage: str, first_step: int) -> None:
    """Drop the lines of a stage's steps that will be done again, and a last line that was cut off."""
    if path.is_file():
        lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
        records = [json.loads(line) for line in lines]
        kept = [ln for ln, r in zip(lines, records, strict=True) if r["stage"] != stage or r["step"] < first_step]
        write_atomically(path, "".join(line + "\n" for line in kept))


def progress_bar() -> Progress:
    """On stderr; every task needs a field `status`, a short text behind the bar."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
        console=Console(stderr=True),
    )
