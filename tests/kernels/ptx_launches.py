"""A pytest plugin: kernels are compiled for a GPU, and their PTX is run on the CPU tensors they are launched with.

TRITON_INTERPRET=0 PYTHONPATH=tests/kernels PTX_CAPABILITY=90 pytest -p ptx_launches tests/kernels
"""

from __future__ import annotations

import os
from typing import Any

import torch
from aot import NamedArchitecture
from ptx import run
from ptx_memory import Memory
from ptx_program import parse
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from vitalrt_kernels.gpu import overlap

CAPABILITY = int(os.environ.get("PTX_CAPABILITY", "90"))
# May be touched while the launch before runs: what no launch writes, and of attention that appends the past.
EARLY = {"weight_ptr", "scale_ptr", "head_ptr", "k_ptr", "v_ptr", "pages_ptr", "lengths_ptr", "turns_ptr", "norm_ptr"}

compile_and_launch = JITFunction.run


def run_as_ptx(self: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
    compiled = compile_and_launch(self, *args, grid=grid, warmup=True, **options)
    named = dict(zip(self.arg_names, args, strict=False)) | options
    memory, addresses, owners = Memory(), {}, {}
    for name, value in named.items():
        if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() not in addresses:
            start = value.untyped_storage().data_ptr()
            addresses[start] = memory.allocate(_bytes_of(value))
            owners[len(owners)] = name, value
    arguments: list[int | float] = []
    for name, kind in compiled.src.signature.items():
        if kind == "constexpr":
            continue
        value = named[name]
        if isinstance(value, torch.Tensor):
            start = value.untyped_storage().data_ptr()
            arguments.append(addresses[start] + value.data_ptr() - start)
        else:
            arguments.append(value)
    early = run(parse(compiled.asm["ptx"]), memory, arguments, grid)
    for number, (name, value) in owners.items():
        _bytes_of(value)[:] = memory.bytes_of(number)
        assert number not in early or not options.get("OVERLAPS") or name in EARLY, f"{name} is touched too early"


def _bytes_of(tensor: torch.Tensor) -> Any:
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()


def pytest_configure() -> None:
    driver.set_active(NamedArchitecture(CAPABILITY))
    JITFunction.run = run_as_ptx
    overlap.can_overlap = lambda device: CAPABILITY >= 90
