"""What can be read off a cubin: its loops, and how much each has asked for before it waits for any of it.

nvdisasm's text, of sm_80 to sm_120; an instruction is an opcode with its modifiers, and operands.
"""

from __future__ import annotations

import re
from typing import NamedTuple

WAIT = "ACQBULK"  # griddepcontrol.wait
FETCH = "CCTL.E.PF2"  # prefetch.global.L2
GLOBAL_ACCESSES = {"LDG", "LDGSTS", "LD", "STG", "ST", "ATOM", "ATOMG", "RED", "REDG"}
WEIGHTS_TO_REGISTERS = "LDG.E.EF"
CONVERSIONS = {"I2F", "F2I", "MUFU"}  # the slow ones: a quarter of a warp each clock, or less

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][A-Z0-9_.]*)\s*([^;]*);")
_LOOP = re.compile(r"^(\.L_x_\d+):$(.*?)BRA(?:\.U)? (?:!?U?P\d+, )?`\(\1\)", re.DOTALL | re.MULTILINE)
_REGISTER = re.compile(r"\bR(\d+)\b")


class Instruction(NamedTuple):
    opcode: str
    operands: str

    @property
    def kind(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def is_global_access(self) -> bool:
        return self.kind in GLOBAL_ACCESSES

    @property
    def registers(self) -> list[int]:
        """Those that are named. The first of a load into registers is the first that it fills."""
        return [int(number) for number in _REGISTER.findall(self.operands)]


def instructions(code: str) -> list[Instruction]:
    return [Instruction(*found) for found in _INSTRUCTION.findall(code)]


def loops(code: str) -> list[list[Instruction]]:
    """In order. A branch to itself, after the end of a program, is none."""
    return [body for body in (instructions(text) for _, text in _LOOP.findall(code)) if body]


def is_of_weights(instruction: Instruction) -> bool:
    """Only weights are loaded so: to be evicted first, or into shared memory (where rows go with them)."""
    return instruction.opcode.startswith((WEIGHTS_TO_REGISTERS, "LDGSTS"))


def bytes_before_use(loop: list[Instruction]) -> int:
    """Of weights that a thread has asked for, in registers, when it first needs one of these. All, if it needs none."""
    asked, filled = 0, set[int]()
    for instruction in loop:
        registers = instruction.registers
        if instruction.opcode.startswith(WEIGHTS_TO_REGISTERS):
            num_bytes = next((bits // 8 for bits in (128, 64) if f".{bits}" in instruction.opcode), 4)
            filled |= {registers[0] + i for i in range(num_bytes // 4)}
            asked += num_bytes
        elif filled & set(registers[1:]):
            break
    return asked
