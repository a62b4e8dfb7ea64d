"""Compiles what every launcher launches at Qwen3-VL-8B's shapes, without a GPU, and prints what the cubins use as JSON.

Run as a program: triton has to be imported with the interpreter off. Launchers run on meta tensors (shapes and dtypes,
no memory) under a driver that names the architecture, so that what is compiled is exactly what production launches.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from machine_code import CONVERSIONS, FETCH, WAIT, bytes_before_use, instructions, is_of_weights, loops
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import vitalrt_kernels.gpu
from vitalrt_kernels.gpu import overlap

CUDA_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
d, INTERMEDIATE, VOCAB, H, G, D = 4096, 12288, 151936, 32, 8, 128
FEATURES = 1152  # of MedSigLIP
SLOTS, PAGE = 32768, 16
ROWS = (1, 16)
NORM_BYTES = 2 * d
NUM_MULTIPROCESSORS = 132  # of an H200


class Launched:
    """What a launch gives."""

    def __init__(self, function: int) -> None:
        self.function = function


class NamedArchitecture:
    """A driver that launches nothing and says it is this architecture."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_all() -> None:
    """Each launcher at its production shapes."""
    launch_rms_norm()
    launch_swiglu()
    launch_turn_heads()
    launch_latent_projector()
    for rows in ROWS:
        launch_begin_step(rows)
        launch_linear_decode(rows)
        launch_head_argmax(rows)
        launch_norm_rope_append(rows)
        launch_paged_attention(rows)
    launch_linear_decode_of_fp32()


