"""Runs PTX on a CPU, thread by thread: what a compiled kernel does, barriers, tensor cores and assembly included.

Of the instructions of the PTX ISA (9.7) those that Triton's kernels here are made of; any other raises. Threads of a
block run in step, at the lowest program counter first, blocks one after the other in random order. A block's shared
memory starts as NaN, and asynchronous copies arrive when they are waited for. Raises on an access outside of what was
allocated, and where two warps touch the same byte of shared memory, one of them writing, with no barrier between.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from ptx_memory import Memory, PtxError, SharedMemory
from ptx_numbers import OF_EACH, TYPES, Array, as_bits, as_numbers, compare, join, narrow_bf16, split, widen_bf16, wider
from ptx_program import Instruction, Program

WARP = 32


def run(
    program: Program, memory: Memory, arguments: Iterable[int | float], grid: tuple[int, ...], seed: int = 0
) -> set[int]:
    """arguments: one for each parameter, pointers as addresses; those that are left out are 0.

    Returns which allocations were touched before the launch before was waited for (all, where it never is).
    """
    grid = (*grid, 1, 1)[:3]
    early: set[int] = set()
    given = dict(zip((name for name, _ in program.params), arguments, strict=False))
    for number in np.random.default_rng(seed).permutation(int(np.prod(grid))):
        place = (number % grid[0], number // grid[0] % grid[1], number // (grid[0] * grid[1]))
        early |= Block(program, memory, given, grid, place).run()
    return early


class Block:
    def __init__(
        self,
        program: Program,
        memory: Memory,
        arguments: dict[str, int | float],
        grid: tuple[int, ...],
        place: tuple[int, ...],
    ) -> None:
        self.program, self.memory, self.arguments = program, memory, arguments
        self.shared = SharedMemory()
        self.num_threads = program.num_threads
        self.warp_of = np.arange(self.num_threads) // WARP
        self.registers: dict[str, Array] = {}
        self.specials: dict[str, Any] = {"%tid.x": np.arange(self.num_threads, dtype=np.uint32), "global_smem": 0}
        for axis, of_grid, here in zip("xyz", grid, place, strict=True):
            self.specials |= {f"%ctaid.{axis}": int(here), f"%nctaid.{axis}": of_grid, f"%ntid.{axis}": 1}
        self.copies: list[list[tuple[Array, Array, Array]]] = [[]]
        self.has_waited = False
        self.early: set[int] = set()

    def run(self) -> set[int]:
        at: dict[int, Array] = {0: np.arange(self.num_threads)}
        waiting: dict[int, Array] = {}
        while at or waiting:
            if not at:
                self.shared.pass_barrier()
                at, waiting = waiting, {}
            counter = min(at)
            lanes = at.pop(counter)
            if counter == len(self.program.instructions):
                continue
            instruction = self.program.instructions[counter]
            active = lanes
            if instruction.guard is not None:
                active = lanes[self.read(instruction.guard, "pred", lanes) != instruction.is_negated]
            goals = [(counter + 1, lanes)]
            if instruction.name in ("bra", "bra.uni"):
                goal = self.program.labels[instruction.operands[0]]
                goals = [(goal, active), (counter + 1, np.setdiff1d(lanes, active))]
            elif instruction.name == "ret":
                goals = [(counter + 1, np.setdiff1d(lanes, active))]
            elif instruction.name == "bar.sync":
                waiting[counter + 1] = np.union1d(waiting.get(counter + 1, lanes[:0]), lanes)
                continue
            elif len(active):
                self.execute(instruction, active)
            for goal, some in goals:
                if len(some):
                    at[goal] = np.union1d(at[goal], some) if goal in at else some
        return self.early

    def execute(self, instruction: Instruction, lanes: Array) -> None:
        name, *rest = instruction.name.split(".")
        operation = getattr(self, f"do_{name}", None)
        if operation is None and name not in OF_EACH:
            raise PtxError(f"no such instruction here: {instruction.name}")
        try:
            with np.errstate(all="ignore"):
                if operation is None:
                    self._compute(OF_EACH[name], lanes, rest, *instruction.operands)
                else:
                    operation(lanes, rest, *instruction.operands)
        except PtxError as error:
            raise PtxError(f"{error} ({instruction.name} {', '.join(instruction.operands)})") from None

    # Operands

    def register(self, name: str) -> Array | None:
        """Of each thread. What nobody has written yet is garbage, as it may be read where it does not matter."""
        if name not in self.registers:
            declared = self.program.registers
            dtype = declared.get(name) or declared.get(re.sub(r"\d+$", "", name))
            if dtype is None:
                return None
            garbage = np.full((self.num_threads, np.dtype(dtype).itemsize), 0xA5, np.uint8)
            self.registers[name] = garbage[:, 0] > 0 if dtype is np.bool_ else garbage.view(dtype)[:, 0]
        return self.registers[name]

    def read(self, operand: str, kind: str, lanes: Array) -> Array:
        """As numbers of this type, one for each lane; bf16 as fp32."""
        if kind == "bf16":
            return widen_bf16(self.read(operand, "b16", lanes))
        dtype = np.dtype(TYPES[kind])
        register = self.register(operand)
        if register is not None:
            bits = register[lanes]
            if bits.dtype.itemsize < dtype.itemsize:
                raise PtxError(f"{operand} is narrower than {kind}")
            if bits.dtype.itemsize > dtype.itemsize:
                bits = bits.astype(f"u{dtype.itemsize}")
            return bits.view(dtype)
        return np.full(len(lanes), 0, dtype) + self._constant(operand, dtype, lanes)

    def _constant(self, operand: str, dtype: np.dtype, lanes: Array) -> Array:
        if operand in self.specials:
            value = np.broadcast_to(np.asarray(self.specials[operand]), self.num_threads)[lanes]
            return value.astype(dtype)
        if hexadecimal := re.fullmatch(r"0([fd])([0-9A-Fa-f]+)", operand):
            bits: Array = np.array([int(hexadecimal[2], 16)], np.uint32 if hexadecimal[1] == "f" else np.uint64)
            number = bits.view(np.float32 if hexadecimal[1] == "f" else np.float64)
            return number if dtype.kind == "f" else bits.astype(dtype)
        try:
            integer = int(operand.rstrip("U"), 0)
        except ValueError:
            try:
                return np.array([float(operand)]).astype(dtype)
            except ValueError:
                raise PtxError(f"not understood: {operand}") from None
        if dtype.kind == "f":
            return np.array([integer]).astype(dtype)
        return np.array([integer % (1 << 64)], np.uint64).astype(f"u{dtype.itemsize}").view(dtype)

    def write(self, operand: str, values: Array, lanes: Array) -> None:
        if operand == "_":
            return
        register = self.register(operand)
        assert register is not None
        if values.dtype.kind == "b":
            register[lanes] = values
            return
        if register.dtype.itemsize > values.dtype.itemsize:  # a narrow load fills the rest by its sign
            values = values.astype(f"{values.dtype.kind}{register.dtype.itemsize}")
        register[lanes] = values.view(f"u{values.dtype.itemsize}").astype(register.dtype)

    def write_as(self, operand: str, values: Array, kind: str, lanes: Array) -> None:
        """values: fp32 where kind is bf16."""
        self.write(operand, narrow_bf16(values) if kind == "bf16" else values.astype(TYPES[kind]), lanes)

    def address(self, operand: str, lanes: Array, kind: str) -> Array:
        base, _, offset = operand.strip("[] ").replace(" ", "").partition("+")
        return self.read(base, kind, lanes) + np.array(int(offset or 0)).astype(TYPES[kind])

    # Arithmetic

    def _compute(self, compute: Callable[..., Array], lanes: Array, kinds: list[str], target: str, *a: str) -> None:
        """kinds: ends with that of all, or with that of the result and the last operand, and then of the others.

        Of two packed numbers, each for itself.
        """
        kind = kinds[-1]
        if kind.endswith("x2"):
            kind = kind.removesuffix("x2")
            packed = [split(self.read(each, "b64" if kind == "f32" else "b32", lanes)) for each in a]
            halves = [compute(*[as_numbers(each, kind) for each in pair]) for pair in zip(*packed, strict=True)]
            self.write(target, join(*[as_bits(each, kind) for each in halves]), lanes)
            return
        of_last = kinds[-2] if kinds[-2:-1] == ["f32"] else kind
        others = [self.read(each, kind, lanes) for each in a[:-1]]
        self.write_as(target, compute(*others, self.read(a[-1], of_last, lanes)), of_last, lanes)

    def do_mul(self, lanes: Array, rest: list[str], *operands: str) -> None:
        if rest[0] in ("wide", "hi"):
            a, b = (self.read(each, rest[1], lanes).astype(wider(rest[1])) for each in operands[1:])
            product = a * b if rest[0] == "wide" else (a * b >> a.dtype.type(32)).astype(TYPES[rest[1]])
            self.write(operands[0], product, lanes)
        else:
            self._compute(np.multiply, lanes, rest, *operands)

    def do_mad(self, lanes: Array, rest: list[str], target: str, a: str, b: str, c: str) -> None:
        if rest[0] == "wide":
            product = self.read(a, rest[1], lanes).astype(wider(rest[1]))
            product = product * self.read(b, rest[1], lanes).astype(wider(rest[1]))
            self.write(target, product + self.read(c, rest[1][0] + "64", lanes), lanes)
        else:
            values = [self.read(each, rest[1], lanes) for each in (a, b, c)]
            self.write(target, values[0] * values[1] + values[2], lanes)

    def do_not(self, lanes: Array, rest: list[str], target: str, a: str) -> None:
        self.write(target, ~self.read(a, rest[-1], lanes), lanes)

    def do_rsqrt(self, lanes: Array, rest: list[str], target: str, a: str) -> None:
        self.write(target, (1 / np.sqrt(self.read(a, "f32", lanes).astype(np.float64))).astype(np.float32), lanes)

    def do_ex2(self, lanes: Array, rest: list[str], target: str, a: str) -> None:
        self.write(target, np.exp2(self.read(a, "f32", lanes)), lanes)

    def do_shl(self, lanes: Array, rest: list[str], target: str, a: str, b: str) -> None:
        value, by = self.read(a, rest[-1], lanes), self.read(b, "u32", lanes)
        self.write(
            target, np.where(by < value.itemsize * 8, value << by.astype(value.dtype), 0).astype(value.dtype), lanes
        )

    def do_shr(self, lanes: Array, rest: list[str], target: str, a: str, b: str) -> None:
        value = self.read(a, rest[-1], lanes)
        by = np.minimum(self.read(b, "u32", lanes), value.itemsize * 8 - 1)
        self.write(target, value >> by.astype(value.dtype), lanes)

    def do_bfe(self, lanes: Array, rest: list[str], target: str, a: str, position: str, length: str) -> None:
        value, dtype = self.read(a, rest[-1], lanes), TYPES[rest[-1]]
        start, width = int(position), int(length)
        left = (value << dtype(32 - start - width)).astype(dtype)
        self.write(target, left >> dtype(32 - width), lanes)

    def do_prmt(self, lanes: Array, rest: list[str], target: str, a: str, b: str, selector: str) -> None:
        both = np.stack([self.read(a, "b32", lanes), self.read(b, "b32", lanes)], 1).view(np.uint8)
        places = self.read(selector, "b32", lanes)[:, None] >> (4 * np.arange(4, dtype=np.uint32))
        chosen = np.take_along_axis(both, (places & 7).astype(np.int64), 1)
        chosen = np.where(places & 8, np.where(chosen & 0x80, 0xFF, 0), chosen).astype(np.uint8)  # its sign alone
        self.write(target, np.ascontiguousarray(chosen).view(np.uint32)[:, 0], lanes)

    def do_selp(self, lanes: Array, rest: list[str], target: str, a: str, b: str, which: str) -> None:
        kind = rest[-1]
        chosen = np.where(self.read(which, "pred", lanes), self.read(a, kind, lanes), self.read(b, kind, lanes))
        self.write(target, chosen, lanes)

    def do_setp(self, lanes: Array, rest: list[str], target: str, a: str, b: str) -> None:
        comparison, kind = rest[0], rest[-1]
        if not kind.endswith("x2"):
            self.write(target, compare(comparison, self.read(a, kind, lanes), self.read(b, kind, lanes)), lanes)
            return
        packed = zip(target.split("|"), *[split(self.read(each, "b32", lanes)) for each in (a, b)], strict=True)
        for half, x, y in packed:
            self.write(
                half, compare(comparison, *[as_numbers(each, kind.removesuffix("x2")) for each in (x, y)]), lanes
            )

    def do_cvt(self, lanes: Array, rest: list[str], target: str, a: str, *more: str) -> None:
        *rounding, to, of = rest
        if to.endswith("x2"):
            halves = [as_bits(self.read(each, of, lanes), to.removesuffix("x2")) for each in (*more, a)]
            self.write(target, join(*halves), lanes)
            return
        values = self.read(a, of, lanes)
        if "rmi" in rounding or "rzi" in rounding:
            values = np.floor(values) if "rmi" in rounding else np.trunc(values)
        self.write_as(target, values, to, lanes)

    def do_mov(self, lanes: Array, rest: list[str], target: str, a: str) -> None:
        kind, size = rest[-1], np.dtype(TYPES[rest[-1]]).itemsize
        if target.startswith("{"):
            names = _names(target)
            for part, values in zip(names, split(self.read(a, kind, lanes), len(names)), strict=True):
                self.write(part, values, lanes)
        elif a.startswith("{"):
            names = _names(a)
            parts = [self.read(part, f"b{8 * size // len(names)}", lanes) for part in names]
            self.write(target, join(*parts), lanes)
        else:
            self.write(target, self.read(a, kind, lanes), lanes)

    # Memory

    def do_ld(self, lanes: Array, rest: list[str], target: str, place: str, *policy: str) -> None:
        kind = rest[-1]
        if rest[0] == "param":
            value = self.arguments.get(place.strip("[] "), 0)
            dtype = np.dtype(TYPES[kind])
            bits = np.float32(value).view(np.uint32) if isinstance(value, float) else value % (1 << 64)
            self.write(target, np.full(len(lanes), bits, np.uint64).astype(dtype), lanes)
            return
        names, size = _names(target), np.dtype(TYPES[kind]).itemsize
        if rest[0].startswith("shared"):
            addresses = self.address(place, lanes, "u32")
            values = self.shared.load(addresses, size * len(names), self.warp_of[lanes])
        else:
            values = self._load_global(self.address(place, lanes, "u64"), size * len(names))
        values = np.ascontiguousarray(values).view(TYPES[kind])
        for i, name in enumerate(names):
            self.write(name, np.ascontiguousarray(values[:, i]), lanes)

    def _load_global(self, addresses: Array, num_bytes: int) -> Array:
        which, cells = self.memory.find(addresses, num_bytes)
        if not self.has_waited:
            self.early.add(which)
        return self.memory.bytes_of(which)[cells]

    def do_st(self, lanes: Array, rest: list[str], place: str, source: str, *policy: str) -> None:
        kind, names = rest[-1], _names(source)
        values = np.stack([self.read(name, kind, lanes) for name in names], 1)
        values = np.ascontiguousarray(values).view(np.uint8).reshape(len(lanes), -1)
        if rest[0].startswith("shared"):
            self.shared.store(self.address(place, lanes, "u32"), values, self.warp_of[lanes])
            return
        which, cells = self.memory.find(self.address(place, lanes, "u64"), values.shape[1])
        if not self.has_waited:
            self.early.add(which)
        self.memory.bytes_of(which)[cells] = values

    def do_atom(self, lanes: Array, rest: list[str], target: str, place: str, source: str) -> None:
        if rest[-2:] != ["add", "u32"]:
            raise PtxError("atom: only add.u32 is here")
        added, before = self.read(source, "u32", lanes), np.empty(len(lanes), np.uint32)
        for i, address in enumerate(self.address(place, lanes, "u64")):
            which, cells = self.memory.find(np.array([address]), 4)
            word = self.memory.bytes_of(which)[cells[0]]
            before[i] = word.view(np.uint32)[0]
            self.memory.bytes_of(which)[cells[0]] = np.array([before[i] + added[i]], np.uint32).view(np.uint8)
        self.write(target, before, lanes)

    def do_cp(self, lanes: Array, rest: list[str], *operands: str) -> None:
        if rest[1] == "commit_group":
            self.copies.append([])
        elif rest[1] == "wait_group":
            keep = int(operands[0]) + 1  # what has not been committed does not count
            done, self.copies = self.copies[:-keep], self.copies[-keep:]
            for addresses, values, warps in [copy for group in done for copy in group]:
                self.shared.store(addresses, values, warps)
        elif rest[:2] == ["async", "cg"] or rest[:2] == ["async", "ca"]:
            size = int(operands[2], 0)
            values = np.zeros((len(lanes), size), np.uint8)
            asked = self.read(operands[3], "u32", lanes) if len(operands) > 3 else np.full(len(lanes), size)
            if not set(asked.tolist()) <= {0, size}:
                raise PtxError("cp.async: a part of a copy")
            if (asked > 0).any():
                values[asked > 0] = self._load_global(self.address(operands[1], lanes[asked > 0], "u64"), size)
            self.copies[-1].append((self.address(operands[0], lanes, "u32"), values, self.warp_of[lanes]))
        else:
            raise PtxError("cp: of another kind")

    def do_prefetch(self, lanes: Array, rest: list[str], place: str) -> None:
        self.memory.find(self.address(place, lanes, "u64"), 1)

    def do_createpolicy(self, lanes: Array, rest: list[str], target: str, share: str) -> None:
        self.write(target, np.zeros(len(lanes), np.uint64), lanes)

    def do_griddepcontrol(self, lanes: Array, rest: list[str]) -> None:
        self.has_waited |= rest == ["wait"]

    # Warps

    def _whole_warps(self, lanes: Array) -> tuple[int, Array]:
        if len(lanes) % WARP or (lanes.reshape(-1, WARP)[:, 0] % WARP).any():
            raise PtxError("a part of a warp")
        return len(lanes) // WARP, np.arange(WARP)

    def do_bar(self, lanes: Array, rest: list[str], *operands: str) -> None:
        if rest[:2] != ["warp", "sync"]:
            raise PtxError("bar: of another kind")

    def do_shfl(self, lanes: Array, rest: list[str], target: str, a: str, b: str, clamp: str, mask: str) -> None:
        num_warps, lane = self._whole_warps(lanes)
        if rest[1] not in ("bfly", "idx") or clamp != "31":
            raise PtxError("shfl: of another kind")
        values = self.read(a, "b32", lanes).reshape(num_warps, WARP)
        other = self.read(b, "u32", lanes).reshape(num_warps, WARP).astype(np.int64)
        source = lane ^ other if rest[1] == "bfly" else other
        self.write(target, np.take_along_axis(values, source % WARP, 1).ravel(), lanes)

    def do_redux(self, lanes: Array, rest: list[str], target: str, a: str, members: str) -> None:
        num_warps, lane = self._whole_warps(lanes)
        reduce, nothing = {"add": (np.sum, 0), "max": (np.max, -(2**31))}[rest[1]]
        values = self.read(a, "s32", lanes).reshape(num_warps, 1, WARP)
        masks = self.read(members, "u32", lanes).reshape(num_warps, WARP, 1)
        of_group = np.where(masks >> lane.astype(np.uint32) & 1, values, nothing)
        self.write(target, reduce(of_group, 2).astype(np.int32).ravel(), lanes)

    def _rows(self, lanes: Array, place: str, num_matrices: int) -> tuple[Array, Array]:
        """Of matrices of eight rows, which the first lanes point at: addresses, and the warp of each."""
        addresses = self.address(place, lanes, "u32").reshape(-1, WARP)[:, : 8 * num_matrices]
        return addresses.ravel(), np.repeat(self.warp_of[lanes[::WARP]], 8 * num_matrices)

    def do_ldmatrix(self, lanes: Array, rest: list[str], target: str, place: str) -> None:
        """Eight rows of eight numbers of 16 bits for each matrix; a lane gets two neighbours of row lane / 4."""
        num_warps, lane = self._whole_warps(lanes)
        names = _names(target)
        addresses, warps = self._rows(lanes, place, len(names))
        rows = self.shared.load(addresses, 16, warps)
        matrices = np.ascontiguousarray(rows).view(np.uint16).reshape(num_warps, len(names), 8, 8)
        if "trans" in rest:
            matrices = matrices.swapaxes(2, 3)
        for i, name in enumerate(names):
            low, high = (matrices[:, i, lane // 4, lane % 4 * 2 + half].ravel() for half in (0, 1))
            self.write(name, join(low, high), lanes)

    def do_stmatrix(self, lanes: Array, rest: list[str], place: str, source: str) -> None:
        num_warps, lane = self._whole_warps(lanes)
        names = _names(source)
        matrices = np.empty((num_warps, len(names), 8, 8), np.uint16)
        for i, name in enumerate(names):
            for half, values in enumerate(split(self.read(name, "b32", lanes))):
                matrices[:, i, lane // 4, lane % 4 * 2 + half] = values.reshape(num_warps, WARP)
        if "trans" in rest:
            matrices = np.ascontiguousarray(matrices.swapaxes(2, 3))
        addresses, warps = self._rows(lanes, place, len(names))
        self.shared.store(addresses, matrices.view(np.uint8).reshape(-1, 16), warps)

    def do_mma(self, lanes: Array, rest: list[str], target: str, a: str, b: str, c: str) -> None:
        """[16, 16] times [16, 8], each a warp's: PTX ISA, "Matrix fragments for mma.m16n8k16"."""
        num_warps, lane = self._whole_warps(lanes)
        if rest[2] != "m16n8k16" or rest[-3:-1] not in (["bf16", "bf16"], ["f16", "f16"]):
            raise PtxError("mma: of another kind")
        group, member = lane // 4, lane % 4

        def halves(name: str) -> list[Array]:
            both = [each.reshape(num_warps, WARP) for each in split(self.read(name, "b32", lanes))]
            return [as_numbers(each, rest[-2]) for each in both]

        left, right = np.empty((num_warps, 16, 16)), np.empty((num_warps, 16, 8))
        for i, name in enumerate(_names(a)):
            for half, values in enumerate(halves(name)):
                left[:, group + i % 2 * 8, member * 2 + half + i // 2 * 8] = values
        for i, name in enumerate(_names(b)):
            for half, values in enumerate(halves(name)):
                right[:, member * 2 + half + i * 8, group] = values
        product = left @ right
        for i, (name, added) in enumerate(zip(_names(target), _names(c), strict=True)):
            part = product[:, group + i // 2 * 8, member * 2 + i % 2].ravel()
            self.write(name, (part + self.read(added, "f32", lanes)).astype(np.float32), lanes)


def _names(operand: str) -> list[str]:
    return [name.strip() for name in operand.strip("{} ").split(",")]
