from __future__ import annotations

import struct

import pytest

pytest.importorskip("triton", reason="the assembly is a Triton kernel's: pip install triton")

from vitalrt_kernels.gpu.widen import WIDEN_FOUR


def run(program: str, argument: int) -> list[int]:
    """Of xor, prmt and sub.f32 on 32 bits (PTX ISA, 9.7): the four results, $0 to $3, for $4."""
    registers = {"$4": argument}

    def value(operand: str) -> int:
        if operand.startswith("0f"):
            return int(operand[2:], 16)
        return int(operand, 16) if operand.startswith("0x") else registers[operand]

    for line in program.strip("{} \n").splitlines()[1:]:
        operation, rest = line.strip().rstrip(";").split(" ", 1)
        target, *operands = [operand.strip() for operand in rest.split(",")]
        a, b, *more = map(value, operands)
        if operation == "xor.b32":
            registers[target] = a ^ b
        elif operation == "prmt.b32":
            source = (a | b << 32).to_bytes(8, "little")
            registers[target] = int.from_bytes(bytes(source[more[0] >> 4 * i & 7] for i in range(4)), "little")
        elif operation == "sub.f32":
            registers[target] = as_bits(as_float(a) - as_float(b))
        else:
            raise AssertionError(line)
    return [registers[f"${i}"] for i in range(4)]


def as_float(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def as_bits(number: float) -> int:
    return struct.unpack("<I", struct.pack("<f", number))[0]


def test_every_byte_in_every_place() -> None:
    for number in range(-128, 128):
        four = [number, 0, -1, 127]
        for _ in range(4):
            four = [four[-1], *four[:-1]]
            packed = int.from_bytes(struct.pack("4b", *four), "little")
            assert [as_float(bits) for bits in run(WIDEN_FOUR.value, packed)] == four