def launch_begin_step(rows: int) -> None:
    from vitalrt_kernels.begin_step import Rows
    from vitalrt_kernels.gpu import begin_step as gpu

    counters = [meta(rows, dtype=torch.int32) for _ in range(4)]
    state = Rows(meta(rows, d), meta(rows, dtype=torch.int64), *counters)
    gpu.begin_step(state, meta(VOCAB, d), meta(2, dtype=torch.int64), meta(D // 2, dtype=torch.float32))


def launch_rms_norm() -> None:
    from vitalrt_kernels.gpu import rms_norm as gpu

    gpu.rms_norm(meta(16, d), meta(d), 1e-6, None, meta(16, d))
    gpu.rms_norm(meta(16, d), meta(d), 1e-6, meta(16, d), None)


def launch_swiglu() -> None:
    from vitalrt_kernels.gpu import swiglu as gpu

    gpu.swiglu(meta(500, 2 * INTERMEDIATE))


def launch_turn_heads() -> None:
    """Of Qwen3-VL's vision tower."""
    from vitalrt_kernels.gpu import turn_heads as gpu

    gpu.turn_heads(meta(1920, 48, 72), 32, *[meta(1920, 1, 72, dtype=torch.float32)] * 2)


def launch_latent_projector() -> None:
    from vitalrt_kernels.gpu import latent_projector as gpu
    from vitalrt_kernels.latent_projector import ProjectorWeights

    z, weights = meta(64, d), ProjectorWeights(meta(d), meta(d), meta(d, d), meta(FEATURES, d), *[meta(FEATURES)] * 2)
    _, kept = gpu.forward(z, weights, 1e-5, 0.1, seed=0)
    gpu.backward(meta(64, FEATURES), z, weights, kept, 0.1, seed=0)


def weights(outputs: int, width: int, dtype: torch.dtype = torch.bfloat16) -> list[Any]:
    """One of this dtype, one of int8."""
    from vitalrt_kernels.linear_decode import Int8Weight

    int8 = Int8Weight(meta(outputs, width, dtype=torch.int8), meta(outputs, dtype=torch.float32))
    return [meta(outputs, width, dtype=dtype), int8]


def launch_linear_decode(rows: int) -> None:
    from vitalrt_kernels.gpu import linear_decode as gpu
    from vitalrt_kernels.linear_decode import Norm

    norm = Norm(meta(d), 1e-6)
    for weight in weights((H + 2 * G) * D, d):
        gpu.linear_decode(meta(rows, d), weight, norm, None, swiglu=False)
    for weight in weights(d, H * D):
        gpu.linear_decode(meta(rows, H * D), weight, None, meta(rows, d), swiglu=False)
    for weight in weights(2 * INTERMEDIATE, d):
        gpu.linear_decode(meta(rows, d), weight, norm, None, swiglu=True)
    for weight in weights(d, INTERMEDIATE):
        gpu.linear_decode(meta(rows, INTERMEDIATE), weight, None, meta(rows, d), swiglu=False)


def launch_linear_decode_of_fp32() -> None:
    """Nothing that anybody serves, but the widest numbers there are."""
    from vitalrt_kernels.gpu import linear_decode as gpu

    x = meta(16, d, dtype=torch.float32)
    for swiglu in (False, True):
        for weight in weights(2 * INTERMEDIATE, d, torch.float32):
            gpu.linear_decode(x, weight, None, None, swiglu)


def launch_head_argmax(rows: int) -> None:
    from vitalrt_kernels.gpu import head_argmax as gpu

    for weight in weights(VOCAB, d):
        gpu.head_argmax(meta(rows, d), weight, meta(1, dtype=torch.int32), meta(rows, dtype=torch.int64))


def launch_norm_rope_append(rows: int) -> None:
    from vitalrt_kernels.gpu import norm_rope_append as gpu
    from vitalrt_kernels.norm_rope_append import Rope

    rope = Rope(meta(D // 2, dtype=torch.float32), meta(D // 2, dtype=torch.int64))
    caches, slots = (meta(SLOTS, G, D), meta(SLOTS, G, D)), meta(rows, dtype=torch.int64)
    positions = meta(3, rows, dtype=torch.int64)
    gpu.norm_rope_append(meta(rows, H + 2 * G, D), meta(H + G, D), 1e-6, positions, rope, *caches, slots)


def launch_paged_attention(rows: int) -> None:
    from vitalrt_kernels.gpu import paged_attention as gpu
    from vitalrt_kernels.paged_attention import Append, num_splits

    pages, lengths = meta(rows, SLOTS // PAGE, dtype=torch.int32), meta(rows, dtype=torch.int32)
    tickets = meta(rows * G, dtype=torch.int32)
    caches = meta(SLOTS, G, D), meta(SLOTS, G, D)
    append = Append(meta(H + G, D), 1e-6, meta(rows, D, dtype=torch.float32))
    for splits in {num_splits(rows * G, 500), num_splits(rows * G, SLOTS)}:
        gpu.paged_attention(meta(rows, H, D), *caches, pages, lengths, PAGE, tickets, None, splits)
        gpu.paged_attention(meta(rows, H + 2 * G, D), *caches, pages, lengths, PAGE, tickets, append, splits)


def _say(tool: str, *arguments: str) -> str:
    return subprocess.run([CUDA_TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


_LABEL = re.compile(r"^\.L_x_\d+:", re.MULTILINE)


def _wide_loads(code: str) -> int:
    """Of 16 bytes for each thread."""
    return sum(each.kind == "LDG" and ".128" in each.opcode for each in instructions(code))


def read_code(code: str, options: dict[str, Any]) -> dict[str, Any]:
    """Before it waits for the launch before, and in its loops over weights, if it has any."""
    before, waits, after = code.partition(WAIT)
    accesses = [each for each in instructions(before) if each.is_global_access]
    if "BLOCK_N" in options:  # weights may be touched
        accesses = [each for each in accesses if not is_of_weights(each)]
    over_weights = [loop for loop in loops(code) if any(map(is_of_weights, loop))]
    read: dict[str, Any] = {
        "waits": bool(waits),
        "accesses_before": len(accesses),
        "loads_from_l2_before": sum("LDG" in each.opcode and "STRONG.GPU" in each.opcode for each in accesses),
        "loads_before": sum(each.kind == "LDG" for each in accesses),
        "fetches_before": before.count(FETCH),
        "wide_loads_before": _wide_loads(before) if waits else 0,
        "stores_to_shared_before": sum(each.kind == "STS" for each in instructions(before)),
        "barriers_after": sum(each.opcode.startswith("BAR.SYNC") for each in instructions(after)),
        "copies_to_shared": sum(each.opcode.startswith("LDGSTS") for each in instructions(code)),
        "weights_before": bytes_before_use(instructions(before)) if waits else 0,
    }
    if "BLOCK_N" in options:
        read["exchanges"] = sum(each.kind == "SHFL" for each in instructions(code))
        read["row_before_loops"] = any(".EL." in each.opcode for each in instructions(_LABEL.split(code)[0]))
    if "BLOCK_N" in options and len(over_weights) == 1:
        (loop,) = over_weights
        read["loop"] = {
            "barriers": sum(each.opcode.startswith("BAR.SYNC") for each in loop),
            "instructions": len(loop),
            "conversions": sum(each.kind in CONVERSIONS for each in loop),
            "bytes_before_use": bytes_before_use(loop),
        }
    return read


def read_block(options: dict[str, Any], named: dict[str, Any], grid: tuple[int, ...]) -> dict[str, Any]:
    """Of a kernel over weights: what a block does in a round, and how many blocks there are."""
    weight = named.get("weight_ptr", named.get("head_ptr"))
    x = named.get("x_ptr", named.get("h_ptr"))
    matrices = 2 if options.get("SWIGLU") else 1
    return {
        "x": str(x.dtype).removeprefix("torch."),
        "rows": options["ROWS"],
        "weight": str(weight.dtype).removeprefix("torch."),
        "fetched": NORM_BYTES if named.get("norm_ptr") is not None else 0,
        "sums": options["BLOCK_N"] * matrices,
        "bytes_a_round": options["BLOCK_N"] * options["BLOCK_K"] * weight.itemsize * matrices,
        "stages": options["STAGES"],
        "blocks": grid[0],
    }


def main(capabilities: list[int]) -> None:
    names = [module.name for module in pkgutil.iter_modules(vitalrt_kernels.gpu.__path__, "vitalrt_kernels.gpu.")]
    targets: dict[str, Any] = {}
    for name in names:
        targets |= getattr(importlib.import_module(name), "BLOCKS_PER_SM", {})
    rows: list[dict[str, Any]] = []
    run: Callable[..., Any] = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Launched:
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        named = dict(zip(self.arg_names, args, strict=False))
        name, metadata = self.__name__, compiled.metadata
        target = targets[name]
        target = target[options["ROWS"]] if isinstance(target, dict) else target
        rows.append({"kernel": name, "capability": capability, "blocks_per_sm": target})
        rows[-1] |= {"warps": metadata.num_warps, "dynamic_shared": metadata.shared}
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(compiled.asm["cubin"])
            cubin.flush()
            usage, code = _say("cuobjdump", "-res-usage", cubin.name), _say("nvdisasm", cubin.name)
        rows[-1] |= {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
        rows[-1] |= read_code(code, options)
        rows[-1] |= {"appends": named.get("norm_ptr") is not None, "splits_at_once": options.get("SPLITS_AT_ONCE")}
        rows[-1] |= {"fuses": metadata.enable_fp_fusion}
        rows[-1] |= {"grid": grid, "shares_alike": False}
        if "BLOCK_N" in options:
            rows[-1] |= read_block(options, named, grid)
        return Launched(function=len(rows))  # 0 would be no function

    def set_attribute(function: ctypes.c_void_p, _: int, percent: int) -> None:
        rows[(function.value or 0) - 1]["shares_alike"] = percent == overlap.SHARED_PERCENT

    overlap._driver = lambda: SimpleNamespace(cuFuncSetAttribute=set_attribute)
    overlap.num_multiprocessors = lambda device: NUM_MULTIPROCESSORS
    JITFunction.run = compile_only
    for capability in capabilities:
        driver.set_active(NamedArchitecture(capability))
        overlap.can_overlap = lambda device, capability=capability: capability >= 90
        launch_all()
    print(json.dumps({"kernels": list(targets), "rows": rows}))


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])
