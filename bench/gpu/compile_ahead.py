"""All tiles that bench.gpu.tune tries, compiled by all cores at once and not one after the other when it wants them.

They find each other through Triton's cache: python -m bench.gpu.compile_ahead PART PARTS launches its share of them, on
one layer of the shape that is to be tuned for.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.files import from_checkout
from bench.gpu import tune
from bench.gpu.record import Record
from bench.gpu.shapes import random_model
from bench.gpu.timing import synchronize
from vitalrt.config import ModelConfig
from vitalrt.model_cost import find_config

ROOT = Path(__file__).parents[2]
PART_BYTES = 9e9  # of a process, on the device: the embedding, the head, and that once more in fp32 to quantise it


def compile_ahead(record: Record, device: torch.device, model: str | None) -> dict[str, Any]:
    """What each process said last, and how it ended."""
    room = 0.6 * torch.cuda.get_device_properties(device).total_memory / PART_BYTES
    return run_parts(max(1, min((os.cpu_count() or 2) - 2, int(room))), record.seconds_left - 2, model, device.type)


def run_parts(parts: int, seconds: float, model: str | None, device: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.gpu.compile_ahead"]
    options = [f"--device={device}", *([f"--model={model}"] if model else [])]
    processes = [
        subprocess.Popen(
            [*command, str(part), str(parts), *options],
            cwd=ROOT, env=from_checkout(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for part in range(parts)
    ]  # fmt: skip
    until = time.monotonic() + seconds
    said: list[dict[str, Any]] = []
    try:
        for process in processes:
            try:
                text, _ = process.communicate(timeout=max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                text, _ = process.communicate()
            said.append({"last": (text.strip().splitlines() or [""])[-1], "status": process.returncode})
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return {"processes": said}


def jobs(config: ModelConfig, device: torch.device) -> Iterator[Callable[[], object]]:
    """One for each tile of each matrix."""
    one_layer = replace(config, decoder=replace(config.decoder, num_hidden_layers=1))
    one_layer = replace(one_layer, vision=replace(config.vision, depth=1, deepstack_visual_indexes=(0,)))
    model = random_model(one_layer, device, torch.bfloat16)
    for as_int8 in (False, True):
        for num_rows in tune.TILES:
            for matrix in tune.matrices(model, num_rows, as_int8):
                tiles = (None, *matrix.tiles(num_rows))
                yield from [lambda m=matrix, t=tile: m.run(t) for tile in tiles]


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.gpu.compile_ahead", description=__doc__.splitlines()[0])
    parser.add_argument("part", type=int)
    parser.add_argument("parts", type=int)
    parser.add_argument("--model", default="Qwen3-VL-8B")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    config = find_config(options.model)
    device = torch.device(options.device)
    began, done, failed = time.monotonic(), 0, ""
    with torch.no_grad():
        for index, job in enumerate(jobs(config, device)):
            if index % options.parts != options.part:
                continue
            try:
                job()
                synchronize(device)
                done += 1
            except Exception as error:  # whoever measures it will say so
                failed = f", {type(error).__name__}: {str(error).splitlines()[0][:200]}"
    print(f"{done} of them in {time.monotonic() - began:.1f} s{failed}")


if __name__ == "__main__":
    main()
