"""PTX as text, taken apart: what ptx.py runs."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ptx_memory import PtxError

_REGISTERS = {"pred": np.bool_, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64, "f32": np.uint32, "s8": np.uint8}
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")
_STATEMENT = re.compile(r"(?:@(!?)(\S+)\s+)?([a-z][\w.:]*)\s*(.*)")


@dataclass(frozen=True)
class Instruction:
    guard: str | None
    is_negated: bool
    name: str
    operands: tuple[str, ...]


@dataclass
class Program:
    """params: names and types, in order.  registers: the type of each, by name or by what its name begins with."""

    params: list[tuple[str, str]]
    num_threads: int
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, Any] = field(default_factory=dict)


def parse(text: str) -> Program:
    text = re.sub(r"//[^\n]*", "", text)
    body = text.partition(".visible .entry")[2]
    params, _, body = body.partition(")")
    found = re.findall(r"\.param \.(\w+)[^,\n]*?(\w+_param_\d+)", params)
    threads = re.search(r"\.(?:reqntid|maxntid) (\d+)", body)
    assert threads is not None
    program = Program([(name, kind) for kind, name in found], int(threads[1]))
    body = body[body.index("{") + 1 : body.rindex("}")]
    body = body[: body.index("\t.section")] if "\t.section" in body else body
    for line in body.splitlines():
        _parse_line(line, program)
    return program


def _parse_line(line: str, program: Program) -> None:
    for statement in re.split(r";|(?<=:)\s", line.strip() + " "):
        statement = statement.strip()
        if re.fullmatch(r"[{}\s]*", statement):
            continue
        if statement.startswith("{") and not statement.startswith("{%"):
            statement = statement[1:].strip()
        if declared := re.fullmatch(r"\.reg \.(\w+)\s+(.*)", statement):
            for name in declared[2].split(","):
                program.registers[name.split("<")[0].strip()] = _REGISTERS[declared[1]]
        elif statement.endswith(":"):
            program.labels[statement[:-1]] = len(program.instructions)
        elif not statement.startswith("."):
            parts = _STATEMENT.fullmatch(statement)
            if parts is None:
                raise PtxError(f"not understood: {line!r}")
            operands = tuple(operand.strip() for operand in _OPERAND.findall(parts[4]))
            program.instructions.append(Instruction(parts[2], parts[1] == "!", parts[3].rstrip("."), operands))
